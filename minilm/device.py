"""Where to compute: a CUDA GPU when there is one, else the CPU."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["default_device"]


def default_device() -> "torch.device":
    """A CUDA GPU when PyTorch sees one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
