"""The CPU speedrun of chapter 10: how much sooner does minilm reach a published recipe's loss?

    python benchmarks/speedrun.py --json     # all; writes minilm/assets/results/speedrun.json
    python benchmarks/speedrun.py --quick    # one seed of minilm alone; saves nothing

The reference is nanoGPT's published recipe for CPUs: characters, context 64, batch 12, 4 layers,
4 heads, width 128, no dropout, AdamW from 1e-3 to 1e-4 along half a cosine after 100 steps of
warm-up, betas 0.9 and 0.99, decay 0.1 for matrices, gradients clipped at 1, 2,000 steps. The model
is GPT-2 of `transformers` with fused attention and PyTorch's fused GELU and AdamW; eager
or compiled, whichever is done first.

minilm runs `minilm.training.train` on the preset "speedrun". Both learn from the 32 training plays.
Both are measured on the same windows of 64 characters of the three validation plays, which are
ASCII: a character is a byte, so nats for each character over ln 2 are bits per byte. The target is
the lowest of the reference's final losses. minilm's time is that of its first look at or below the
target. Clocks count steps, with all compilation in them, and no looks. Seeds take turns.

The ladder starts from the reference and switches on one trick after the other, one run each.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch._inductor.utils
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

from minilm.corpus import load_shakespeare
from minilm.model import Transformer, gpt2_config
from minilm.ngram import count_ngrams, kneser_ney
from minilm.optim import OptimizerConfig, build_optimizer
from minilm.results import save_result
from minilm.training import PRESETS, Progress, SingleProcess, TrainConfig, train

SEQ_LEN, BATCH_SIZE, STEPS, WARMUP = 64, 12, 2000, 100
FAST, SLOW = 1e-3, 1e-4  # the reference's learning rates
SEEDS = (0, 1, 2)
N_WINDOWS = 1024  # of the validation plays
LOOKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # after these parts of the steps
PROBE = 40  # steps that tell what a step costs
CHECKED = 12  # steps that the chapter does again


# What both are measured on


def text_and_starts(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a split's plays, and where the windows begin: evenly spaced."""
    text = b"".join(play.data for play in load_shakespeare(split))
    data = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    return data, np.linspace(0, len(data) - SEQ_LEN - 1, N_WINDOWS).astype(int)


def windows(split: str) -> np.ndarray:
    """Rows of 65 bytes: 64 inputs, and 64 targets one further."""
    data, starts = text_and_starts(split)
    return data[starts[:, None] + np.arange(SEQ_LEN + 1)]


@torch.no_grad()
def validation_loss(logits: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Nats for each character of the windows."""
    total = 0.0
    for part in rows.split(128):
        wide = logits(part[:, :-1]).float()
        total += float(F.cross_entropy(wide.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / rows[:, 1:].numel()


def best_ngram() -> dict[str, float]:
    """Kneser-Ney of the order that is best on the same characters, and what its fit takes.

    It reads up to 7 bytes before each character, wherever the windows begin.
    """
    data, starts = text_and_starts("validation")
    targets = starts[:, None] + np.arange(1, SEQ_LEN + 1)
    found = []
    for order in range(4, 9):
        begin = time.perf_counter()
        model = kneser_ney(count_ngrams([p.data for p in load_shakespeare("train")], order))
        seconds = time.perf_counter() - begin
        log_probs = model.log_probs(data[None])[0]
        found.append((-float(log_probs[targets].mean()), order, seconds))
    loss, order, seconds = min(found)
    return {"order": order, "loss": loss, "bits_per_byte": loss / math.log(2), "seconds": seconds}


# The reference


class Reference:
    """nanoGPT's recipe on GPT-2 of transformers; a step at a time.

    Args:
        seed: Of the weights and the batches.
        compiled: Whether to use torch.compile.
    """

    def __init__(self, seed: int, compiled: bool) -> None:
        plays = load_shakespeare("train")
        text = "".join(play.text for play in plays)
        self.characters = {c: i for i, c in enumerate(sorted(set(text)))}
        self.ids = torch.tensor([self.characters[c] for c in text])
        config = GPT2Config(
            vocab_size=len(self.characters),
            n_positions=SEQ_LEN,
            n_embd=128,
            n_layer=4,
            n_head=4,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(seed)
        self.model = GPT2LMHeadModel(config)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=FAST, betas=(0.9, 0.99), fused=True)
        self.draw = torch.Generator().manual_seed(seed)
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.step, self.seconds = 0, 0.0

    def logits(self, inputs: Tensor) -> Tensor:
        """The model's answer."""
        scores: Tensor = self.model(inputs).logits
        return scores

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    def rate(self) -> float:
        """The learning rate of this step."""
        if self.step < WARMUP:
            return FAST * (self.step + 1) / (WARMUP + 1)
        done = (self.step - WARMUP) / (STEPS - WARMUP)
        return SLOW + (FAST - SLOW) * (1 + math.cos(math.pi * done)) / 2

    def advance(self) -> float:
        """Do a step; return its seconds."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        at = torch.randint(len(self.ids) - SEQ_LEN, (BATCH_SIZE,), generator=self.draw)
        rows = self.ids[at[:, None] + torch.arange(SEQ_LEN + 1)]
        self.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return seconds

    def look(self, rows: np.ndarray) -> float:
        """The validation loss, by the model as it is, not compiled."""
        ids = np.array([self.characters.get(chr(byte), -1) for byte in range(128)])[rows]
        if ids.min() < 0:
            raise ValueError("the validation plays have characters that the training plays lack")
        return validation_loss(self.logits, torch.from_numpy(ids))


def fresh_compiler() -> Any:
    """Surround a run whose compilation must not find what an earlier one has left."""
    torch._dynamo.reset()
    return torch._inductor.utils.fresh_cache()


def probe_reference() -> dict[str, Any]:
    """What a step costs, eager and compiled, and what compiling costs."""
    result: dict[str, Any] = {"parameters": 0, "steps": STEPS}
    for name, compiled in (("eager", False), ("compiled", True)):
        with fresh_compiler():
            reference = Reference(0, compiled)
            seconds = [reference.advance() for _ in range(PROBE)]
        step = statistics.median(seconds[PROBE // 4 :])
        first = sum(seconds[: PROBE // 4]) - PROBE // 4 * step
        result[f"{name}_ms"] = 1000 * step
        result[f"{name}_total"] = first + STEPS * step
        result["parameters"] = sum(p.numel() for p in reference.parameters)
        print(f"reference {name}: {1000 * step:.1f} ms a step, {first:.1f} s before", flush=True)
    result["way"] = min(("eager", "compiled"), key=lambda name: result[f"{name}_total"])
    return result


def run_reference(seed: int, compiled: bool, rows: np.ndarray) -> dict[str, float]:
    """The whole recipe."""
    with fresh_compiler():
        reference = Reference(seed, compiled)
        for _ in range(STEPS):
            reference.advance()
        loss = reference.look(rows)
    return {"seed": seed, "seconds": reference.seconds, "loss": loss}


# minilm


class Watched(SingleProcess):
    """One process that keeps a hand on the model, so that it can be measured while it learns."""

    model: Transformer

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Any:
        """Build the optimizer; remember the model."""
        self.model = model
        return build_optimizer(model, config)


def run_minilm(
    config: TrainConfig, rows: np.ndarray, looks: Sequence[float] = LOOKS
) -> dict[str, Any]:
    """Train as the config says, and look after these parts of the steps."""
    ids, strategy, curve, clock = torch.from_numpy(rows), Watched(), [], [0.0]
    due = {round(part * config.steps) for part in looks}

    def stop(progress: Progress) -> bool:
        clock.append(progress.seconds)
        if progress.step in due:
            loss = validation_loss(strategy.model, ids)
            curve.append({"step": progress.step, "seconds": progress.seconds, "loss": loss})
        return False

    config = replace(config, eval_every=config.steps, eval_windows=1)
    with fresh_compiler():
        result = train(config, strategy=strategy, stop=stop)
    return {
        "seed": config.seed,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "steps": config.steps,
        "ms_per_step": 1000 * float(np.median(np.diff(clock))),
        "seconds": result.seconds,
        "loss": curve[-1]["loss"],
        "curve": curve,
    }


def first_steps(config: TrainConfig, n_steps: int) -> dict[str, Any]:
    """The training losses of the first steps, the cost of a step and of what comes before it."""
    clock = [0.0]

    def stop(progress: Progress) -> bool:
        clock.append(progress.seconds)
        return progress.step >= n_steps

    with fresh_compiler():
        result = train(replace(config, log_every=1, eval_every=config.steps), stop=stop)
    seconds = np.diff(clock)
    step = float(np.median(seconds[n_steps // 4 :]))
    return {
        "losses": [record["loss"] for record in result.history if "loss" in record],
        "ms_per_step": 1000 * step,
        "seconds_before": max(0.0, result.seconds - n_steps * step),
    }


def reached(run: dict[str, Any], target: float) -> float | None:
    """Seconds until the first look at or below the target."""
    return next((look["seconds"] for look in run["curve"] if look["loss"] <= target), None)


# The ladder


def ladder() -> list[tuple[str, str, TrainConfig]]:
    """Name, note and config of each run; each config has one trick more than the one before.

    The numbers of steps are enough for the target, and not the fewest.
    """
    final = PRESETS["speedrun"]
    gpt2 = replace(
        final,
        model=gpt2_config(257, SEQ_LEN, d_model=128, n_layers=4, n_heads=4),
        batch_size=BATCH_SIZE,
    )
    wide = replace(final.model, d_model=128, n_heads=4, n_kv_heads=4, d_ff=512)
    return [
        ("Muon, linear decay", "", replace(gpt2, steps=560)),
        ("rotary, QK norm, squared ReLU", "", replace(gpt2, model=wide, steps=320)),
        ("a quarter of the parameters", "", replace(final, batch_size=BATCH_SIZE, steps=480)),
        ("batch 32", "", final),
    ]


def step_costs(config: TrainConfig) -> list[dict[str, Any]]:
    """Milliseconds a step with what was tried and left out."""
    tried: list[tuple[str, dict[str, Any]]] = [
        ("as it is", {}),
        ("attention by hand", {"fused_attention": not config.fused_attention}),
        ("bfloat16 weights", {"precision": "bfloat16", "master_weights": True}),
        ("torch.compile", {"compile": True}),
    ]
    result = []
    for name, changes in tried:
        cost = first_steps(replace(config, **changes), PROBE // 2)
        del cost["losses"]
        result.append({"name": name, **cost})
        print(f"{name}: {cost['ms_per_step']:.1f} ms a step, {cost['seconds_before']:.1f} s before")
    return result


# The race


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def race(config: TrainConfig, rows: np.ndarray, compiled: bool) -> tuple[list[Any], list[Any]]:
    """Both sides in turns, one seed after the other."""
    theirs, ours = [], []
    for seed in SEEDS:
        theirs.append(run_reference(seed, compiled, rows))
        ours.append(run_minilm(replace(config, seed=seed), rows))
        for name, run in (("reference", theirs[-1]), ("minilm", ours[-1])):
            print(f"seed {seed}: {name} {run['loss']:.4f} in {run['seconds']:.1f} s", flush=True)
        print(*(f"{look['step']}: {look['loss']:.4f}" for look in ours[-1]["curve"]), sep=", ")
    return theirs, ours


def climb(target: float, rows: np.ndarray, first: dict[str, Any]) -> list[dict[str, Any]]:
    """One run for each step of the ladder, and how long it takes to the target."""
    steps = [first]
    for name, note, config in ladder():
        run = run_minilm(config, rows)
        seconds = reached(run, target)
        run |= {"name": name, "note": note, "reached": seconds is not None}
        if seconds is not None:
            run["seconds"] = seconds
        steps.append(run)
        missed = "" if run["reached"] else f", but missed the target with {run['loss']:.4f}"
        print(
            f"{name}: {run['seconds']:.1f} s, {run['ms_per_step']:.1f} ms a step{missed}",
            flush=True,
        )
    return steps


def compare_both(rows: np.ndarray) -> dict[str, Any]:
    """The whole benchmark."""
    config, result = PRESETS["speedrun"], {"threads": torch.get_num_threads()}
    check = replace(config, seed=SEEDS[0])
    losses = first_steps(check, CHECKED)["losses"]
    result["check"] = {"config": json.loads(check.to_json()), "losses": losses}
    result["ngram"] = best_ngram()
    print(f"Kneser-Ney: {result['ngram']}", flush=True)
    reference = probe_reference()
    theirs, ours = race(config, rows, reference["way"] == "compiled")
    target = min(run["loss"] for run in theirs)
    for run in ours:
        run["to_target"] = reached(run, target)
    result["target"] = target
    result["reference"] = {**reference, "runs": theirs}
    result["ours"] = {
        "parameters": ours[0]["parameters"],
        "steps": config.steps,
        "ms_per_step": statistics.median(run["ms_per_step"] for run in ours),
        "config": asdict(config),
        "runs": ours,
    }
    ratios = [
        their["seconds"] / our["to_target"]
        for their, our in zip(theirs, ours, strict=True)
        if our["to_target"] is not None
    ]
    result["ratios"] = ratios
    first = {
        "name": "reference",
        "note": reference["way"],
        "seconds": statistics.median(run["seconds"] for run in theirs),
        "ms_per_step": reference[f"{reference['way']}_ms"],
        "parameters": reference["parameters"],
        "steps": STEPS,
        "loss": target,
        "reached": True,
    }
    result["ladder"] = climb(target, rows, first)
    result["tried"] = step_costs(config)
    return result


def report(result: dict[str, Any]) -> None:
    """Print the verdict."""
    per_byte, ngram, target = 1 / math.log(2), result["ngram"], result["target"]
    for name, side in (("reference", result["reference"]), ("minilm", result["ours"])):
        losses = [run["loss"] for run in side["runs"]]
        loss = statistics.median(losses)
        print(
            f"{name}: {side['parameters']:,} parameters, {side['steps']} steps, "
            f"{spread([run['seconds'] for run in side['runs']])} s, loss {loss:.3f} "
            f"({min(losses):.3f} to {max(losses):.3f}) nats a character = "
            f"{loss * per_byte:.3f} bits a byte"
        )
    print(
        f"Kneser-Ney of order {ngram['order']}: {ngram['loss']:.3f} nats a character = "
        f"{ngram['bits_per_byte']:.3f} bits a byte, fitted in {ngram['seconds']:.1f} s"
    )
    reached_all = len(result["ratios"]) == len(SEEDS)
    verdict = "reached" if reached_all else "NOT reached"
    print(f"target {target:.3f}: {verdict} by all seeds of minilm")
    if result["ratios"]:
        print(f"{spread(result['ratios'])} times sooner")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="save the result and print it as JSON")
    parser.add_argument("--quick", action="store_true", help="one seed of minilm alone")
    chosen = parser.parse_args()
    rows = windows("validation")
    if chosen.quick:
        run = run_minilm(PRESETS["speedrun"], rows)
        print(f"{run['parameters']:,} parameters, {run['ms_per_step']:.1f} ms a step")
        for look in run["curve"]:
            print(f"step {look['step']}: {look['loss']:.4f} nats after {look['seconds']:.1f} s")
        return
    result = compare_both(rows)
    report(result)
    if chosen.json:
        print(json.dumps(result, indent=1))
        print("wrote", save_result("speedrun", result, "python benchmarks/speedrun.py --json").name)


if __name__ == "__main__":
    main()
