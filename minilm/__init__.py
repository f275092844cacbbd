"""The package that the book builds, chapter by chapter. Nothing happens at import."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilm.model import Transformer

__version__ = "0.1.0"


def load(source: str | os.PathLike[str]) -> "Transformer":
    """Load any model by its name or its folder: `minilm.checkpoint.load`, and quantized ones.

    Args:
        source: "book", "smollm2-135m", a .gguf file, or the folder of a model, a run or a quantized
            model.
    """
    from minilm import checkpoint, quantization

    if quantization.is_quantized(source):
        return quantization.load_quantized(source)
    return checkpoint.load(source)
