"""The grid of small runs that chapter 12 fits its law to, and the larger run that the law predicts.

    python benchmarks/scaling_grid.py --json                # all that is not done yet
    python benchmarks/scaling_grid.py --json --minutes 14   # stop in time; the next call goes on
    python benchmarks/scaling_grid.py --json --fresh        # from the beginning
    python benchmarks/scaling_grid.py --reverse             # beside another, on a second core

Keeps what is done in scaling_grid_progress.json beside the results, and writes
minilm/assets/results/scaling_grid.json at the end. All of it takes about 14 minutes of one core and
1 GB.

Every run has the same recipe: bytes of the training plays, each read once but where a run is meant
to repeat them; AdamW, a cosine that ends with the run, a learning rate that follows from the width.
The loss is taken on fixed windows of the validation plays. When the grid is there, the law is
fitted, and the loss of a run three times as large as any of the grid is predicted, with its
interval. The prediction is written to the file before that run starts.
"""

import argparse
import json
import math
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from minilm.corpus import load_shakespeare
from minilm.errors import DataError
from minilm.model import ModelConfig, Transformer, count_parameters, gpt2_config
from minilm.results import load_result, save_result
from minilm.scaling import Run, bootstrap_laws, fit_law, predict

NAME, COMMAND = "scaling_grid", "python benchmarks/scaling_grid.py --json"
PROGRESS = "scaling_grid_progress"  # not the committed file: a changed one would mark the commit
BEGIN, VOCABULARY = 256, 257
M = 1920 * 512  # tokens of 1,920 steps, a quarter of an epoch
RECIPE: dict[str, Any] = {
    "seq_len": 128,
    "batch": 4,
    "learning_rate": "0.32 / d_model",
    "warmup": 0.1,
    "final_factor": 0.1,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "clip": 1.0,
    "init_std": "0.5 / sqrt(d_model)",
    "head_dim": 16,
    "validation_windows": 512,
}
SHAPES = {16: 2, 32: 2, 48: 3, 64: 3, 80: 3}  # width: layers
# for each width, in sixteenths of M: 0.25 to 2 million tokens, half of an epoch
LENGTHS = {16: (4, 8, 16, 32), 32: (4, 8, 16, 32), 48: (4, 8, 16), 64: (4, 8), 80: (4, 8, 16)}
HELD_OUT = {"d_model": 128, "n_layers": 4, "tokens": M}


def plan() -> list[dict[str, Any]]:
    """All runs but the held-out one."""
    runs = []
    for width, layers in SHAPES.items():
        shape = {"d_model": width, "n_layers": layers}
        for part in LENGTHS[width]:
            tokens = part * M // 16
            runs.append({**shape, "tokens": tokens, "unique_tokens": tokens, "seed": 0})
    shape = {"d_model": 48, "n_layers": 3}
    for seed in (1, 2):
        runs.append({**shape, "tokens": M // 2, "unique_tokens": M // 2, "seed": seed})
    for epochs in (2, 4, 8):
        tokens = epochs * M // 8
        runs.append({**shape, "tokens": tokens, "unique_tokens": M // 8, "seed": 0})
    return runs


def seconds_for(run: dict[str, Any]) -> float:
    """A rough guess, to stop in time."""
    config = config_for(run["d_model"], run["n_layers"])
    steps = run["tokens"] / RECIPE["seq_len"] / RECIPE["batch"]
    flops = 6 * count_parameters(config) * RECIPE["seq_len"] * RECIPE["batch"]
    return float(steps * (0.003 * run["n_layers"] + flops / 25e9))


def config_for(d_model: int, n_layers: int) -> ModelConfig:
    """One family of shapes."""
    return gpt2_config(
        VOCABULARY,
        RECIPE["seq_len"],
        d_model,
        n_layers,
        n_heads=d_model // RECIPE["head_dim"],
        positions="rotary",
        activation="relu_squared",
        bias=False,
        init_std=0.5 / d_model**0.5,
    )


def windows(split: str) -> Tensor:
    """The plays of a split, cut: what is read and, moved by one, what comes next."""
    ids = torch.tensor([i for play in load_shakespeare(split) for i in (BEGIN, *play.data)])
    return ids.unfold(0, RECIPE["seq_len"] + 1, RECIPE["seq_len"])


def loss_of(model: Transformer, rows: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(run: dict[str, Any], text: Tensor, held_out: Tensor) -> dict[str, Any]:
    """One run, and its loss on the held-out windows."""
    torch.manual_seed(run["seed"])
    config = config_for(run["d_model"], run["n_layers"])
    model = Transformer(config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": RECIPE["weight_decay"]},
        {"params": gains, "weight_decay": 0.0},
    ]
    rate = 0.32 / run["d_model"]
    optimizer = torch.optim.AdamW(groups, rate, betas=tuple(RECIPE["betas"]), fused=True)
    batch, seq_len = RECIPE["batch"], RECIPE["seq_len"]
    steps, start = run["tokens"] // (batch * seq_len), time.process_time()
    shuffled = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    unique = shuffled[: run["unique_tokens"] // seq_len]
    again = torch.Generator().manual_seed(1)
    order = torch.arange(len(unique))
    for step in range(steps):
        at = step * batch % len(unique)
        if step and at == 0:  # another epoch, in another order
            order = torch.randperm(len(unique), generator=again)
        warm = (step + 1) / (RECIPE["warmup"] * steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        factor = RECIPE["final_factor"] + (1 - RECIPE["final_factor"]) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate * min(warm, factor)
        loss = loss_of(model, unique[order[at : at + batch]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip"])
        optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        model.eval()
        losses = [loss_of(model, rows).item() for rows in held_out.split(64)]
    return {
        **run,
        "parameters": count_parameters(config),
        "embedding_parameters": VOCABULARY * config.d_model,
        "steps": steps,
        "loss": sum(losses) / len(losses),
        "seconds": seconds,
    }


def as_runs(done: list[dict[str, Any]]) -> list[Run]:
    """The runs that the law is fitted to: each text read once, the first seed."""
    chosen = [one for one in done if one["tokens"] == one["unique_tokens"] and one["seed"] == 0]
    chosen.sort(key=lambda one: (one["parameters"], one["tokens"]))
    return [Run(one["parameters"], one["tokens"], one["loss"]) for one in chosen]


def prediction(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The law, and what it says of the held-out run."""
    runs = as_runs(done)
    law = fit_law(runs)
    laws = bootstrap_laws(runs, law, samples=300)
    n_parameters = count_parameters(config_for(HELD_OUT["d_model"], HELD_OUT["n_layers"]))
    predicted = predict(runs, law, laws, n_parameters, HELD_OUT["tokens"])
    return {
        **asdict(predicted),
        "level": 0.95,
        "parameters": n_parameters,
        "tokens": HELD_OUT["tokens"],
        "law": asdict(law),
        "laws": [[round(value, 6) for value in asdict(one).values()] for one in laws],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def so_far() -> dict[str, Any]:
    """What is done, or an empty result."""
    result: dict[str, Any] = {"recipe": RECIPE, "runs": []}
    with suppress(DataError):
        result = load_result(PROGRESS)["result"]
    if result["recipe"] != RECIPE:
        raise SystemExit("the file has another recipe; pass --fresh to begin again")
    return result


def is_done(run: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the file has this run."""
    return any(run.items() <= one.items() for one in result["runs"])


def main() -> None:
    """Do what is left to do, save after each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result at the end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing longer")
    parser.add_argument("--fresh", action="store_true", help="forget what is there")
    parser.add_argument("--reverse", action="store_true", help="long runs first: a second process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.perf_counter() + 60 * arguments.minutes
    if arguments.fresh:
        save_result(PROGRESS, {"recipe": RECIPE, "runs": []}, COMMAND)
    text, held_out = windows("train"), windows("validation")
    picked = torch.linspace(0, len(held_out) - 1, RECIPE["validation_windows"]).long()
    held_out = held_out[picked]
    for run in sorted(plan(), key=seconds_for, reverse=arguments.reverse):
        if is_done(run, so_far()):
            continue
        if time.perf_counter() + 1.5 * seconds_for(run) > end:
            raise SystemExit("stopped in time; call again to go on")
        one = train(run, text, held_out)
        result = so_far()  # another process may have added to it
        if not is_done(run, result):
            result["runs"].append(one)
            save_result(PROGRESS, result, COMMAND)
        print({k: round(v, 4) for k, v in one.items()}, flush=True)
    result = so_far()
    if "prediction" not in result:
        result["prediction"] = prediction(result["runs"])
        save_result(PROGRESS, result, COMMAND)  # on disk before the run that it is about
        print({k: v for k, v in result["prediction"].items() if k != "laws"}, flush=True)
    if "held_out" not in result:
        run = {**HELD_OUT, "unique_tokens": HELD_OUT["tokens"], "seed": 0}
        if time.perf_counter() + 1.3 * seconds_for(run) > end:
            raise SystemExit("stopped in time; call again for the held-out run")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        result["held_out"] = {"started": started, **train(run, text, held_out)}
        save_result(PROGRESS, result, COMMAND)
        print(result["held_out"], flush=True)
    told, seen = result["prediction"], result["held_out"]
    result["verdict"] = {
        "inside": told["low"] <= seen["loss"] <= told["high"],
        "relative_error": seen["loss"] / told["loss"] - 1,
    }
    path = save_result(NAME, result, COMMAND)
    path.with_name(f"{PROGRESS}.json").unlink()
    print(result["verdict"], flush=True)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
