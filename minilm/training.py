"""Training, in the order chapter 10 explains it.

A `TrainConfig` says all that makes a run; `train` is the loop, and calls one small function for
each thing that happens in it. How many processes take part, and how they exchange gradients, is a
`Strategy`'s business: one process is `SingleProcess`.

A run that was stopped at any moment goes on from its last checkpoint and ends with the same
weights, bit for bit. What a step draws at random depends on the seed, the number of the step and
the rank alone; batches depend on the position of the sampler; all else is in `Progress`.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.checkpoint import checkpoint

from minilm.attention import Attention
from minilm.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    step_folder,
)
from minilm.corpus import load_shakespeare
from minilm.data import (
    BatchSampler,
    Tokens,
    TokenStore,
    begin_id,
    load_tokenizer,
    load_tokens,
)
from minilm.device import default_device
from minilm.errors import ConfigError, DataError
from minilm.files import write_atomically
from minilm.measure import ByteTokenizer, Tokenizer
from minilm.model import IGNORED, ModelConfig, Transformer, generate, llama_config, next_token_loss
from minilm.optim import OptimizerConfig, build_optimizer, clip_gradients, set_learning_rate
from minilm.pretrained import read_json
from minilm.tokenizer import train_bpe

__all__ = [
    "PRESETS",
    "Prefetcher",
    "Progress",
    "Run",
    "SingleProcess",
    "Strategy",
    "TrainConfig",
    "TrainResult",
    "Validation",
    "accumulate_gradients",
    "adjust_loss_scale",
    "compiled",
    "count_step",
    "evaluate_loss",
    "finish",
    "go_on",
    "hand_over_gradients",
    "hand_over_weights",
    "is_over",
    "look",
    "low_precision_copy",
    "own_randomness",
    "recomputed",
    "record",
    "save",
    "set_up",
    "train",
]

AnyPath = str | os.PathLike[str]
Record = dict[str, Any]  # one line of metrics.jsonl
Batch = tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]
METRICS = "metrics.jsonl"
MOST_SKIPPED = 10  # steps in a row without a finite gradient, before a run gives up
FIRST_SCALE, STEPS_UNTIL_DOUBLED = 2.0**16, 1000  # of the loss in float16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The description of a run


@dataclass(frozen=True)
class TrainConfig:
    """All that makes a run: two runs of one config on one machine end with the same weights.

    Attributes:
        model: What to train. Its `vocab_size` must fit the tokenizer.
        optimizer: How to step, and the schedule of the learning rate.
        steps: Optimizer steps.
        batch_size: Rows in a step, over all processes.
        seq_len: Targets in a row.
        data: "shakespeare" (its training plays), or a folder by `minilm data build`.
        validation: "shakespeare" (its validation plays), or another such folder.
        tokenizer: "bytes", "bpe-1024" (so many ids, trained on the training plays), or the path of
            a tokenizer.json, such as that of a `data` folder.
        micro_batch: Rows that one process computes at once; None: all it has.
        precision: Of matrix products. Other than float32: the loss, the norms' statistics and the
            optimizer stay in float32.
        master_weights: Where `precision` is not float32: whether the weights are kept in it, too,
            beside the float32 originals that the optimizer moves. Otherwise each product converts
            them (autocast).
        fused_attention: As `fused` of `minilm.attention.Attention`.
        activation_checkpointing: Forget what happens inside a block, compute it again in the
            backward pass.
        compile: Whether to use `torch.compile`.
        seed: Of the weights, the order of the data, and dropout.
        log_every: Steps between two records.
        eval_every: Steps between two looks at the validation text.
        eval_windows: Rows of `seq_len` targets in such a look, evenly spaced; None: all there are.
        checkpoint_every: Steps between two checkpoints.
        patience: Stop after so many looks in a row without a new best; the result is then the best
            model. None: never stop early; the result is the last model.
        sample_tokens: Length of a sample at each look; 0: none.

    Raises:
        ConfigError: If the numbers do not fit each other.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    steps: int
    batch_size: int
    seq_len: int
    data: str = "shakespeare"
    validation: str = "shakespeare"
    tokenizer: str = "bytes"
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    master_weights: bool = False
    fused_attention: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_windows: int | None = 128
    checkpoint_every: int = 100
    patience: int | None = None
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "seq_len", "micro_batch", "log_every", "eval_every")
        for name in (*counts, "eval_windows", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; use at least 1")
        if self.precision not in DTYPES:
            raise ConfigError(f"precision={self.precision!r}; use one of {', '.join(DTYPES)}")
        if self.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"seq_len={self.seq_len}, but the model has max_seq_len={self.model.max_seq_len}; "
                "use a shorter seq_len or a larger max_seq_len"
            )
        if self.master_weights and self.precision == "float32":
            raise ConfigError("master_weights with precision=float32; use bfloat16 or float16")
        if self.optimizer.warmup >= self.steps:
            raise ConfigError(
                f"warmup={self.optimizer.warmup} of {self.steps} steps; use a shorter warm-up"
            )
        if self.seed < 0 or self.sample_tokens < 0:
            raise ConfigError(
                f"seed={self.seed}, sample_tokens={self.sample_tokens}; use 0 or more"
            )

    def to_json(self) -> str:
        """Write the config; `from_json` reads it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read a config. Settings that have a default may be left out.

        Raises:
            ConfigError: If the text is no JSON, a name is unknown or a value of the wrong type.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the config is no JSON: {error}") from error
        return _from_dict(cls, content, "config")  # type: ignore[no-any-return]


def _from_dict(cls: Any, content: Any, where: str) -> Any:
    """Build a dataclass, and the dataclasses in it, from what JSON holds."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is {content!r}, wanted an object with the settings' names")
    hints, values = get_type_hints(cls), {}
    for name, value in content.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1, cutoff=0) or sorted(hints)
            raise ConfigError(f"{where} has no setting {name!r}; did you mean {near[0]!r}?")
        values[name] = _converted(hints[name], value, f"{where}.{name}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{where} does not say {', '.join(missing)}; add it")
    return cls(**values)


def _converted(hint: Any, value: Any, where: str) -> Any:
    """Hold a value of a config against the type of its attribute."""
    if is_dataclass(hint):
        return _from_dict(hint, value, where)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(f"{where} is {value!r}; use one of {', '.join(get_args(hint))}")
    if get_origin(hint) is Literal or (value is None and NoneType in kinds):
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ConfigError(f"{where} is {value!r}, wanted {names}")
    return value


# One process, or many


@runtime_checkable
class Strategy(Protocol):
    """How the processes of a run work together.

    `model` is always the `Transformer` itself, whose parameters the optimizer moves.

    Attributes:
        rank: Which process this is, from 0. Process 0 writes files and speaks.
        world_size: How many processes there are.
        device: Where this one computes.
    """

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make the weights equal on all processes; return what to call in place of `model`."""

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Optimizer:
        """Build the optimizer, or this process's share of it."""

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Surround one micro-batch; only after the last of a step must gradients be exchanged."""

    def reduce_gradients(self, model: nn.Module) -> None:
        """Sum the gradients over all processes, unless the backward pass has done so."""

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
        """As `minilm.optim.clip_gradients`, with the norm over all processes' parameters."""

    def sum(self, numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sum a few numbers over all processes."""

    def barrier(self) -> None:
        """Wait until all processes are here."""


class SingleProcess:
    """The strategy of one process: nothing has to be exchanged.

    Args:
        device: Where to compute; default: a GPU where there is one.
    """

    rank, world_size = 0, 1

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = default_device() if device is None else device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Optimizer:
        """Build the whole optimizer."""
        return build_optimizer(model, config)

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Do nothing around a micro-batch."""
        return nullcontext()

    def reduce_gradients(self, model: nn.Module) -> None:
        """Leave the gradients: they are the sum."""

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
        """Clip all there is."""
        return clip_gradients(model.parameters(), max_norm)

    def sum(self, numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the numbers as they are."""
        return numbers

    def barrier(self) -> None:
        """Wait for nobody."""


# What a step is made of


class Prefetcher:
    """Prepares the next batch in a thread, while the last one is computed with.

    Args:
        sampler: Where batches come from; it runs ahead by one.
        device: Where they go.
    """

    def __init__(self, sampler: BatchSampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self.state = sampler.state_dict()
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: Future[tuple[Tensor, Tensor, dict[str, int]]] = self.pool.submit(self._prepare)

    def _prepare(self) -> tuple[Tensor, Tensor, dict[str, int]]:
        inputs, targets = self.sampler.next_batch()
        return inputs.to(self.device), targets.to(self.device), self.sampler.state_dict()

    def next_batch(self) -> Batch:
        """The batch that is ready; the one after it is begun."""
        inputs, targets, self.state = self.ahead.result()
        self.ahead = self.pool.submit(self._prepare)
        return inputs, targets

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stood after the last batch that was handed out, not the one ahead."""
        return self.state

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def own_randomness(seed: int, step: int, strategy: Strategy) -> Iterator[None]:
    """Within the block, what PyTorch draws depends on seed, step and rank alone.

    So dropout does not depend on what was drawn before the step, by whom, or in which process; and
    whoever draws after the block does not notice it.
    """
    numbers = np.random.SeedSequence([seed, step, strategy.rank])
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
        yield


def accumulate_gradients(
    module: nn.Module,
    inputs: Int[Tensor, "rows seq"],
    targets: Int[Tensor, "rows seq"],
    config: TrainConfig,
    strategy: Strategy,
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """Run forward and backward over this process's rows, one micro-batch after another.

    Each loss is a sum over tokens, divided by the tokens of the *global* batch. So gradients add up
    to those of the mean, however the rows are cut and whichever process has more of them.

    Args:
        module: What `Strategy.prepare` returned.
        inputs: This process's rows.
        targets: Of the same shape; `IGNORED` where none counts.
        config: `micro_batch`, `precision` and `master_weights` count.
        strategy: Sums over processes.
        scale: Factor of the gradients; see `adjust_loss_scale`.

    Returns:
        The mean loss of the global batch, in nats, without the factor.
    """
    n_tokens = strategy.sum((targets != IGNORED).sum().double())
    rows = config.micro_batch or len(inputs)
    starts = range(0, len(inputs), rows)
    autocast = config.precision != "float32" and not config.master_weights
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for start in starts:
        piece = slice(start, start + rows)
        with strategy.accumulate(module, last=start == starts[-1]):
            with torch.autocast(inputs.device.type, DTYPES[config.precision], enabled=autocast):
                logits = module(inputs[piece])
            loss = next_token_loss(logits, targets[piece], "sum") / n_tokens
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return strategy.sum(total)


def low_precision_copy(model: Transformer, config: TrainConfig) -> Transformer:
    """The model that runs forward and backward: itself, or a copy whose weights are shorter."""
    if not config.master_weights:
        return model
    return copy.deepcopy(model).to(DTYPES[config.precision])


def hand_over_gradients(source: nn.Module, target: nn.Module, scale: float) -> None:
    """Move the gradients of the copy to the originals, and divide by the scale of the loss."""
    if source is not target:
        for low, master in zip(source.parameters(), target.parameters(), strict=True):
            if low.grad is not None:
                master.grad, low.grad = low.grad.to(master.dtype), None
    if scale != 1:
        grads = [p.grad for p in target.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / scale)


@torch.no_grad()
def hand_over_weights(source: nn.Module, target: nn.Module) -> None:
    """Round the originals, which have moved, into the copy."""
    if source is not target:
        torch._foreach_copy_(list(target.parameters()), list(source.parameters()))


def adjust_loss_scale(progress: Progress, finite: bool) -> None:
    """Halve the scale of a float16 loss when a gradient overflows, double it after a good while.

    Small gradients would be rounded to zero in float16: below 6e-8 there is nothing. Times 65,536
    they are not, until one is too large: above 65,504 there is nothing either.

    Source:
        Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740
    """
    progress.steps_at_scale = progress.steps_at_scale + 1 if finite else 0
    if not finite:
        progress.loss_scale /= 2
    elif progress.steps_at_scale == STEPS_UNTIL_DOUBLED:
        progress.loss_scale, progress.steps_at_scale = 2 * progress.loss_scale, 0


@contextmanager
def recomputed(model: Transformer, config: TrainConfig) -> Iterator[None]:
    """Within the block, keep of each block of the model its input alone; compute the rest twice.

    Only if the config asks for it.

    Source:
        Chen et al. 2016, https://arxiv.org/abs/1604.06174
    """
    layers = list(model.layers) if config.activation_checkpointing else []
    for layer in layers:
        layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def compiled(module: nn.Module, wanted: bool, device: torch.device) -> nn.Module:
    """`torch.compile` the module; without a C++ compiler, warn and return it as it is."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if not wanted or (device.type == "cpu" and not any(shutil.which(n) for n in names if n)):
        if wanted:
            text = "no C++ compiler here: training runs without torch.compile; install g++"
            warnings.warn(text, stacklevel=2)
        return module
    return torch.compile(module)  # type: ignore[return-value]


# Looking at text that is not trained on


@dataclass(frozen=True)
class Validation:
    """The loss on fixed windows of a text.

    Attributes:
        loss: Nats for each token.
        bits_per_byte: The same for each byte of text; a quick look, where `minilm.measure.score`
            measures whole plays. NaN without a tokenizer.
        tokens: How many were looked at.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate_loss(
    model: Transformer,
    tokens: Tokens,
    seq_len: int,
    windows: int | None = None,
    batch_size: int = 16,
    strategy: Strategy | None = None,
) -> Validation:
    """Measure a model on windows that are evenly spaced, always the same.

    Args:
        model: In its own precision; dropout is off.
        tokens: The text.
        seq_len: Targets in a window.
        windows: How many; None: all that fit side by side.
        batch_size: Windows at once.
        strategy: Processes that share the windows.

    Raises:
        ConfigError: If the text does not fill one window.
    """
    strategy = SingleProcess(model.embed_tokens.weight.device) if strategy is None else strategy
    room = len(tokens) - seq_len - 1
    if room < 0:
        raise ConfigError(f"{len(tokens)} tokens do not fill a window of {seq_len} + 1; use more")
    n_windows = min(windows or len(tokens), room // seq_len + 1)
    starts = np.linspace(0, room, n_windows).astype(int)[strategy.rank :: strategy.world_size]
    widths = token_widths(model)
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    training = model.training
    model.eval()
    for first in range(0, len(starts), batch_size):
        rows = [
            tokens.read(s, s + seq_len + 1) for s in starts[first : first + batch_size].tolist()
        ]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        inputs, targets = ids[:, :-1].to(strategy.device), ids[:, 1:].to(strategy.device)
        nats = next_token_loss(model(inputs), targets, "sum")
        n_bytes = widths[targets.cpu()].sum()
        sums += torch.stack([nats.cpu().double(), torch.tensor(float(targets.numel())), n_bytes])
    model.train(training)
    nats, n_tokens, n_bytes = strategy.sum(sums.to(strategy.device)).tolist()
    return Validation(nats / n_tokens, nats / math.log(2) / n_bytes, int(n_tokens))


def token_widths(model: Transformer) -> Float[Tensor, " vocab"]:
    """The bytes of each id: none for what stands for no text."""
    widths = torch.full((model.config.vocab_size,), math.nan, dtype=torch.float64)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        widths[:] = 0
        for i in range(tokenizer.vocab_size):
            widths[i] = len(tokenizer.token_bytes(i))
        for special in (begin_id(tokenizer), *getattr(tokenizer, "special_tokens", {}).values()):
            widths[special] = 0
    return widths


# The run


@dataclass
class Progress:
    """How far a run has come: with weights, optimizer and sampler, all that a checkpoint keeps.

    Attributes:
        step: Steps done.
        tokens: Targets that the model has learned from.
        seconds: Spent on steps; looks at the validation text and checkpoints are not counted.
        losses: Of the steps since the last record.
        skipped: Steps in a row, up to now, that were not taken: their gradient was not finite.
        loss_scale: Factor of the loss; 1 but for float16.
        steps_at_scale: Steps since it last changed.
        best: Lowest validation loss; None before the first look.
        best_step: Where that was.
        looks_since_best: Looks at the validation text since then.
        validation: What the last look saw.
        stopped: Whether patience has run out.
        data: The sampler's state.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    loss_scale: float = 1.0
    steps_at_scale: int = 0
    best: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0
    validation: float | None = None
    stopped: bool = False
    data: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run leaves.

    Attributes:
        model: The best by validation if the config has `patience`, else the last; in eval mode.
        history: All records, as in metrics.jsonl.
        best: Lowest validation loss, nats for each token; None if there was no look.
        best_step: Where that was.
        steps: Steps done.
        seconds: Spent on steps.
        tokens: Targets that the model has learned from.
    """

    model: Transformer
    history: list[Record]
    best: float | None
    best_step: int | None
    steps: int
    seconds: float
    tokens: int


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a config names.

    Raises:
        ConfigError: If the name is not understood.
        DataError: If it is a file that holds no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("bpe-") and name[4:].isdigit():
        return train_bpe([play.text for play in load_shakespeare("train")], int(name[4:]))
    if name.endswith(".json"):
        return load_tokenizer(Path(name))
    raise ConfigError(f"tokenizer={name!r}; use bytes, bpe-1024, or the path of a tokenizer.json")


def open_tokens(name: str, split: str, model: Transformer) -> Tokens:
    """The text that a config names, as tokens: the plays of a split, or a folder of shards.

    Raises:
        ConfigError: If the ids do not fit the model.
        DataError: If the folder is no store of tokens, or damaged.
    """
    if name == "shakespeare":
        tokens: Tokens = load_tokens(name, split, model.tokenizer)
    else:
        tokens = TokenStore(name)
        if tokens.separator_id != model.begin_id:
            raise ConfigError(
                f"the documents of {name} begin with id {tokens.separator_id}, the tokenizer's "
                f"texts with {model.begin_id}; use tokenizer={name}/tokenizer.json"
            )
    if tokens.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{name} has ids up to {tokens.vocab_size - 1}, but the model has "
            f"vocab_size={model.config.vocab_size}; use vocab_size={tokens.vocab_size}"
        )
    return tokens


def build_model(config: TrainConfig, device: torch.device) -> Transformer:
    """The model with its first weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Transformer(config.model, build_tokenizer(config.tokenizer))
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = config.fused_attention
    return model.to(device)


@dataclass(eq=False)
class Run:
    """A run in this process: what the functions below work on.

    Attributes:
        config: What to do.
        folder: Of the run, or None.
        strategy: How processes work together.
        model: Whose parameters the optimizer moves.
        working: What runs forward and backward: `model`, or its low-precision copy.
        module: What to call: `working` as `Strategy.prepare` and `compiled` wrapped it.
        optimizer: Of `model`.
        sampler: Of the text to train on.
        held_out: The text to validate on.
        callbacks: Called with each record.
        progress: How far the run has come.
        history: All records.
        logged: Tokens and seconds at the last record of steps.
        best_weights: Kept in memory where there is no folder.
    """

    config: TrainConfig
    folder: Path | None
    strategy: Strategy
    model: Transformer
    working: Transformer
    module: nn.Module
    optimizer: Optimizer
    sampler: BatchSampler
    held_out: Tokens
    callbacks: Sequence[Callable[[Record], None]]
    progress: Progress
    history: list[Record] = field(default_factory=list)
    logged: tuple[int, float] = (0, 0.0)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def set_up(
    config: TrainConfig,
    folder: AnyPath | None = None,
    strategy: Strategy | None = None,
    resume: bool = True,
    callbacks: Sequence[Callable[[Record], None]] = (),
) -> Run:
    """Build all that a run needs, at its beginning or where it stopped; arguments as in `train`."""
    strategy = SingleProcess() if strategy is None else strategy
    rank, device = strategy.rank, strategy.device
    model = build_model(config, device)
    working = low_precision_copy(model, config)
    run = Run(
        config,
        None if folder is None else Path(folder),
        strategy,
        model,
        working,
        compiled(strategy.prepare(working), config.compile, device),
        strategy.optimizer(model, config.optimizer),
        BatchSampler(
            open_tokens(config.data, "train", model),
            config.seq_len,
            config.batch_size,
            config.seed,
            rank,
            strategy.world_size,
        ),
        open_tokens(config.validation, "validation", model),
        () if rank else callbacks,
        Progress(loss_scale=FIRST_SCALE if config.precision == "float16" else 1.0),
    )
    go_on(run, resume)
    hand_over_weights(model, working)
    return run


MAY_CHANGE = {
    *("steps", "log_every", "eval_every", "checkpoint_every", "patience", "sample_tokens"),
    *("micro_batch", "fused_attention", "activation_checkpointing", "compile"),
}


def go_on(run: Run, resume: bool) -> None:
    """Go on from the latest checkpoint in the run's folder, if there is one.

    Raises:
        ConfigError: If there is one and `resume` is False, or it is of a run that other settings
            led elsewhere.
        DataError: If the folder cannot be written.
    """
    if run.folder is None:
        return
    path = latest_checkpoint(run.folder)
    if path is not None:
        if not resume:
            raise ConfigError(f"{run.folder} holds a run ({path.name}); resume it, or name another")
        saved = json.dumps(read_json(path / "state.json")["state"]["config"])
        refuse_other_settings(TrainConfig.from_json(saved), run.config, path)
        state = load_checkpoint(path, run.model, run.optimizer)
        run.progress = Progress(**state["progress"])
        run.progress.stopped = out_of_patience(run)
        run.logged = (run.progress.tokens, run.progress.seconds)
        run.sampler.load_state_dict(run.progress.data)
    if run.strategy.rank == 0:
        begin_files(run)


def refuse_other_settings(old: TrainConfig, new: TrainConfig, path: Path) -> None:
    """Raise `ConfigError` if a run cannot go on under new settings; `path` is its checkpoint."""
    before, now = _flat(asdict(old)), _flat(asdict(new))
    for name, value in now.items():
        if before[name] != value and name not in MAY_CHANGE:
            raise ConfigError(
                f"{path} was made with {name}={before[name]}, this run has {name}={value}; "
                "resume with the same settings, or name a new folder"
            )


def _flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings by names such as optimizer.lr."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        deeper = isinstance(value, dict)
        flat |= _flat(value, f"{where}{name}.") if deeper else {where + name: value}
    return flat


def begin_files(run: Run) -> None:
    """Write train.json, and drop from metrics.jsonl what comes after the step to go on from."""
    folder = run.folder or Path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise DataError(f"{folder} cannot be used: {error.strerror}; name another") from error
    for line in lines:
        with suppress(ValueError):  # the last line of a run that was killed
            run.history.append(json.loads(line))
    run.history = [record for record in run.history if record["step"] <= run.progress.step]
    lines = [json.dumps(record) + "\n" for record in run.history]
    for name, text in (("train.json", run.config.to_json() + "\n"), (METRICS, "".join(lines))):
        with write_atomically(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def record(run: Run, content: Record) -> None:
    """Keep a record: in memory, in metrics.jsonl, and for whoever listens.

    Raises:
        DataError: If it cannot be written.
    """
    content = {"step": run.progress.step, **content}
    run.history.append(content)
    if run.folder is not None and run.strategy.rank == 0:
        path = run.folder / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
    for callback in run.callbacks:
        callback(content)


def due(run: Run, every: int) -> bool:
    """Whether it is time for what happens once in so many steps, and after the last one."""
    return run.progress.step % every == 0 or run.progress.step == run.config.steps


def count_step(run: Run, loss: float, norm: float, seconds: float) -> None:
    """Write down that a step is over; it was not taken if its gradient was not finite.

    Raises:
        DataError: After `MOST_SKIPPED` steps in a row that were not taken.
    """
    progress, config, finite = run.progress, run.config, math.isfinite(norm)
    progress.step += 1
    progress.seconds += seconds
    progress.skipped = 0 if finite else progress.skipped + 1
    if config.precision == "float16":
        adjust_loss_scale(progress, finite)
    if finite:
        progress.tokens += config.batch_size * config.seq_len
        progress.losses.append(loss)
    else:
        record(run, {"skipped": progress.skipped, "loss_scale": progress.loss_scale})
    if progress.skipped == MOST_SKIPPED:
        last = None if run.folder is None else latest_checkpoint(run.folder)
        raise DataError(
            f"step {progress.step}: no finite gradient in {MOST_SKIPPED} steps in a row, the loss "
            f"is {loss:.3g}; use a lower lr or a longer warmup. "
            + ("There is no checkpoint" if last is None else f"The last good checkpoint is {last}")
        )
    if progress.losses and due(run, config.log_every):
        record_steps(run, norm)


def record_steps(run: Run, norm: float) -> None:
    """Make a record of the steps since the last one."""
    progress, (tokens, seconds) = run.progress, run.logged
    rate = (progress.tokens - tokens) / (progress.seconds - seconds)
    content = {
        "loss": sum(progress.losses) / len(progress.losses),
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "gradient_norm": norm if math.isfinite(norm) else None,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(rate),
    }
    progress.losses, run.logged = [], (progress.tokens, progress.seconds)
    record(run, content)


def look(run: Run) -> None:
    """Measure the model on the validation text, remember whether it is the best, write a sample."""
    config, progress, model = run.config, run.progress, run.model
    seen = evaluate_loss(
        model, run.held_out, config.seq_len, config.eval_windows, config.batch_size, run.strategy
    )
    progress.validation, progress.looks_since_best = seen.loss, progress.looks_since_best + 1
    if progress.best is None or seen.loss < progress.best:
        progress.best, progress.best_step, progress.looks_since_best = seen.loss, progress.step, 0
        if run.folder is None and config.patience is not None:
            run.best_weights = copy.deepcopy(model.state_dict())
    progress.stopped = out_of_patience(run)
    content: Record = {"validation_loss": seen.loss, "bits_per_byte": seen.bits_per_byte}
    if config.sample_tokens:
        ids = generate(model, [[model.begin_id]], config.sample_tokens, temperature=0.8)[0]
        text = [i for i in ids if i != model.begin_id and i < model.tokenizer.vocab_size]
        content["sample"] = model.tokenizer.decode(text)
    record(run, content)


def out_of_patience(run: Run) -> bool:
    """Whether validation has not been better for too many looks."""
    patience = run.config.patience
    return patience is not None and run.progress.looks_since_best >= patience


def is_over(run: Run, stop: Callable[[Progress], bool] | None = None) -> bool:
    """Whether this was the last step, for whatever reason, in whichever process."""
    wish = stop is not None and stop(run.progress)
    if stop is not None and run.strategy.world_size > 1:
        votes = torch.tensor(float(wish), device=run.strategy.device)
        wish = float(run.strategy.sum(votes)) > 0
    return wish or run.progress.stopped or run.progress.step >= run.config.steps


def save(run: Run) -> None:
    """Write a checkpoint, unless the weights are no numbers any more.

    Raises:
        DataError: If it cannot be written.
    """
    norms = torch.stack(torch._foreach_norm([p.detach() for p in run.model.parameters()]))
    if run.folder is not None and run.strategy.rank == 0 and bool(norms.isfinite().all()):
        progress = run.progress
        state = {"config": asdict(run.config), "progress": asdict(progress)}
        best = progress.best_step
        save_checkpoint(run.folder, progress.step, run.model, run.optimizer, state, best=best)
    run.strategy.barrier()


def finish(run: Run) -> TrainResult:
    """Go back to the best weights if the config has `patience`, and sum the run up."""
    progress = run.progress
    if run.config.patience is not None and progress.best_step is not None:
        if run.folder is None:
            run.model.load_state_dict(run.best_weights)
        else:
            load_weights(step_folder(run.folder, progress.best_step), run.model)
    return TrainResult(
        run.model.eval(),
        run.history,
        progress.best,
        progress.best_step,
        progress.step,
        progress.seconds,
        progress.tokens,
    )


def train(
    config: TrainConfig,
    folder: AnyPath | None = None,
    strategy: Strategy | None = None,
    resume: bool = True,
    callbacks: Sequence[Callable[[Record], None]] = (),
    stop: Callable[[Progress], bool] | None = None,
) -> TrainResult:
    """Train a model.

    Args:
        config: What to do.
        folder: Where checkpoints and metrics.jsonl go; None: nowhere.
        strategy: How processes work together; default: `SingleProcess()`.
        resume: Go on from the folder's latest checkpoint, if there is one.
        callbacks: Called with each record, in process 0.
        stop: Asked after each step; True ends the run, which can be resumed.

    Raises:
        ConfigError: If config, data and folder do not fit each other.
        DataError: If gradients stop being numbers, or a file cannot be read or written. Earlier
            checkpoints are then still there.
    """
    run = set_up(config, folder, strategy, resume, callbacks)
    progress, strategy, optimizer = run.progress, run.strategy, run.optimizer
    over = is_over(run)
    with Prefetcher(run.sampler, strategy.device) as batches, recomputed(run.working, config):
        while not over:
            start, scale = time.perf_counter(), progress.loss_scale
            set_learning_rate(optimizer, config.optimizer.factor(progress.step, config.steps))
            inputs, targets = batches.next_batch()
            with own_randomness(config.seed, progress.step, strategy):
                loss = accumulate_gradients(run.module, inputs, targets, config, strategy, scale)
            hand_over_gradients(run.working, run.model, scale)
            strategy.reduce_gradients(run.model)
            norm = float(strategy.clip_gradients(run.model, config.optimizer.clip or math.inf))
            if math.isfinite(norm):
                optimizer.step()
                hand_over_weights(run.model, run.working)
            optimizer.zero_grad()
            progress.data = batches.state_dict()
            count_step(run, float(loss), norm, time.perf_counter() - start)

            if due(run, config.eval_every):
                look(run)
            over = is_over(run, stop)
            if over or due(run, config.checkpoint_every) or progress.best_step == progress.step:
                save(run)
    return finish(run)


# Named runs


PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        model=llama_config(257, 64, d_model=64, n_layers=2, n_heads=4, tie_embeddings=True),
        optimizer=OptimizerConfig("adamw", lr=3e-3, warmup=20),
        steps=200,
        batch_size=16,
        seq_len=64,
        sample_tokens=60,
    ),
    "speedrun": TrainConfig(
        model=llama_config(  # vocabulary, context, width, layers, heads
            *(257, 64, 64, 4, 2), d_ff=256, norm="layer", activation="relu_squared", qk_norm=True
        ),
        optimizer=OptimizerConfig(
            "muon", lr=0.012, adamw_lr=0.02, weight_decay=0.0, schedule="linear", final_factor=0.0
        ),
        steps=200,
        batch_size=32,
        seq_len=64,
        eval_every=200,
        eval_windows=1024,
        checkpoint_every=200,
    ),
    "book": TrainConfig(
        model=llama_config(
            *(2048, 256, 256, 4, 4), n_kv_heads=2, d_ff=512, tie_embeddings=True, dropout=0.05
        ),
        optimizer=OptimizerConfig(
            "muon",
            lr=6e-3,
            adamw_lr=3e-3,
            weight_decay=0.3,
            schedule="linear",
            warmup=60,
            final_factor=0.02,
        ),
        steps=900,
        batch_size=16,
        seq_len=256,
        tokenizer="bpe-2048",
        compile=True,
        eval_every=100,
        eval_windows=256,
        checkpoint_every=100,
        patience=3,
        sample_tokens=64,
    ),
}
