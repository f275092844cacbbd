"""Attention, in the order chapter 05 explains it.

A query is compared with every key, softmax turns the scores into weights, and the answer is the
weighted mean of the values. Axes are always `batch heads seq e`, where `e` is the width of a head.

Two habits keep it correct. A *position* is an integer for each token, counted from the start of its
own text; -1 marks padding. What may see what is derived from positions alone, never from shapes, so
that padding on either side, offsets and caches need no case of their own. And a query that may see
nothing gets zeros, not NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own pages use

from minilm.errors import ConfigError

__all__ = [
    "Attention",
    "KeyValueStore",
    "LearnedPositions",
    "Memory",
    "alibi_bias",
    "alibi_slopes",
    "attend",
    "attention_mask",
    "attention_weights",
    "blockwise_attention",
    "fused_attention",
    "rotary_angles",
    "rotate",
    "sinusoidal_positions",
    "token_positions",
]

Queries: TypeAlias = Float[Tensor, "batch heads queries e"]
Keys: TypeAlias = Float[Tensor, "batch kv_heads keys e"]
Values: TypeAlias = Float[Tensor, "batch kv_heads keys e_v"]
Outputs: TypeAlias = Float[Tensor, "batch heads queries e_v"]
Mask: TypeAlias = Bool[Tensor, "#batch #heads #queries #keys"]
Bias: TypeAlias = Float[Tensor, "#batch #heads #queries #keys"]
Positions: TypeAlias = Int[Tensor, "#batch seq"]


# Soft lookup


def attention_weights(
    q: Queries,
    k: Keys,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Return how much of each value each query takes: softmax(q kᵀ · scale + bias).

    Query heads share KV heads in consecutive groups; keys are never copied for that. The softmax is
    taken in float32 or finer.

    Args:
        q: Queries.
        k: Keys, with as many heads as `q` or a divisor of it.
        mask: True where a query may see a key; None: everywhere.
        bias: Added to the scores, such as `alibi_bias`.
        scale: Factor of the scores; default: 1 / sqrt(e).

    Returns:
        Weights in the dtype of `q`. Each row sums to one, or is all zeros where the query may see
        no key.

    Raises:
        ConfigError: If widths differ or the heads do not form equal groups.

    Example:
        >>> q, k = torch.tensor([[[[8.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
        >>> attention_weights(q, k)
        tensor([[[[3.3535e-04, 9.9966e-01]]]])

    Source:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """
    _check_heads(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = rearrange(q, "batch (kv group) n e -> batch kv (group n) e", kv=k.shape[1])
    scores = (grouped * scale) @ k.mT
    scores = rearrange(scores, "batch kv (group n) m -> batch (kv group) n m", n=q.shape[2])
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores.softmax(dim=-1).to(q.dtype)
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of them would make softmax NaN
    weights = scores.masked_fill(~mask, lowest).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0).to(q.dtype)


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Outputs:
    """Return for each query the mean of the values, weighted by `attention_weights`.

    The readable form: it holds batch · heads · queries · keys weights at once.

    Args:
        q: Queries.
        k: Keys, with as many heads as `q` or a divisor of it.
        v: Values, one for each key.
        mask: True where a query may see a key; None: everywhere.
        bias: Added to the scores.
        scale: Factor of the scores; default: 1 / sqrt(e).

    Raises:
        ConfigError: As `attention_weights`.

    Example:
        >>> q, k = torch.tensor([[[[100.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
        >>> attend(q, k, v=torch.tensor([[[[5.0], [7.0]]]]))
        tensor([[[[7.]]]])
    """
    weights = attention_weights(q, k, mask, bias, scale)
    grouped = rearrange(weights, "batch (kv group) n m -> batch kv (group n) m", kv=v.shape[1])
    return rearrange(grouped @ v, "batch kv (group n) e -> batch (kv group) n e", n=q.shape[2])


def _check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse keys that do not fit the queries."""
    if q.shape[-1] != k.shape[-1]:
        raise ConfigError(
            f"queries have width {q.shape[-1]} and keys {k.shape[-1]}, wanted the same head_dim; "
            "axes are batch heads seq head_dim"
        )
    if q.shape[1] % k.shape[1]:
        raise ConfigError(
            f"{q.shape[1]} query heads do not form equal groups over {k.shape[1]} KV heads; "
            "use a divisor"
        )


# Who may see whom


def token_positions(is_token: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Number the tokens of each row from 0, and give padding, on whatever side, the position -1.

    Example:
        >>> token_positions(torch.tensor([[False, True, True], [True, True, False]]))
        tensor([[-1,  0,  1],
                [ 0,  1, -1]])
    """
    return (is_token.cumsum(dim=-1) - 1).masked_fill(~is_token, -1)


def attention_mask(
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Int[Tensor, "#batch keys"],
    causal: bool = True,
    window: int | None = None,
) -> Bool[Tensor, "#batch 1 queries keys"]:
    """Return True where the query at one position may see the key at another.

    Padding (position -1) neither sees nor is seen.

    Args:
        query_positions: Of each query in its own text.
        key_positions: Of each key; there may be other keys than queries, in any order.
        causal: Whether a query sees no later position.
        window: How many positions a query sees back, itself included (and as many forward where
            `causal` is False); None: all.

    Raises:
        ConfigError: If `window` is below 1.

    Example:
        >>> attention_mask(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]), window=2)[0, 0]
        tensor([[ True, False, False],
                [ True,  True, False],
                [False,  True,  True]])
    """
    if window is not None and window < 1:
        raise ConfigError(f"window={window}; use at least 1, the position itself, or None for all")
    query = rearrange(query_positions, "batch n -> batch 1 n 1")
    key = rearrange(key_positions, "batch m -> batch 1 1 m")
    mask = (query >= 0) & (key >= 0)
    if causal:
        mask = mask & (key <= query)
    if window is not None:
        mask = mask & ((query - key).abs() < window)
    return mask


# Positions


def sinusoidal_positions(
    positions: Int[Tensor, "*batch seq"], d_model: int, theta: float = 10_000.0
) -> Float[Tensor, "*batch seq d_model"]:
    """Return sines and cosines of each position at d_model / 2 frequencies, in turn.

    Added to the embeddings. Padding gets zeros.

    Raises:
        ConfigError: If `d_model` is odd.

    Example:
        >>> sinusoidal_positions(torch.tensor([0, 1]), d_model=2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])

    Source:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.
    """
    angles = rotary_angles(positions, d_model, theta)
    waves = rearrange([angles.sin(), angles.cos()], "wave ... half -> ... (half wave)")
    return waves.masked_fill((positions < 0)[..., None], 0.0)


class LearnedPositions(nn.Module):
    """One learned vector for each position, added to the embeddings, as in GPT-2.

    Padding gets zeros. There is none for a position that training has never seen.

    Args:
        max_seq_len: How many positions.
        d_model: Width.

    Attributes:
        weight: The vectors, `max_seq_len d_model`; they start normal with deviation 0.02.
    """

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(max_seq_len, d_model))

    def forward(self, positions: Int[Tensor, "*batch seq"]) -> Float[Tensor, "*batch seq d_model"]:
        """Look the vectors up.

        Raises:
            ConfigError: If a position lies beyond the table (checked on the CPU only: on a GPU the
                look would wait for all that is queued there).
        """
        if positions.device.type == "cpu" and positions.numel():
            last = int(positions.max())
            if last >= len(self.weight):
                raise ConfigError(
                    f"position {last} is beyond max_seq_len={len(self.weight)}; "
                    "shorten the text or build the model with a larger max_seq_len"
                )
        vectors = F.embedding(positions.clamp_min(0), self.weight)
        return vectors.masked_fill((positions < 0)[..., None], 0.0)


def rotary_angles(
    positions: Int[Tensor, "*batch seq"], head_dim: int, theta: float = 10_000.0
) -> Float[Tensor, "*batch seq half"]:
    """Return position times frequency, in radians, for frequencies from 1 down to about 1 / theta.

    Always float32: bfloat16 cannot tell position 256 from 257.

    Raises:
        ConfigError: If `head_dim` is odd: features turn in pairs.

    Example:
        >>> rotary_angles(torch.tensor([0, 1, 2]), head_dim=4)
        tensor([[0.0000, 0.0000],
                [1.0000, 0.0100],
                [2.0000, 0.0200]])
    """
    if head_dim % 2:
        raise ConfigError(f"width {head_dim} is odd; features turn in pairs, use an even one")
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    return positions[..., None] * (1.0 / theta**exponents)


def rotate(
    x: Float[Tensor, "batch heads seq e"], angles: Float[Tensor, "#batch seq half"]
) -> Float[Tensor, "batch heads seq e"]:
    """Turn each pair of features of `x` by its angle: rotary position embedding.

    Feature i forms a pair with feature i + e/2, as in Llama's weights on the Hugging Face Hub. The
    product of a turned query and a turned key depends on the distance of their positions alone.

    Args:
        x: Queries or keys; never modified.
        angles: From `rotary_angles`.

    Returns:
        A new tensor with the shape and dtype of `x`.

    Source:
        Su et al. 2021, https://arxiv.org/abs/2104.09864
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # one axis for the heads
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def alibi_slopes(n_heads: int) -> Float[Tensor, " heads"]:
    """Return how fast each head forgets: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    For other numbers: those of the power of two below, then every other one of the power above.

    Example:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])

    Source:
        Press et al. 2021, https://arxiv.org/abs/2108.12409
    """
    power = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes)


def alibi_bias(
    slopes: Float[Tensor, " heads"],
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Int[Tensor, "#batch keys"],
) -> Float[Tensor, "#batch heads queries keys"]:
    """Return minus slope times distance, to be added to the scores: what is far counts less."""
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).abs()
    return -slopes[:, None, None] * distance[:, None]


# The same result with less memory


def blockwise_attention(
    q: Queries,
    k: Keys,
    v: Values,
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Int[Tensor, "#batch keys"],
    causal: bool = True,
    window: int | None = None,
    block_size: int = 128,
) -> Outputs:
    """Return what `attend` returns under `attention_mask`, one block of keys at a time.

    Softmax needs its sum before it can divide, but a running sum will do: when a larger maximum
    turns up, what was added so far is scaled down. At most queries · block_size scores exist at
    once. (Under autograd each block is kept for the backward pass; FlashAttention computes it
    anew.)

    Args:
        q: Queries.
        k: Keys, with as many heads as `q` or a divisor of it.
        v: Values, one for each key.
        query_positions: As in `attention_mask`.
        key_positions: As in `attention_mask`.
        causal: As in `attention_mask`.
        window: As in `attention_mask`.
        block_size: How many keys to look at together.

    Raises:
        ConfigError: As `attention_weights`, or if `block_size` is below 1.

    Source:
        Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022,
        https://arxiv.org/abs/2205.14135
    """
    _check_heads(q, k)
    if block_size < 1:
        raise ConfigError(f"block_size={block_size}; look at 1 key or more at a time, such as 128")
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q.to(wide), "batch (kv group) n e -> batch kv (group n) e", group=groups)
    grouped = grouped * q.shape[-1] ** -0.5
    lowest = torch.finfo(wide).min
    shape = grouped.shape[:-1]
    top = grouped.new_full((*shape, 1), lowest)  # largest score so far
    total = grouped.new_zeros(*shape, 1)  # sum of exp(score - top) so far
    out: Tensor = grouped.new_zeros(*shape, v.shape[-1])  # the same sum, times the values
    for start in range(0, k.shape[2], block_size):
        block = slice(start, start + block_size)
        mask = attention_mask(query_positions, key_positions[:, block], causal, window)
        mask = repeat(mask, "batch 1 n m -> batch 1 (group n) m", group=groups)
        scores = (grouped @ k[:, :, block].to(wide).mT).masked_fill(~mask, lowest)
        new_top = torch.maximum(top, scores.detach().amax(dim=-1, keepdim=True))
        weights = (scores - new_top).exp().masked_fill(~mask, 0.0)
        shrink = (top - new_top).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        out = out * shrink + weights @ v[:, :, block].to(wide)
        top = new_top
    out = (out / total.masked_fill(total == 0, 1.0)).to(q.dtype)
    return rearrange(out, "batch kv (group n) e -> batch (kv group) n e", n=n)


def fused_attention(
    q: Queries,
    k: Keys,
    v: Values,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Outputs:
    """Return what `attend` returns, through PyTorch's fused kernels.

    Args:
        q: Queries.
        k: Keys, with as many heads as `q` or a divisor of it.
        v: Values, one for each key.
        mask: True where a query may see a key; None: everywhere.
        bias: Added to the scores.
        scale: Factor of the scores; default: 1 / sqrt(e).
        causal: Instead of a mask: query i sees keys 0 to i. For whole texts only, where queries and
            keys are the same positions without padding.

    Raises:
        ConfigError: As `attention_weights`, or if `causal` comes with a mask, a bias, or other
            numbers of queries and keys.
    """
    _check_heads(q, k)
    if causal:
        if mask is not None or bias is not None or q.shape[2] != k.shape[2]:
            raise ConfigError(
                f"causal=True with {q.shape[2]} queries, {k.shape[2]} keys, mask and bias "
                f"{mask is not None}, {bias is not None}; wanted equal numbers and neither: "
                "derive a mask from positions and pass that alone"
            )
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    n, kv = q.shape[2], k.shape[1]
    seen = mask
    if bias is not None:
        bias = bias.to(q.dtype)
        seen = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    if q.shape[1] != kv:  # the queries that share keys become rows of one head: nothing is copied
        q = rearrange(q, "batch (kv group) n e -> batch kv (group n) e", kv=kv)
        if seen is not None:
            heads = seen if seen.shape[1] > 1 else seen.expand(-1, q.shape[2] // n * kv, -1, -1)
            seen = rearrange(heads, "batch (kv group) n m -> batch kv (group n) m", kv=kv)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return rearrange(out, "batch kv (group n) e -> batch (kv group) n e", n=n)


# The layer


@runtime_checkable
class KeyValueStore(Protocol):
    """What `Attention` asks of a cache: it has one method, and keeps what it likes inside.

    One store serves one layer. A cache with a length for each row, one that keeps a sliding window,
    one in pages, one in int8: all attach through this.
    """

    def extend(
        self,
        k: Float[Tensor, "batch kv_heads seq e"],
        v: Float[Tensor, "batch kv_heads seq e"],
        positions: Int[Tensor, "batch seq"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads keys e"],
        Float[Tensor, "batch kv_heads keys e"],
        Int[Tensor, "batch keys"] | None,
    ]:
        """Take in the new keys and values; return all those that the new queries may look at.

        Args:
            k: New keys, already rotated to their positions.
            v: New values.
            positions: Of the new tokens; -1 for padding, which need not be stored.

        Returns:
            Keys, values and the position of each key, in any order, with -1 for a place that holds
            nothing. None for the positions: every query may see every key, so no mask is made (a
            cache may say so when one token follows a full one).
        """
        ...


@dataclass(frozen=True)
class Memory:
    """Keys and values of another sequence, for cross-attention; from `Attention.remember`.

    Attributes:
        k: Keys.
        v: Values.
        positions: Of each key in its own sequence; -1 for padding.
    """

    k: Float[Tensor, "batch kv_heads keys e"]
    v: Float[Tensor, "batch kv_heads keys e"]
    positions: Int[Tensor, "#batch keys"]


class Attention(nn.Module):
    """Multi-head attention, from GPT-2's (`bias=True`) to Llama's (`rope_theta`, `n_kv_heads`).

    Args:
        d_model: Width of what comes in and goes out.
        n_heads: Query heads.
        n_kv_heads: KV heads, a divisor of `n_heads`; default: as many (1: multi-query).
        head_dim: Width of a head; default: d_model / n_heads.
        bias: Whether the four projections add a bias.
        causal: Whether a position sees none after it. False for encoders and cross-attention.
        window: How many positions a query sees, itself included; None: all.
        rope_theta: Base of the rotary frequencies; None: no rotation.
        alibi: Whether to add `alibi_bias`.
        fused: Whether to go through PyTorch's fused kernels; may be changed at any time.

    Attributes:
        q_proj: d_model to n_heads · head_dim. It and the others may be replaced by any module that
            maps the same widths (quantized, low-rank).
        k_proj: d_model to n_kv_heads · head_dim.
        v_proj: d_model to n_kv_heads · head_dim.
        o_proj: n_heads · head_dim to d_model.
        q_norm: Applied to each head's queries before rotation; the identity, to be replaced.
        k_norm: The same for keys.

    Raises:
        ConfigError: If the numbers do not fit each other.

    Example:
        >>> layer = Attention(d_model=64, n_heads=4, n_kv_heads=2, rope_theta=10_000.0)
        >>> layer(torch.randn(3, 10, 64)).shape
        torch.Size([3, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
        window: int | None = None,
        rope_theta: float | None = None,
        alibi: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if min(d_model, n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
            raise ConfigError(
                f"d_model={d_model}, n_heads={n_heads}, n_kv_heads={n_kv_heads}; "
                "wanted all above 0, and n_heads a multiple of n_kv_heads"
            )
        if head_dim is None and d_model % n_heads:
            fit = next(n for n in range(n_heads, 0, -1) if d_model % n == 0)
            raise ConfigError(
                f"d_model={d_model} is not divisible by n_heads={n_heads}; "
                f"use n_heads={fit} or say head_dim"
            )
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            raise ConfigError(f"head_dim={head_dim} is odd; rotation needs pairs, use an even one")
        if window is not None and window < 1:
            raise ConfigError(f"window={window}; use at least 1, or None for all")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim, self.causal, self.window = head_dim, causal, window
        self.rope_theta, self.alibi, self.fused = rope_theta, alibi, fused
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: KeyValueStore | Memory | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Let every position gather what it may see.

        Args:
            x: Activations.
            positions: Of each token in its own text; -1 for padding, which neither sees nor is
                seen. Default: 0, 1, 2, ...
            kv: A cache of earlier positions, which is extended by those of `x` (then `positions`
                must be given), or the `Memory` of another sequence, which takes their place.

        Returns:
            The shape and dtype of `x`.

        Raises:
            ConfigError: If `x`, `positions` and `kv` do not fit each other or the layer.
        """
        q, k, v, query_positions, key_positions = self._project(x, positions, kv)
        whole_texts = positions is None and kv is None
        if self.fused and whole_texts and self.window is None and not self.alibi:
            out = fused_attention(q, k, v, causal=self.causal)
        else:
            mask, bias = self._visibility(query_positions, key_positions)
            out = (fused_attention if self.fused else attend)(q, k, v, mask, bias)
        mixed: Tensor = self.o_proj(rearrange(out, "batch heads seq e -> batch seq (heads e)"))
        return mixed

    def weights(
        self,
        x: Float[Tensor, "batch seq d_model"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: KeyValueStore | Memory | None = None,
    ) -> Float[Tensor, "batch heads seq keys"]:
        """Return the attention weights that `forward` would use, to look at them."""
        q, k, _, query_positions, key_positions = self._project(x, positions, kv)
        return attention_weights(q, k, *self._visibility(query_positions, key_positions))

    def remember(
        self,
        states: Float[Tensor, "batch keys d_model"],
        positions: Int[Tensor, "#batch keys"] | None = None,
    ) -> Memory:
        """Project another sequence to keys and values, once, for cross-attention through `kv`.

        Args:
            states: What an encoder has made of the other sequence.
            positions: Of its tokens; -1 for padding. Default: 0, 1, 2, ...
        """
        positions = self._positions(states, positions)
        return Memory(*self._keys_values(states, positions), positions)

    def _project(
        self, x: Tensor, positions: Tensor | None, kv: KeyValueStore | Memory | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values, and the positions of queries and of keys."""
        here = self._positions(x, positions)
        q = self._turn(self.q_norm(self._split(self.q_proj(x))), here)
        if isinstance(kv, Memory):
            if self.causal:
                raise ConfigError(
                    "a Memory in a causal layer: positions of two sequences cannot be compared; "
                    "build the layer of cross-attention with causal=False"
                )
            return q, kv.k, kv.v, here, kv.positions
        k, v = self._keys_values(x, here)
        if kv is None:
            return q, k, v, here, here
        if not isinstance(kv, KeyValueStore):
            raise ConfigError(
                f"kv is a {type(kv).__name__}, wanted a cache with a method extend, or a Memory; "
                "for cross-attention pass kv=layer.remember(states)"
            )
        if positions is None:
            raise ConfigError("kv without positions; say where in its text each row of x stands")
        k, v, there = kv.extend(k, v, here.expand(len(x), -1))
        return q, k, v, here, there

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k = self._turn(self.k_norm(self._split(self.k_proj(x))), positions)
        return k, self._split(self.v_proj(x))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch seq (heads e) -> batch heads seq e", e=self.head_dim)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rope_theta is None:
            return x
        return rotate(x, rotary_angles(positions, self.head_dim, self.rope_theta))

    def _visibility(
        self, here: Tensor, there: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask and the bias between queries at `here` and keys at `there`."""
        if there is None:
            if self.alibi:
                raise ConfigError("alibi needs positions; let the store's extend return them")
            return None, None
        mask = attention_mask(here, there, self.causal, self.window)
        if not self.alibi:
            return mask, None
        return mask, alibi_bias(alibi_slopes(self.n_heads).to(here.device), here, there)

    def _positions(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Check the shapes; fill in 0, 1, 2, ... where no positions are given."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ConfigError(f"x is {list(x.shape)}, wanted [batch, seq, d_model={self.d_model}]")
        batch, seq = x.shape[:2]
        if positions is None:
            return torch.arange(seq, device=x.device)[None]
        if tuple(positions.shape) not in ((batch, seq), (1, seq)) or positions.is_floating_point():
            raise ConfigError(
                f"positions are {positions.dtype}{list(positions.shape)}, wanted integers "
                f"[{batch}, {seq}] or [1, {seq}], one for each token; "
                "token_positions makes them from a padding mask"
            )
        return positions
