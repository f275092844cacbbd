"""The longer runs of chapter 09: small Transformers on the bytes of the plays.

    python benchmarks/optimizers.py sweep          each optimizer at four learning rates
    python benchmarks/optimizers.py widths         learning rates at two widths, three rules
    python benchmarks/optimizers.py overfitting    2 kB of text again and again, and remedies
    python benchmarks/optimizers.py batches        steps to one loss at six batch sizes

Each writes minilm/assets/results/optimizers_<part>.json. Together they take about 2 minutes of one
core. Training and validation plays only.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.corpus import load_shakespeare
from minilm.model import Transformer, llama_config, next_token_loss
from minilm.optim import (
    SGD,
    AdamW,
    MuonAdamW,
    clip_gradients,
    constant,
    linear,
    matrices_and_others,
    parameter_groups,
    set_learning_rate,
)
from minilm.results import save_result

BEGIN, SEQ = 256, 64
Optimizer = torch.optim.Optimizer


def text(split: str) -> Tensor:
    """The plays of a split as bytes, a begin token before each."""
    return torch.tensor([i for play in load_shakespeare(split) for i in (BEGIN, *play.data)])


def windows(ids: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random places in the text: what is read, and what comes next at each position."""
    starts = torch.randint(len(ids) - SEQ, (batch,), generator=generator)
    rows = ids[starts[:, None] + torch.arange(SEQ + 1)]
    return rows[:, :-1], rows[:, 1:]


def build(width: int = 48, seed: int = 0, **choices: Any) -> Transformer:
    """Two layers in Llama's manner over bytes."""
    torch.manual_seed(seed)
    config = llama_config(257, SEQ, width, n_layers=2, n_heads=4, norm="layer", **choices)
    return Transformer(config)


def fit(
    model: nn.Module,
    ids: Tensor,
    optimizer: Optimizer,
    steps: int,
    batch: int = 4,
    schedule: Callable[..., float] = linear,
    warmup: int = 20,
    clip: float = 1.0,
    watch: Callable[[int], None] = lambda step: None,
    change: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> list[float]:
    """Train; return the loss of each step, in nats per byte."""
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        set_learning_rate(optimizer, schedule(step, steps, warmup))
        inputs, targets = windows(ids, batch, generator)
        loss = next_token_loss(model(change(inputs)), targets)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        watch(step + 1)
    return losses


def rounded(losses: list[float]) -> list[float]:
    """Four decimals; a run that blew up is cut at its first loss that is no number."""
    ends = next((i for i, loss in enumerate(losses) if not loss < 1e3), len(losses))
    return [round(loss, 4) for loss in losses[:ends]]


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> float:
    """Mean loss on fixed windows."""
    model.eval()
    loss = next_token_loss(model(rows[0]), rows[1]).item()
    model.train()
    return loss


# Each optimizer at its own best learning rate

SWEEP: dict[str, tuple[Callable[[nn.Module, float], Optimizer], list[float]]] = {
    "SGD": (
        lambda model, lr: SGD(parameter_groups(model, 0.0), lr),
        [0.1, 0.3, 1.0, 3.0],
    ),
    "momentum": (
        lambda model, lr: SGD(parameter_groups(model, 0.0), lr, momentum=0.9),
        [0.03, 0.1, 0.3, 1.0],
    ),
    "AdamW": (
        lambda model, lr: AdamW(parameter_groups(model, 0.1), lr, betas=(0.9, 0.95)),
        [1e-3, 3e-3, 1e-2, 3e-2],
    ),
    "Muon": (
        lambda model, lr: MuonAdamW(*matrices_and_others(model), lr=lr, dtype=torch.float32),
        [3e-3, 1e-2, 3e-2, 1e-1],
    ),
}


def sweep(steps: int = 100, batch: int = 16) -> dict[str, Any]:
    """Loss curves of every optimizer and learning rate, on the same batches, and time per step."""
    ids, runs, times = text("train"), {}, {}
    for name, (make, rates) in SWEEP.items():
        runs[name] = {}
        for lr in rates:
            model = build()
            started = time.perf_counter()
            runs[name][str(lr)] = rounded(fit(model, ids, make(model, lr), steps, batch))
            times.setdefault(name, []).append(1000 * (time.perf_counter() - started) / steps)
            print(f"{name:9} {lr:7}: {np.mean(runs[name][str(lr)][-10:]):.3f}", flush=True)
    fastest = {name: round(min(of), 2) for name, of in times.items()}
    return {"steps": steps, "batch": batch, "runs": runs, "ms_per_step": fastest}


# What transfers between widths

WIDTHS, BASE = (16, 64), 16
RATES = [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]


def by_rule(rule: str, model: Transformer, lr: float) -> Optimizer:
    """An optimizer whose rate for the matrices depends on the width in one of three ways."""
    matrices, others = matrices_and_others(model)
    if rule == "Muon":
        return MuonAdamW(
            matrices,
            others,
            lr,
            adamw_lr=8e-3,
            scale="original",
            weight_decay=0,
            dtype=torch.float32,
        )
    shrink = BASE / model.config.d_model if rule == "AdamW, rate / width" else 1.0
    head = [p for p in others if p is model.lm_head.weight]
    rest = [p for p in others if p is not model.lm_head.weight]
    groups = [{"params": [*matrices, *head], "lr": lr * shrink}, {"params": rest, "lr": lr}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0)


def widths(steps: int = 60) -> dict[str, Any]:
    """The loss of the last 20 steps for each rule, width and learning rate."""
    ids = text("train")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rule in ("AdamW", "AdamW, rate / width", "Muon"):
        for width in WIDTHS:
            row = found.setdefault(rule, {}).setdefault(str(width), {})
            for lr in RATES:
                if rule == "AdamW, rate / width" and width == BASE:
                    row[str(lr)] = found["AdamW"][str(width)][str(lr)]
                    continue
                model = build(width, init_std=0.5 * width**-0.5)
                rate = 4 * lr if rule == "Muon" else lr
                losses = fit(model, ids, by_rule(rule, model, rate), steps)
                row[str(rate)] = round(float(np.mean(losses[-20:])), 4)
            best = min(row, key=row.__getitem__)
            print(f"{rule:20} {width:4}: best {best}, loss {row[best]:.3f}  {row}", flush=True)
    return {"steps": steps, "base_width": BASE, "losses": found}


# Overfitting, and what helps

RATE, PART = 1e-2, 2_000  # bytes of the training plays


class L1(AdamW):
    """AdamW with the sign of each weight in its gradient: the gradient of the sum of absolutes."""

    def adapt(self, group: dict[str, Any], params: list[Tensor], grads: Any) -> None:
        """Add the sign, then adapt."""
        signs = torch._foreach_sign(params)
        super().adapt(group, params, torch._foreach_add(grads, signs, alpha=group["strength"]))


def overfitting(steps: int = 250, batch: int = 4) -> dict[str, Any]:
    """Training and validation loss along the way for each remedy at two strengths."""
    everything, held_out = text("train"), text("validation")
    generator = torch.Generator().manual_seed(1)
    rows = windows(held_out, 64, generator)
    middle = len(everything) // 2
    part = everything[middle : middle + PART]
    noise = torch.Generator().manual_seed(2)

    def augmented(share: float) -> Callable[[Tensor], Tensor]:
        def change(inputs: Tensor) -> Tensor:
            hit = torch.rand(inputs.shape, generator=noise) < share
            return torch.where(hit, torch.randint(256, inputs.shape, generator=noise), inputs)

        return change

    settings: dict[str, dict[str, Any]] = {
        "nothing": {},
        "L1 3e-5": {"l1": 3e-5},
        "decay 1": {"decay": 1.0},
        "dropout 0.1": {"dropout": 0.1},
        "dropout 0.3": {"dropout": 0.3},
        "augmentation 0.3": {"augment": 0.3},
        "10x the text": {"ids": everything[middle : middle + 10 * PART]},
        "below one epoch: nothing": {"ids": everything},
        "below one epoch: decay 1": {"ids": everything, "decay": 1.0},
        "below one epoch: dropout 0.1": {"ids": everything, "dropout": 0.1},
    }
    runs = {}
    for name, how in settings.items():
        model = build(dropout=how.get("dropout", 0.0))
        groups = parameter_groups(model, how.get("decay", 0.0))
        optimizer: Optimizer = AdamW(groups, RATE, betas=(0.9, 0.95))
        if "l1" in how:
            optimizer = L1(groups, RATE, betas=(0.9, 0.95))
            for group in optimizer.param_groups:
                group["strength"] = how["l1"]
        looks: list[tuple[int, float]] = []

        def watch(step: int, model: nn.Module = model, looks: list[Any] = looks) -> None:
            if step % 25 == 0:
                looks.append((step, round(held_out_loss(model, rows), 4)))

        change = augmented(how["augment"]) if "augment" in how else lambda inputs: inputs
        ids = how.get("ids", part)
        losses = fit(model, ids, optimizer, steps, batch, constant, watch=watch, change=change)
        runs[name] = {"train": rounded(losses), "validation": looks}
        best = min(loss for _, loss in looks)
        print(
            f"{name:34} train {np.mean(losses[-20:]):.3f}, best {best:.3f}, "
            f"last {looks[-1][1]:.3f}",
            flush=True,
        )
    tokens = {"part": PART, "everything": len(everything)}
    return {"steps": steps, "batch": batch, "tokens": tokens, "runs": runs}


# Steps and tokens to one loss at different batch sizes

BATCHES, TARGET = (1, 2, 4, 8, 16, 32), 2.7


def batches(limit: int = 600) -> dict[str, Any]:
    """Fewest steps until the validation loss is at the target, over three learning rates."""
    ids, held_out = text("train"), text("validation")
    rows = windows(held_out, 32, torch.Generator().manual_seed(1))
    found: dict[str, dict[str, int | None]] = {}
    for batch in BATCHES:
        row = found.setdefault(str(batch), {})
        for lr in (8e-3, 1.6e-2):
            model = build(32)
            optimizer = AdamW(parameter_groups(model, 0.1), lr, betas=(0.9, 0.95))
            most = min(limit, min((n for n in row.values() if n), default=limit))
            row[str(lr)] = steps_to(model, ids, optimizer, rows, batch, most)
        print(batch, row, flush=True)
    return {"target": TARGET, "steps": found, "seq": SEQ}


def steps_to(
    model: nn.Module,
    ids: Tensor,
    optimizer: Optimizer,
    rows: tuple[Tensor, Tensor],
    batch: int,
    limit: int,
) -> int | None:
    """Steps at a constant rate until two looks in a row are at or below the target."""
    generator, before = torch.Generator().manual_seed(0), float("inf")
    for step in range(limit):
        set_learning_rate(optimizer, min(1.0, (step + 1) / 20))
        inputs, targets = windows(ids, batch, generator)
        optimizer.zero_grad()
        next_token_loss(model(inputs), targets).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            loss = held_out_loss(model, rows)
            if max(loss, before) <= TARGET:
                return step + 1
            before = loss
    return None


PARTS = {"sweep": sweep, "widths": widths, "overfitting": overfitting, "batches": batches}


def main() -> None:
    """Run one part and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    part = parser.parse_args().part
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = PARTS[part]()
    path = save_result(f"optimizers_{part}", result, f"python benchmarks/optimizers.py {part}")
    print(f"wrote {path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
