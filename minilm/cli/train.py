"""`minilm train`: a run in a folder, with its progress on the screen."""

import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from minilm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from minilm.training import Strategy, TrainConfig

__all__ = ["train"]


def train(
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    folder: Path,
    preset: str = "tiny",
    config: Path | None = None,
    resume: bool = False,
) -> int:
    """Train a model: metrics, samples, checkpoints and the model itself go to a folder.

    A run that was stopped, however hard, goes on with --resume and ends with the same weights.
    On several processes: torchrun --nproc-per-node 2 -m minilm train --folder FOLDER

    Args:
        overrides: Settings that differ, such as steps=500 optimizer.lr=1e-3 model.n_layers=4.
        folder: Of the run: metrics.jsonl, train.json, checkpoints, tensorboard/ and model/.
        preset: Where the settings come from: tiny (seconds), speedrun, or book.
        config: A JSON file with settings that differ from the preset's, such as a run's train.json.
        resume: Go on with the run in the folder, from its last checkpoint.
    """
    from minilm import training
    from minilm.distributed.launch import strategy_from_environment

    with warnings.catch_warnings(), strategy_from_environment() as strategy:
        settings = _settings(preset, config, overrides)
        if strategy.rank == 0:
            _train_and_tell(settings, folder, strategy, resume)
        else:
            warnings.simplefilter("ignore")  # what process 0 says for all
            training.train(settings, folder, strategy, resume)
    return 0


def _train_and_tell(
    settings: "TrainConfig", folder: Path, strategy: "Strategy", resume: bool
) -> None:
    """What process 0 does: train, show it, and write the model."""
    from minilm import training
    from minilm.checkpoint import save_model

    with _Screen(settings, folder) as screen:
        warnings.showwarning = _show_warning
        try:
            result = training.train(settings, folder, strategy, resume, callbacks=[screen])
        except KeyboardInterrupt:
            print(f"minilm: stopped; --resume goes on from {folder}'s last checkpoint")
            raise
    save_model(folder / "model", result.model)
    best = "" if result.best is None else f", validation loss {result.best:.4f}"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s{best}; the model is in {folder / 'model'}"
    )


def _settings(preset: str, file: Path | None, overrides: Iterable[str]) -> "TrainConfig":
    """A preset, changed by a file, changed by `name=value` in the order given."""
    from minilm.training import PRESETS, TrainConfig

    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; use one of {', '.join(PRESETS)}")
    content: dict[str, Any] = json.loads(PRESETS[preset].to_json())
    if file is not None:
        try:
            _merge(content, json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as JSON: {error}") from error
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} says no value; write it as steps=500")
        change: Any = _value(value)
        for part in reversed(name.split(".")):
            change = {part: change}
        _merge(content, change)
    return TrainConfig.from_json(json.dumps(content))


def _value(text: str) -> Any:
    """What JSON would read, else the text itself."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def _merge(content: dict[str, Any], change: Any) -> None:
    """Put the settings of one object into another, level by level."""
    if not isinstance(change, Mapping):
        raise ConfigError(f"a config is an object with the settings' names, not {change!r}")
    for name, value in change.items():
        if isinstance(value, Mapping) and isinstance(content.get(name), dict):
            _merge(content[name], value)
        else:
            content[name] = value


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """One sentence, without the line of code that it comes from."""
    print(f"minilm: {message}", file=sys.stderr, flush=True)


class _Screen:
    """Shows the records of a run: a bar on a terminal, lines elsewhere; TensorBoard if it is there.

    Args:
        config: Of the run.
        folder: Where TensorBoard's files go.
    """

    def __init__(self, config: "TrainConfig", folder: Path) -> None:
        from tqdm import tqdm

        self.folder = folder / "tensorboard"
        self.bar = tqdm(total=config.steps, unit="step", disable=None, dynamic_ncols=True)
        self.writer: SummaryWriter | None = None

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def __call__(self, record: dict[str, Any]) -> None:
        self._tensorboard(record)
        step, sample = record["step"], record.get("sample")
        words = f"step {step:>6}  " + "  ".join(
            f"{name.replace('_', ' ')} {_number(value)}"
            for name, value in record.items()
            if name not in ("step", "sample", "seconds", "tokens")
        )
        if self.bar.disable:
            print(words, flush=True)
        elif "loss" in record:
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.bar.write(words)
        if sample:  # of a model that knows nothing yet: any control character
            signs = (c if c.isprintable() or c == "\n" else "\ufffd" for c in sample)
            self.bar.write("    " + "".join(signs).replace("\n", "\n    "))

    def _tensorboard(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(self.folder, purge_step=record["step"])
        for name, value in record.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, record["step"])
            elif name != "step" and value is not None:
                self.writer.add_scalar(name, value, record["step"])


def _number(value: float | int | None) -> str:
    return "?" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
