"""Models and runs on disk, in the order chapter 10 explains them.

A folder is written under another name and takes its own when it is complete, so that there is no
moment at which a crash, a full disk or `kill -9` could leave half of one. Nothing is a pickle:
tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from minilm.assets import REMOTE, file_sha256
from minilm.data import load_tokenizer, save_tokenizer
from minilm.errors import ConfigError, DataError
from minilm.files import whole_folder
from minilm.model import ModelConfig, Transformer
from minilm.pretrained import load_pretrained, read_json

__all__ = [
    "checkpoint_damage",
    "join_state",
    "latest_checkpoint",
    "load",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "random_state",
    "restore_random_state",
    "save_checkpoint",
    "save_model",
    "split_state",
    "step_folder",
]

AnyPath = str | os.PathLike[str]
MANIFEST = "manifest.json"
FORMAT = "minilm checkpoint 1"
STEP_NAME = re.compile(r"step-(\d+)")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for its owner alone


# A model


def save_model(folder: AnyPath, model: Transformer) -> None:
    """Write config.json, model.safetensors and, if the model has one, tokenizer.json.

    Args:
        folder: A new one, or one that this function wrote, which is replaced.
        model: Any `Transformer`.

    Raises:
        ConfigError: If the tokenizer is of a kind that has no file.
        DataError: If the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    ours = {"config.json", "model.safetensors", "tokenizer.json"}
    others = {path.name for path in folder.iterdir()} - ours if folder.is_dir() else set()
    if others:
        raise DataError(f"{folder} holds {min(others)}, which is no model's; name a new folder")
    with whole_folder(folder) as part:
        _write_model(part, model)


def _write_model(folder: Path, model: Transformer) -> None:
    _write_json(folder / "config.json", asdict(model.config))
    _write_tensors(folder / "model.safetensors", model.state_dict())
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        save_tokenizer(folder / "tokenizer.json", tokenizer)


def load_model(folder: AnyPath) -> Transformer:
    """Build the model that `save_model` or `save_checkpoint` wrote.

    Returns:
        The model, with its tokenizer if it had one, in eval mode.

    Raises:
        DataError: If a file is missing or damaged.
    """
    folder = Path(folder)
    content = read_json(folder / "config.json")
    if "quantization" in content:
        raise DataError(f"{folder} holds a quantized model; open it with minilm.load")
    try:
        config = ModelConfig(**content)
    except TypeError as error:
        raise DataError(f"{folder / 'config.json'} is no model's config: {error}") from error
    tokenizer = folder / "tokenizer.json"
    model = Transformer(config, load_tokenizer(tokenizer) if tokenizer.exists() else None)
    load_weights(folder, model)
    return model.eval()


def load_weights(folder: AnyPath, model: nn.Module) -> None:
    """Fill a model that is there already with the weights of a saved one, in their dtype.

    Raises:
        ConfigError: If the two do not have the same parameters.
        DataError: If the file is missing or damaged.
    """
    path = Path(folder) / "model.safetensors"
    tensors = _read_tensors(path)
    model.to(next(iter(tensors.values())).dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()
        raise ConfigError(f"{path} holds another model: {difference}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); take another copy") from error


def load(source: AnyPath) -> Transformer:
    """Load any model by its name or its folder; also there as `minilm.load`.

    Args:
        source: "book", the model that chapter 10 trains; a folder by `save_model`, a checkpoint, or
            the folder of a run of `minilm train`; or what `load_pretrained` knows, such as
            "smollm2-135m".

    Returns:
        The model in eval mode.

    Raises:
        DataError: If there is no such model, or its files are damaged.
    """
    book = Path(str(files("minilm.assets"))) / "book"
    path = book if source == "book" else Path(source)
    for folder in (path / "model", path):
        config = folder / "config.json"
        if config.exists() and "model_type" not in read_json(config):  # which is Hugging Face's
            return load_model(folder)
    if str(source) not in REMOTE and not path.suffix and not path.exists():
        raise DataError(
            f"no model {str(source)!r}; wanted book, {', '.join(REMOTE)}, a .gguf file, or a "
            "folder with config.json and model.safetensors"
        )
    return load_pretrained(source)


# A run


def step_folder(folder: AnyPath, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return Path(folder) / f"step-{step:08d}"


def save_checkpoint(
    folder: AnyPath,
    step: int,
    model: Transformer,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
    best: int | None = None,
) -> Path:
    """Write all that a run needs to go on, then remove checkpoints that are no longer needed.

    Args:
        folder: Of the run; made if it is not there.
        step: Names the checkpoint.
        model: Saved as by `save_model`, so that a checkpoint is a model, too.
        optimizer: Its `state_dict` is saved.
        state: Anything else, as JSON can hold it.
        keep: So many of the newest checkpoints stay.
        best: The step of one more that stays.

    Returns:
        The checkpoint: `folder/step-00000100`.

    Raises:
        DataError: If it cannot be written. All earlier ones are then still there.
    """
    path = step_folder(folder, step)
    with whole_folder(path) as part:
        _write_model(part, model)
        tensors, settings = split_state(optimizer.state_dict())
        _write_tensors(part / "optimizer.safetensors", tensors)
        content = {"state": dict(state), "optimizer": settings, "random": random_state()}
        _write_json(part / "state.json", content)
        sums = {file.name: file_sha256(file) for file in sorted(part.iterdir())}
        _write_json(part / MANIFEST, {"format": FORMAT, "step": step, "sha256": sums})
    _remove_old(path.parent, step, keep, best)
    return path


def _remove_old(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Keep the newest checkpoints up to `step`, and the best one."""
    finished = [path for path in _checkpoints(folder) if _step(path) <= step]
    for path in finished[keep:]:
        if _step(path) != best:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step-*.part"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """All folders that are named like checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest_checkpoint(folder: AnyPath) -> Path | None:
    """Find the newest checkpoint that is complete; warn of newer ones that are damaged.

    Returns:
        Its folder; None if there is none.
    """
    for path in _checkpoints(Path(folder)):
        damage = checkpoint_damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is skipped: {damage}", stacklevel=2)
    return None


def checkpoint_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, wanted {FORMAT!r}"
        for name, wanted in manifest["sha256"].items():
            if file_sha256(path / name) != wanted:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def load_checkpoint(path: AnyPath, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put a model, its optimizer and the random number generators where a checkpoint has them.

    Args:
        path: What `save_checkpoint` returned or `latest_checkpoint` found.
        model: Of the same config; on any device.
        optimizer: Over this model's parameters, of the same kind.

    Returns:
        The `state` that was saved.

    Raises:
        DataError: If the checkpoint is damaged; nothing has then been changed.
        ConfigError: If it is of another model or optimizer.
    """
    path = Path(path)
    damage = checkpoint_damage(path)
    if damage is not None:
        raise DataError(f"{path} cannot be used: {damage}; latest_checkpoint finds one that can")
    content = read_json(path / "state.json")
    load_weights(path, model)
    tensors = _read_tensors(path / "optimizer.safetensors")
    try:
        optimizer.load_state_dict(join_state(tensors, content["optimizer"]))
    except ValueError as error:
        raise ConfigError(f"{path} holds another optimizer's state: {error}") from error
    restore_random_state(content["random"])
    return dict(content["state"])


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the `state_dict` of an optimizer into tensors by name, and what JSON can hold.

    Example:
        >>> state = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
        >>> split_state(state)
        ({'0.step': tensor(3.)}, {'param_groups': [{'lr': 0.1}]})
    """
    tensors = {
        f"{number}.{name}": tensor
        for number, buffers in state["state"].items()
        for name, tensor in buffers.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def join_state(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `split_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, **settings}


def random_state() -> dict[str, Any]:
    """Where the random number generators of PyTorch, NumPy and Python stand, for JSON."""
    _, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "numpy": [np.asarray(keys).tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo what has been drawn since `random_state`."""
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
