"""The Transformer, in the order chapter 06 explains it.

One `ModelConfig` describes every decoder of the book, from GPT-2 to Llama; `Transformer` builds it.
A stream of vectors, one for each token, runs from the embedding to the last norm. Each `Block`
reads the stream twice, through attention and through a feed-forward network, and each time adds
what it found. What they read is normalized, the stream is not.

Parameters carry the names of Llama in `transformers`, but for the two norms of a block, which are
named by what they stand before: `attn_norm` and `mlp_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own pages use

from minilm.attention import (
    Attention,
    KeyValueStore,
    LearnedPositions,
    Memory,
    token_positions,
)
from minilm.errors import ConfigError
from minilm.measure import Tokenizer

__all__ = [
    "IGNORED",
    "Block",
    "FeedForward",
    "ModelConfig",
    "RMSNorm",
    "Transformer",
    "build_norm",
    "choose_ids",
    "count_parameters",
    "generate",
    "gpt2_config",
    "llama_config",
    "next_token_loss",
    "pad_left",
    "rms_norm",
]

IGNORED = -100  # a target that does not count, as in F.cross_entropy
MOST_LOGITS = 2**22  # that `log_probs` holds at once: 16 MB


# The description


@dataclass(frozen=True)
class ModelConfig:
    """The numbers and choices that make a decoder.

    `gpt2_config` and `llama_config` fill in the habits of a family.

    Attributes:
        vocab_size: Ids run from 0 to `vocab_size - 1`, the begin token included.
        max_seq_len: Tokens that the model is meant to see at once.
        d_model: Width of the stream.
        n_layers: Blocks.
        n_heads: Query heads.
        n_kv_heads: KV heads, a divisor of `n_heads`.
        head_dim: Width of a head.
        d_ff: Inner width of the feed-forward network.
        norm: Mean and deviation ("layer") or root mean square ("rms").
        norm_eps: Added to the variance or the mean square.
        qk_norm: Whether queries and keys of each head are normalized, too.
        activation: "gelu" (its tanh form) and "relu_squared" have two matrices, "swiglu" has three.
        positions: How a token knows its place; "none" leaves that to the causal mask.
        rope_theta: Base of the rotary frequencies.
        bias: Whether projections and layer norms add a bias.
        tie_embeddings: Whether one matrix turns ids into vectors and vectors into logits.
        dropout: Part of each addition to the stream that is set to zero in training.
        init_std: Deviation of the weights at the beginning.

    Raises:
        ConfigError: If the numbers do not fit each other.
    """

    vocab_size: int
    max_seq_len: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm: Literal["layer", "rms"] = "rms"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    activation: Literal["gelu", "relu_squared", "swiglu"] = "swiglu"
    positions: Literal["rotary", "learned", "alibi", "none"] = "rotary"
    rope_theta: float = 10_000.0
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and value not in allowed:
                raise ConfigError(f"{field.name}={value!r}; use one of {', '.join(allowed)}")
            if hints[field.name] is int and value < 1:
                raise ConfigError(f"{field.name}={value}; use at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                "each KV head serves equally many query heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotation needs pairs")
        if not 0 <= self.dropout < 1 or self.norm_eps <= 0 or self.init_std <= 0:
            raise ConfigError(
                f"dropout={self.dropout}, norm_eps={self.norm_eps}, init_std={self.init_std}; "
                "wanted a dropout from 0 to below 1, and the others above 0"
            )


def gpt2_config(
    vocab_size: int, max_seq_len: int, d_model: int, n_layers: int, n_heads: int, **choices: Any
) -> ModelConfig:
    """GPT-2's habits: learned positions, layer norms, GELU, biases, tied embeddings.

    Arguments are attributes of `ModelConfig`: five that it needs, and any others as `choices`,
    where they differ from GPT-2's.

    Raises:
        ConfigError: If the numbers do not fit each other.

    Example:
        >>> config = gpt2_config(50257, 1024, d_model=768, n_layers=12, n_heads=12)
        >>> config.d_ff, count_parameters(config)
        (3072, 124439808)

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    habits = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True}
    widths = _widths(d_model, n_heads, d_ff=4 * d_model)
    return ModelConfig(
        vocab_size, max_seq_len, d_model, n_layers, n_heads, **widths | habits | choices
    )


def llama_config(
    vocab_size: int, max_seq_len: int, d_model: int, n_layers: int, n_heads: int, **choices: Any
) -> ModelConfig:
    """Llama's habits: rotary positions, RMS norms, SwiGLU, no biases, an output matrix of its own.

    `d_ff` is 8/3 `d_model`, rounded up to a multiple of 16, so that three matrices cost what
    GPT-2's two do.

    Arguments as in `gpt2_config`.

    Raises:
        ConfigError: If the numbers do not fit each other.

    Source:
        Touvron et al. 2023, https://arxiv.org/abs/2302.13971
    """
    habits = {"tie_embeddings": False}
    widths = _widths(d_model, n_heads, d_ff=-(-8 * d_model // 3 // 16) * 16)
    return ModelConfig(
        vocab_size, max_seq_len, d_model, n_layers, n_heads, **widths | habits | choices
    )


def _widths(d_model: int, n_heads: int, d_ff: int) -> dict[str, Any]:
    """The widths that follow from others unless said otherwise."""
    if n_heads < 1 or d_model % n_heads:
        fit = next(n for n in range(max(n_heads, 1), 0, -1) if d_model % n == 0)
        raise ConfigError(
            f"d_model={d_model} is not divisible by n_heads={n_heads}; use n_heads={fit}"
        )
    return {"n_kv_heads": n_heads, "head_dim": d_model // n_heads, "d_ff": d_ff}


def count_parameters(config: ModelConfig) -> int:
    """How many numbers training sets: by formula, without building the model."""
    width, inner = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    ups = 2 if config.activation == "swiglu" else 1
    norm = 2 if config.norm == "layer" and config.bias else 1  # vectors in one
    block = width * (2 * q + 2 * kv) + (ups + 1) * width * inner + 2 * norm * width
    if config.bias:
        block += q + 2 * kv + width + ups * inner + width
    if config.qk_norm:
        block += 2 * norm * config.head_dim
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * width
    places = config.max_seq_len * width if config.positions == "learned" else 0
    return embeddings + places + config.n_layers * block + norm * width


# The parts


def rms_norm(
    x: Float[Tensor, "*batch d_model"], gain: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "*batch d_model"]:
    """Divide `x` by its root mean square over the last axis, then multiply by `gain`.

    Statistics are taken in float32 or finer; `x` is never modified.

    Args:
        x: Activations, any float dtype.
        gain: Learned scale of each feature.
        eps: Added to the mean square (in units of `x` squared).

    Returns:
        A new tensor with the shape and dtype of `x`.

    Raises:
        ConfigError: If `eps` is not positive.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=1e-12)
        tensor([[0.8485, 1.1314]])

    Source:
        Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """
    if eps <= 0:
        raise ConfigError(f"eps={eps}; use a small number above 0, such as 1e-5")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * gain.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its gain, which starts at one.

    Args:
        width: Of what comes in and goes out.
        eps: As in `rms_norm`.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize the last axis."""
        return rms_norm(x, self.weight, self.eps)


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that a config asks for, over `width` features."""
    if config.norm == "rms":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)


class FeedForward(nn.Module):
    """Two or three matrices that treat every position alike and alone.

    Args:
        config: `d_model`, `d_ff`, `activation` and `bias` count.

    Source:
        SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202. Squared ReLU: So et al. 2021,
        https://arxiv.org/abs/2109.08668
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.d_model, config.d_ff, config.bias
        self.activation = config.activation
        self.gate_proj = nn.Linear(width, inner, bias) if self.activation == "swiglu" else None
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Widen, bend, narrow."""
        inner = self.up_proj(x)
        if self.gate_proj is not None:
            inner = F.silu(self.gate_proj(x)) * inner
        elif self.activation == "gelu":
            inner = F.gelu(inner, approximate="tanh")
        else:
            inner = F.relu(inner).square()
        narrow: Tensor = self.down_proj(inner)
        return narrow


class Block(nn.Module):
    """Attention, then the feed-forward network; each reads the normalized stream and adds to it.

    Args:
        config: All but the sizes of vocabulary and context count.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = build_norm(config, config.d_model)
        self.self_attn = Attention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            bias=config.bias,
            rope_theta=config.rope_theta if config.positions == "rotary" else None,
            alibi=config.positions == "alibi",
        )
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.self_attn.add_module(name, build_norm(config, config.head_dim))
        self.mlp_norm = build_norm(config, config.d_model)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: KeyValueStore | Memory | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the stream with two additions; arguments as in `Attention.forward`."""
        x = x + self.dropout(self.self_attn(self.attn_norm(x), positions, kv))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


# The whole


class Transformer(nn.Module):
    """A decoder: from ids to the logits of the id after each.

    With a tokenizer it is a `minilm.measure.LanguageModel`.

    Args:
        config: What to build.
        tokenizer: Turns text into ids. Without one the model knows ids only, and `log_probs`
            refuses.

    Attributes:
        embed_tokens: One vector for each id.
        embed_positions: One for each position, or None.
        layers: The blocks.
        norm: Before the logits.
        lm_head: From vectors to logits; None where `embed_tokens` serves for that as well.

    Raises:
        ConfigError: If the config has no room for the tokenizer's ids and its begin token.

    Example:
        >>> model = Transformer(llama_config(257, 64, d_model=32, n_layers=2, n_heads=4))
        >>> model(torch.tensor([[256, 84, 111], [256, 66, 101]])).shape
        torch.Size([2, 3, 257])
    """

    tokenizer: Tokenizer
    max_seq_len: int | None

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.max_seq_len = config, config.max_seq_len
        if tokenizer is not None:
            self.tokenizer = tokenizer
            needed = max(tokenizer.vocab_size, self.begin_id + 1)
            if config.vocab_size < needed:
                raise ConfigError(
                    f"vocab_size={config.vocab_size}, but the tokenizer and its begin token need "
                    f"{needed} ids; use vocab_size={needed}"
                )
        vocab, width = config.vocab_size, config.d_model
        learned, tied = config.positions == "learned", config.tie_embeddings
        self.embed_tokens = nn.Embedding(vocab, width)
        self.embed_positions = LearnedPositions(config.max_seq_len, width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = build_norm(config, width)
        self.lm_head = None if tied else nn.Linear(width, vocab, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew: small, and smaller where many are added into the stream."""
        std, n_additions = self.config.init_std, 2 * self.config.n_layers
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # the gain of a norm
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=std / n_additions**0.5)
            else:
                parameter.normal_(std=std)

    @property
    def begin_id(self) -> int:
        """The id before every text: the tokenizer's, or else the first that it does not use.

        Raises:
            ConfigError: If the model has no tokenizer.
        """
        if not hasattr(self, "tokenizer"):
            raise ConfigError("the model has no tokenizer; build Transformer(config, tokenizer)")
        return int(getattr(self.tokenizer, "begin_id", self.tokenizer.vocab_size))

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: Sequence[KeyValueStore] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return at each position the logits of the next id.

        Args:
            input_ids: Rows of ids; any valid id where a position is padding.
            positions: Of each token in its own text; -1 for padding, whose logits mean nothing.
                Default: 0, 1, 2, ...
            kv: A cache of earlier positions: one store for each layer. It needs `positions`.

        Raises:
            ConfigError: If the arguments do not fit each other or the model.
        """
        return self.logits(self.states(input_ids, positions, kv))

    def states(
        self,
        input_ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: Sequence[KeyValueStore] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the stream after the last norm; arguments as in `forward`."""
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            got = f"{input_ids.dtype}{list(input_ids.shape)}"
            raise ConfigError(f"input_ids are {got}, wanted integers [batch, seq]")
        if kv is not None and len(kv) != len(self.layers):
            raise ConfigError(f"kv has {len(kv)} stores for {len(self.layers)} layers")
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            here = positions
            if here is None:
                here = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            x = x + self.embed_positions(here)
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, None if kv is None else kv[i])
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Compare each state with the vector of every id."""
        if self.lm_head is None:
            return F.linear(states, self.embed_tokens.weight)
        scores: Tensor = self.lm_head(states)
        return scores

    @torch.no_grad()
    def log_probs(self, ids: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq"]:
        """Return ln p(id | begin token, the ids before it) for each id.

        Args:
            ids: Rows of at most `max_seq_len` ids.

        Raises:
            ConfigError: If the rows are too long, an id is outside the vocabulary, or the model
                has no tokenizer, which says how a text begins.
        """
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"ids are {ids.dtype}{list(ids.shape)}, wanted integers [batch, seq] with seq up "
                f"to max_seq_len={self.config.max_seq_len}; minilm.measure.score cuts longer texts"
            )
        if ids.size:
            _check_range(int(ids.min()), int(ids.max()), self.config.vocab_size)
        targets = torch.from_numpy(ids).to(self.embed_tokens.weight.device, torch.int64)
        result = np.empty(ids.shape)
        with _evaluating(self):
            states = self.states(F.pad(targets, (1, 0), value=self.begin_id)[:, :-1])
            flat, n = states.flatten(0, 1), max(1, MOST_LOGITS // self.config.vocab_size)
            for start in range(0, len(flat), n):
                part = slice(start, start + n)
                wide = self.logits(flat[part]).float().log_softmax(dim=-1)
                chosen = wide.gather(-1, targets.flatten()[part, None])[:, 0]
                result.reshape(-1)[part] = chosen.cpu().numpy()
        return result


def _check_range(low: int, high: int, vocab_size: int) -> None:
    """Refuse ids that the model cannot read."""
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"ids run from {low} to {high}, wanted 0 to {vocab_size - 1}; "
            "encode the text with the model's own tokenizer"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# The loss, and a first way to write


def next_token_loss(
    logits: Float[Tensor, "*batch vocab"],
    targets: Int[Tensor, "*batch"],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Return the surprise of the targets in nats, taken in float32 or finer.

    Args:
        logits: At each position, of the next id.
        targets: The ids that came next: the inputs moved by one. `IGNORED` where none counts.
        reduction: Over the targets that count.

    Raises:
        ConfigError: If the shapes differ or no target counts.

    Example:
        >>> next_token_loss(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, IGNORED, IGNORED]]))
        tensor(1.3863)
    """
    if logits.shape[:-1] != targets.shape or targets.is_floating_point():
        raise ConfigError(
            f"targets are {targets.dtype}{list(targets.shape)}, wanted integers of shape "
            f"{list(logits.shape[:-1])}, one for each row of logits"
        )
    if targets.device.type == "cpu" and not (targets != IGNORED).any():
        raise ConfigError("no target counts; pass at least one that is not IGNORED")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"] | None]:
    """Make one batch of rows of different lengths, so that all end in the last column.

    Returns:
        Ids, with 0 for padding, and positions, with -1 for it; None for the positions where nothing
        was padded.

    Example:
        >>> pad_left([[5, 6, 7], [8]])
        (tensor([[5, 6, 7],
                [0, 0, 8]]), tensor([[ 0,  1,  2],
                [-1, -1,  0]]))
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    first = torch.tensor([longest - len(row) for row in rows])[:, None]
    return ids, token_positions(torch.arange(longest) >= first)


def choose_ids(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draw an id for each row.

    Args:
        logits: Of the next id.
        temperature: Below 1 prefers the probable, above 1 evens out; 0 takes the most probable id.
        top_k: Only the so many most probable ids may come; None: all.
        generator: Source of randomness, on the device of `logits`.

    Raises:
        ConfigError: If `temperature` is negative or `top_k` is below 1.

    Example:
        >>> choose_ids(torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]]), temperature=0.0)
        tensor([1, 0])
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ConfigError(
            f"temperature={temperature}, top_k={top_k}; wanted a temperature from 0 up, and top_k "
            "from 1 up or None for all ids"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores, ids = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    drawn = torch.multinomial((scores / temperature).softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, drawn)[:, 0]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_id: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt, one id at a time; the whole text is read again for each.

    When a text outgrows the model's `max_seq_len`, its first ids are no longer read.

    Args:
        model: What predicts.
        prompts: Rows of ids, of any lengths, each at least one: a text begins with
            `model.begin_id`.
        max_new_tokens: How many ids to add.
        temperature: As in `choose_ids`.
        top_k: As in `choose_ids`.
        stop_id: A row ends with this id.
        seed: Equal seeds and equal batches give equal ids.

    Returns:
        The new ids of each row, without its prompt.

    Raises:
        ConfigError: If a prompt is empty or a setting is out of range.
    """
    if max_new_tokens < 0 or not prompts or not all(map(len, prompts)):
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, lengths of prompts {[len(p) for p in prompts]}; "
            "wanted prompts of at least one id, such as [model.begin_id], and no negative number"
        )
    _check_range(min(map(min, prompts)), max(map(max, prompts)), model.config.vocab_size)
    rows, generator = [list(prompt) for prompt in prompts], torch.Generator().manual_seed(seed)
    active = list(range(len(rows)))
    device = model.embed_tokens.weight.device
    with _evaluating(model):
        for _ in range(max_new_tokens):
            ids, positions = pad_left([rows[i][-model.config.max_seq_len :] for i in active])
            places = None if positions is None else positions.to(device)
            last = model.states(ids.to(device), places)[:, -1]
            chosen = choose_ids(model.logits(last).cpu(), temperature, top_k, generator).tolist()
            for i, new in zip(active, chosen, strict=True):
                rows[i].append(new)
            active = [i for i, new in zip(active, chosen, strict=True) if new != stop_id]
            if not active:
                break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
