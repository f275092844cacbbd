"""What each part of a Transformer is for: eight short runs of chapter 06, one part changed in each.

    python benchmarks/transformer_parts.py

Writes minilm/assets/results/transformer_parts.json: the loss of each step of each run, in nats per
byte. Takes 15 seconds of one core. The model has two blocks of width 64 and reads bytes; all runs
see the same windows. The chapter shows the changed parts, makes the first steps of each run again
and compares.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilm.corpus import load_shakespeare
from minilm.model import Block, ModelConfig, Transformer, llama_config
from minilm.results import save_result

BEGIN = 256
STEPS, BATCH, SEQ, LEARNING_RATE = 100, 4, 64, 8e-3


class PostNorm(Block):
    """A norm of the sum, as in the first Transformer."""

    def forward(self, x: Tensor, positions: Any = None, kv: Any = None) -> Tensor:
        """Add, then norm."""
        x = self.attn_norm(x + self.self_attn(x, positions, kv))
        return self.mlp_norm(x + self.mlp(x))


class NoResidual(Block):
    """Each layer replaces the stream."""

    def forward(self, x: Tensor, positions: Any = None, kv: Any = None) -> Tensor:
        """One layer after another."""
        return self.mlp(self.mlp_norm(self.self_attn(self.attn_norm(x), positions, kv)))


class Nothing(nn.Module):
    """Adds zero to the stream."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def become(kind: type[Block]) -> Callable[[Transformer], Any]:
    """Turn every block into another kind."""
    return lambda model: [setattr(layer, "__class__", kind) for layer in model.layers]


def put(name: str, part: type[nn.Module]) -> Callable[[Transformer], Any]:
    """Put another part into every block."""
    return lambda model: [setattr(layer, name, part()) for layer in model.layers]


def trials() -> dict[str, tuple[ModelConfig, int, Callable[[Transformer], Any]]]:
    """For each run its config, the seed of its weights, and what is changed in the model."""
    base = llama_config(
        257, SEQ, 64, n_layers=2, n_heads=4, norm="layer", tie_embeddings=True, init_std=0.07
    )

    def full(model: Transformer) -> None:
        """Change nothing."""

    return {
        "full model": (base, 0, full),
        "full, other numbers": (base, 1, full),
        "no attention": (base, 0, put("self_attn", Nothing)),
        "no positions": (replace(base, positions="none"), 0, full),
        "no feed-forward": (base, 0, put("mlp", Nothing)),
        "no residuals": (base, 0, become(NoResidual)),
        "post-norm": (base, 0, become(PostNorm)),
        "RMS norm": (replace(base, norm="rms"), 0, full),
    }


def fit(model: nn.Module, ids: Tensor) -> list[float]:
    """AdamW; the rate grows for 30 steps and falls to zero at the end. Each step's loss."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 30, 1 - step / STEPS)
        starts = torch.randint(len(ids) - SEQ, (BATCH,), generator=generator)
        rows = ids[starts[:, None] + torch.arange(SEQ + 1)]
        rows[:, 0] = ids[0]  # every window starts as a text does: with the begin token
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Run all and save."""
    torch.set_num_threads(1)
    ids = torch.tensor([i for play in load_shakespeare("train") for i in (BEGIN, *play.data)])
    losses = {}
    for name, (config, seed, change) in trials().items():
        torch.manual_seed(seed)
        model = Transformer(config)
        change(model)
        losses[name] = [round(loss, 4) for loss in fit(model, ids)]
        print(f"{name:20} {sum(losses[name][-20:]) / 20:.3f} nats per byte", flush=True)
    result = {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "losses": losses}
    command = "python benchmarks/transformer_parts.py"
    print("wrote", save_result("transformer_parts", result, command).name)


if __name__ == "__main__":
    main()
