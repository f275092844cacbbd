"""`minilm quantize MODEL`: fewer bits for each weight, in a folder that the other commands open."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minilm.errors import ConfigError, DataError

__all__ = ["quantize"]


def quantize(
    model: tyro.conf.Positional[str],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    scheme: Literal["int8", "int4", "int4-gptq"] = "int8",
    group: int | None = None,
    symmetric: bool = False,
    rows: int = 64,
    seed: int = 0,
) -> int:
    """Write a model with int8 or int4 weights; vectors of ids and the head become int8.

    Args:
        model: book, smollm2-135m, a folder made by minilm train, or a .gguf file.
        out: A new folder.
        scheme: int8 has a scale for each row; int4 has one for each group, and is rounded to the
            nearest or, as int4-gptq, with the training plays at hand.
        group: Weights that share a scale, with int4: a multiple of 32 that divides every width.
        symmetric: With int4: no least number for each group, which saves its two bytes.
        rows: Of 256 tokens each, that int4-gptq reads.
        seed: Of the choice of these rows.
    """
    from minilm import load
    from minilm.corpus import load_shakespeare
    from minilm.quantization import SCHEMES, calibration_ids, quantize_model, save_quantized

    chosen = SCHEMES[scheme]
    if scheme == "int8" and (group is not None or symmetric):
        raise ConfigError("int8 has a scale for each row; leave out --group and --symmetric")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and not empty; name a new folder")
    if scheme != "int8":
        grid = replace(chosen.linear, group=32 if group is None else group, symmetric=symmetric)
        chosen = replace(chosen, linear=grid)
    network = load(model)
    calibration = None
    if chosen.gptq:
        texts = [play.text for play in load_shakespeare("train")]
        calibration = calibration_ids(network, texts, rows, seed=seed)
    save_quantized(out, quantize_model(network, chosen, calibration))
    before = sum(tensor.nbytes for tensor in network.state_dict().values())
    after = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {after / 1e6:.1f} MB ({before / 1e6:.1f} MB of weights before)")
    return 0
