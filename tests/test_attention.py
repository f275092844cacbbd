"""Attention: parity with PyTorch and transformers, then properties, then bad input."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from minilm import attention
from minilm.attention import (
    Attention,
    LearnedPositions,
    Memory,
    alibi_bias,
    alibi_slopes,
    attend,
    attention_mask,
    attention_weights,
    blockwise_attention,
    fused_attention,
    rotary_angles,
    rotate,
    sinusoidal_positions,
    token_positions,
)
from minilm.errors import ConfigError

FP32 = {"atol": 1e-5, "rtol": 1e-5}
BF16 = {"atol": 2e-2, "rtol": 2e-2}  # 8 bits of mantissa: 2^-8 = 0.004 a rounding, several in a row

# Every kind of layer that the book builds from one class.
LAYERS = {
    "gpt2": {"n_heads": 4, "bias": True},
    "llama": {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 10_000.0},
    "explicit head_dim": {"n_heads": 3, "n_kv_heads": 1, "head_dim": 12, "rope_theta": 500_000.0},
    "window": {"n_heads": 4, "window": 3, "rope_theta": 10_000.0},
    "alibi": {"n_heads": 4, "n_kv_heads": 2, "alibi": True},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def queries_keys_values(
    batch: int = 3, heads: int = 6, kv_heads: int = 2, n: int = 7, m: int = 9, e: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = normal(batch, heads, n, e, seed=1)
    return q, normal(batch, kv_heads, m, e, seed=2), normal(batch, kv_heads, m, e, seed=3)


def reference(q, k, v, mask=None, bias=None, scale=None):
    """PyTorch's own, with the keys of each group repeated."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    seen = mask
    if bias is not None:
        seen = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def layer(kind: str, **changes: object) -> Attention:
    torch.manual_seed(0)
    return Attention(24, **{**LAYERS[kind], **changes})


# Parity


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", [attend, fused_attention])
def test_equals_pytorch(function, kv_heads, masked, biased):
    q, k, v = queries_keys_values(kv_heads=kv_heads)
    mask = torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 0] = True
    mask = mask if masked else None
    bias = normal(1, 6, 7, 9, seed=4) if biased else None
    for scale in (None, 0.3):
        got = function(q, k, v, mask, bias, scale)
        torch.testing.assert_close(got, reference(q, k, v, mask, bias, scale), **FP32)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_causal_flag_equals_the_mask_and_gradients_agree(kv_heads):
    tensors = [t.requires_grad_() for t in queries_keys_values(kv_heads=kv_heads, n=9, m=9)]
    mask = attention_mask(torch.arange(9)[None], torch.arange(9)[None])
    got = {
        "attend": attend(*tensors, mask),
        "fused": fused_attention(*tensors, causal=True),
        "masked": fused_attention(*tensors, mask),
        "reference": reference(*tensors, mask),
    }
    gradients = {
        name: torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), tensors)
        for name, out in got.items()
    }
    for name in ("attend", "fused", "masked"):
        torch.testing.assert_close(got[name], got["reference"], **FP32)
        torch.testing.assert_close(gradients[name], gradients["reference"], **FP32)


@settings(deadline=None, max_examples=60)
@given(
    block_size=st.integers(1, 20),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    padding=st.integers(0, 4),
    on_left=st.booleans(),
)
def test_online_softmax_equals_plain(block_size, kv_heads, causal, window, padding, on_left):
    q, k, v = queries_keys_values(2, 4, kv_heads, n=11, m=11)
    is_token = torch.ones(2, 11, dtype=torch.bool)
    if padding:
        is_token[1, slice(0, padding) if on_left else slice(-padding, None)] = False
    positions = token_positions(is_token)
    mask = attention_mask(positions, positions, causal, window)
    got = blockwise_attention(
        q, k, v, positions, positions, causal=causal, window=window, block_size=block_size
    )
    torch.testing.assert_close(got, attend(q, k, v, mask), **FP32)


def test_online_softmax_gradients_and_large_scores():
    tensors = [t.requires_grad_() for t in queries_keys_values(n=9, m=9)]
    positions = token_positions(torch.tensor([[True] * 9, [False] * 4 + [True] * 5, [False] * 9]))
    weight = normal(3, 6, 9, 8, seed=9)
    plain = attend(*tensors, attention_mask(positions, positions))
    for block_size in range(1, 10):
        blocks = blockwise_attention(*tensors, positions, positions, block_size=block_size)
        got, want = (
            torch.autograd.grad((out * weight).sum(), tensors, retain_graph=True)
            for out in (blocks, plain)
        )
        torch.testing.assert_close(got, want, **FP32)
    q, k, v = (t.detach() for t in tensors)
    here = torch.arange(9)[None]
    got = blockwise_attention(q * 1e4, k, v, here, here, block_size=2)  # exp overflows at 89
    torch.testing.assert_close(got, attend(q * 1e4, k, v, attention_mask(here, here)), **FP32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_layer_equals_multihead_attention(causal, fused):
    ours = Attention(24, 4, bias=True, causal=causal, fused=fused)
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    names = ("q_proj", "k_proj", "v_proj")
    with torch.no_grad():
        for name, weight, bias in zip(
            names, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
        ):
            getattr(ours, name).weight.copy_(weight)
            getattr(ours, name).bias.copy_(bias)
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = normal(3, 10, 24)
    hidden = torch.ones(10, 10).triu(1).bool() if causal else None
    want, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(ours(x), want, **FP32)
    torch.testing.assert_close(ours.weights(x), weights, **FP32)


def test_cross_attention_equals_multihead_attention():
    ours = Attention(24, 4, causal=False)
    theirs = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
        )
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x, states = normal(3, 5, 24), normal(3, 8, 24, seed=1)
    is_token = torch.arange(8) < torch.tensor([[8], [3], [5]])
    want, _ = theirs(x, states, states, key_padding_mask=~is_token)
    memory = ours.remember(states, token_positions(is_token))
    torch.testing.assert_close(ours(x, kv=memory), want, **FP32)
    assert isinstance(memory, Memory)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_equals_transformers(theta):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={
            "rope_type": "default", "rope_theta": theta,
        },
    )  # fmt: skip
    q, k = normal(3, 2, 6, 16), normal(3, 1, 6, 16, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12], [1000, 1001, 5, 5, 2, 0]])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want = apply_rotary_pos_emb(q, k, cos, sin)
    angles = rotary_angles(positions, 16, theta)
    torch.testing.assert_close((rotate(q, angles), rotate(k, angles)), want, atol=1e-6, rtol=1e-6)
    half = rotate(q.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want[0], **BF16)


@pytest.mark.parametrize("fused", [False, True])
def test_layer_equals_llama_attention(fused):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaAttention(config, layer_idx=0)
    ours = Attention(24, 4, 2, 10, rope_theta=10_000.0, fused=fused)
    ours.load_state_dict(theirs.state_dict())
    x, positions = normal(3, 9, 24), torch.arange(9).expand(3, -1)
    hidden = torch.full((9, 9), -math.inf).triu(1)[None, None]
    rotary = LlamaRotaryEmbedding(config)(x, positions)
    want, _ = theirs(x, position_embeddings=rotary, attention_mask=hidden)
    torch.testing.assert_close(ours(x), want, **FP32)
    torch.testing.assert_close(ours(x, positions), want, **FP32)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_alibi_equals_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 7), heads, torch.float32).reshape(heads, 7)
    slopes = alibi_slopes(heads)
    torch.testing.assert_close(theirs[:, 1], slopes)  # BLOOM adds slope · key position: the same
    here = torch.arange(7)[None]  # softmax, for in one row it differs by a constant
    bias = alibi_bias(slopes, here, here)
    for i in range(7):
        for j in range(i + 1):
            torch.testing.assert_close(bias[0, :, i, j], -slopes * (i - j))
    q, k = normal(2, heads, 7, 4), normal(2, heads, 7, 4, seed=1)
    mask = attention_mask(here, here)
    torch.testing.assert_close(
        attention_weights(q, k, mask, bias), attention_weights(q, k, mask, theirs[None, :, None])
    )


def test_sinusoidal_positions_follow_the_paper():
    got = sinusoidal_positions(torch.tensor([[0, 5, 999], [-1, 0, 1]]), 10)
    for position, vector in ((5, got[0, 1]), (999, got[0, 2]), (1, got[1, 2])):
        for i in range(5):
            angle = position / 10_000 ** (2 * i / 10)
            assert vector[2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert vector[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert not got[1, 0].any()


def test_learned_positions():
    table = LearnedPositions(8, 4)
    got = table(torch.tensor([[0, 7, -1], [3, 3, 0]]))
    torch.testing.assert_close(got[0, 1], table.weight[7])
    assert not got[0, 2].any()
    with pytest.raises(ConfigError, match="position 8 is beyond max_seq_len=8"):
        table(torch.tensor([[8]]))


# Properties


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(0, 2000), n=st.integers(0, 2000), shift=st.integers(0, 2000), e=st.integers(1, 16)
)
def test_rotation_is_relative_and_keeps_lengths(m, n, shift, e):
    q, k = normal(1, 1, 1, 2 * e, seed=m), normal(1, 1, 1, 2 * e, seed=n + 1)

    def product(i: int, j: int) -> float:
        turned = [rotate(t, rotary_angles(torch.tensor([[p]]), 2 * e)) for t, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    # angles in float32: up to 4,000 radians, known to 2^-13
    assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=2e-2, rel=1e-3)
    turned = rotate(q, rotary_angles(torch.tensor([[m]]), 2 * e))
    assert turned.norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("given_positions", [False, True])
def test_no_position_sees_a_later_one(kind, fused, given_positions):
    ours = layer(kind, fused=fused)
    x = normal(3, 8, 24).requires_grad_()
    positions = torch.arange(8).expand(3, -1) if given_positions else None
    out = ours(x, positions)
    for t in range(8):
        (gradient,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        seen = gradient.abs().sum(-1) > 0
        first = max(0, t - 2) if kind == "window" else 0
        wanted = (torch.arange(8) >= first) & (torch.arange(8) <= t)
        assert (seen == wanted).all(), (t, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_give_zeros(dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in queries_keys_values(n=9, m=9))
    positions = token_positions(torch.tensor([[False] * 9, [False] * 8 + [True], [True] * 9]))
    mask = attention_mask(positions, positions)
    bias = alibi_bias(alibi_slopes(6), positions, positions)
    results = {
        "attend": attend(q, k, v, mask),
        "biased": attend(q, k, v, mask, bias),
        "fused": fused_attention(q, k, v, mask),
        "fused, biased": fused_attention(q, k, v, mask, bias),
        "blockwise": blockwise_attention(q, k, v, positions, positions, block_size=4),
    }
    for name, out in results.items():
        assert out.dtype == dtype, name
        assert not out[0].any(), name
        assert not out[1, :, :8].any(), name
        assert out[1, :, 8:].any(), name
        for gradient in torch.autograd.grad(out.float().sum(), (q, k, v), retain_graph=True):
            assert gradient.isfinite().all(), name
    assert not attention_weights(q, k, mask)[0].any()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_each_alone(kind, fused, side):
    ours = layer(kind, fused=fused)
    lengths = [9, 4, 1, 0]
    texts = [normal(1, n, 24, seed=n) for n in lengths]
    x = torch.full((4, 9, 24), 50.0)  # garbage in the padding
    is_token = torch.zeros(4, 9, dtype=torch.bool)
    for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        place = slice(0, n) if side == "right" else slice(9 - n, 9)
        x[row, place], is_token[row, place] = text[0], True
    out = ours(x, token_positions(is_token))
    for row, text in enumerate(texts[:3]):
        torch.testing.assert_close(out[row][is_token[row]], ours(text)[0], **FP32)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_rotation_and_alibi_do_not_notice_an_offset(kind):
    ours = layer(kind)
    x = normal(3, 8, 24)
    offsets = torch.tensor([[0], [10], [500]])
    torch.testing.assert_close(ours(x, torch.arange(8) + offsets), ours(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_is_near_float32(kind, fused):
    ours, x = layer(kind), normal(3, 16, 24)
    want = ours(x)
    got = layer(kind, fused=fused).bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, **BF16)


@torch.no_grad()
def test_bfloat16_with_memory_cache_and_learned_positions():
    positions = token_positions(torch.arange(8) < torch.tensor([[8], [3], [5]]))
    x, states = normal(3, 8, 24), normal(3, 8, 24, seed=1)

    def outputs(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        crossing, caching = Attention(24, 4, 2, causal=False), layer("llama")
        table = LearnedPositions(8, 24)
        for module in (crossing, caching, table):
            module.to(dtype)
        memory, store = crossing.remember(states.to(dtype), positions), WindowCache(8)
        now = x.to(dtype) + table(positions)
        halves = [caching(now[:, i : i + 4], torch.arange(i, i + 4)[None], store) for i in (0, 4)]
        return [
            crossing(now, kv=memory), crossing.weights(now, kv=memory), torch.cat(halves, 1),
        ]  # fmt: skip

    for got, want in zip(outputs(torch.bfloat16), outputs(torch.float32), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, **BF16)
    hidden = outputs(torch.float32)[1].masked_select((positions < 0)[:, None, None])
    assert hidden.numel() and not hidden.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_functions_keep_dtypes_and_arguments(dtype):
    tensors = [t.to(dtype) for t in queries_keys_values(n=9, m=9)]
    before = [t.clone() for t in tensors]
    here = torch.arange(9)[None]
    mask, bias = attention_mask(here, here), alibi_bias(alibi_slopes(6), here, here)
    want = reference(*(t.double() for t in tensors), mask, bias.double())
    tolerance = BF16 if dtype == torch.bfloat16 else FP32
    for out in (attend(*tensors, mask, bias), fused_attention(*tensors, mask, bias)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, **tolerance)
    out = blockwise_attention(*tensors, here, here, block_size=4)
    assert out.dtype == dtype
    want = reference(*(t.double() for t in tensors), mask)
    torch.testing.assert_close(out.double(), want, **tolerance)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_mask_by_hand():
    mask = attention_mask(torch.tensor([[2, -1]]), torch.tensor([[3, 0, -1, 2, 1]]))
    assert mask[0, 0].tolist() == [[False, True, False, True, True], [False] * 5]
    mask = attention_mask(torch.tensor([[2]]), torch.tensor([[0, 1, 2, 3, 4, 5]]), window=2)
    assert mask[0, 0, 0].tolist() == [False, True, True, False, False, False]
    mask = attention_mask(torch.tensor([[2]]), torch.arange(6)[None], causal=False, window=2)
    assert mask[0, 0, 0].tolist() == [False, True, True, True, False, False]


# Caches attach without a change to the layer


class RowsCache:
    """Contiguous: the slot of a key is its position; each row has a length of its own."""

    def __init__(self, batch: int, kv_heads: int, size: int, e: int) -> None:
        self.k, self.v = torch.zeros(2, batch, kv_heads, size, e)
        self.positions = torch.full((batch, size), -1)

    def extend(self, k, v, positions):
        for row in range(len(k)):
            real = positions[row] >= 0
            slots = positions[row][real]
            self.k[row, :, slots], self.v[row, :, slots] = k[row, :, real], v[row, :, real]
            self.positions[row, slots] = slots
        return self.k, self.v, self.positions


class PagedCache:
    """Keys in pages of 2 from one pool, handed out in an order that has nothing to do with rows."""

    def __init__(self, batch: int, kv_heads: int, pages: int, e: int) -> None:
        self.pool = torch.full((2, pages, 2, kv_heads, e), math.nan)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self.table = [[] for _ in range(batch)]
        self.lengths = [0] * batch

    def extend(self, k, v, positions):
        batch = len(k)
        for row in range(batch):
            for i in (positions[row] >= 0).nonzero()[:, 0].tolist():
                at = self.lengths[row]
                if at % 2 == 0:
                    self.table[row].append(self.free.pop())
                page = self.table[row][at // 2]
                self.pool[0, page, at % 2], self.pool[1, page, at % 2] = k[row, :, i], v[row, :, i]
                self.lengths[row] += 1
        longest = max(self.lengths)
        out = torch.zeros(2, batch, longest, *self.pool.shape[3:])
        there = torch.full((batch, longest), -1)
        for row, n in enumerate(self.lengths):
            out[:, row, :n] = self.pool[:, self.table[row]].flatten(1, 2)[:, :n]
            there[row, :n] = torch.arange(n)
        return out[0].transpose(1, 2), out[1].transpose(1, 2), there


class WindowCache:
    """Keeps the last `window` keys; what a chunk brings is seen before it is dropped."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.held = None

    def extend(self, k, v, positions):
        if self.held is not None:
            k, v = torch.cat((self.held[0], k), 2), torch.cat((self.held[1], v), 2)
            positions = torch.cat((self.held[2], positions), 1)
        order = positions.argsort(dim=1, stable=True)[:, -self.window :]
        rows = torch.arange(len(k))[:, None]
        self.held = (
            k[rows, :, order].transpose(1, 2), v[rows, :, order].transpose(1, 2),
            positions.gather(1, order),
        )  # fmt: skip
        return k, v, positions


@pytest.mark.parametrize(
    ("kind", "cache"),
    [*((kind, cache) for kind in LAYERS for cache in ("rows", "paged")), ("window", "window")],
)
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_cached_ragged_decoding_equals_whole_texts(kind, fused, cache):
    ours = layer(kind, fused=fused)
    batch, kv_heads, e = 3, ours.n_kv_heads, ours.head_dim
    prompts, steps = [5, 2, 1], 4
    texts = [normal(1, n + steps, 24, seed=n) for n in prompts]
    kv = {
        "rows": lambda: RowsCache(batch, kv_heads, 12, e),
        "paged": lambda: PagedCache(batch, kv_heads, 20, e),
        "window": lambda: WindowCache(3),
    }[cache]()
    x, positions = torch.full((batch, 5, 24), 50.0), torch.full((batch, 5), -1)
    for row, n in enumerate(prompts):  # prefill, padded on the left
        x[row, 5 - n :], positions[row, 5 - n :] = texts[row][0, :n], torch.arange(n)
    got = [ours(x, positions, kv)[:, -1]]
    for step in range(steps):
        now = torch.stack([text[0, n + step] for text, n in zip(texts, prompts, strict=True)])
        got.append(ours(now[:, None], torch.tensor(prompts)[:, None] + step, kv)[:, 0])
    for row, n in enumerate(prompts):
        want = ours(texts[row])[0, n - 1 :]
        torch.testing.assert_close(torch.stack([g[row] for g in got]), want, **FP32)


@torch.no_grad()
def test_a_store_may_say_that_no_mask_is_needed():
    class Everything(RowsCache):
        def extend(self, k, v, positions):
            return *super().extend(k, v, positions)[:2], None

    ours, x = layer("llama"), normal(3, 6, 24)
    kv = RowsCache(3, 2, 6, 6)
    ours(x[:, :5], torch.arange(5)[None], kv)
    kv.__class__ = Everything
    for ours.fused in (True, False):
        got = ours(x[:, 5:], torch.tensor([[5]]), kv)
        torch.testing.assert_close(got, ours(x)[:, 5:], **FP32)
    ours.alibi = True
    with pytest.raises(ConfigError, match="alibi needs positions"):
        ours(x[:, 5:], torch.tensor([[5]]), kv)


def test_projections_may_be_split_over_heads():
    """Tensor parallelism of chapter 15: the sum of two half layers is the layer."""
    whole, halves = layer("llama"), [Attention(24, 2, 1, 6, rope_theta=1e4) for _ in range(2)]
    x = normal(3, 5, 24)
    for rank, half in enumerate(halves):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(whole, name).weight.chunk(2)[rank]
            getattr(half, name).weight.data = rows
        half.o_proj.weight.data = whole.o_proj.weight.chunk(2, dim=1)[rank]
    torch.testing.assert_close(halves[0](x) + halves[1](x), whole(x), **FP32)


def test_projections_and_norms_may_be_replaced():
    ours, x = layer("llama"), normal(3, 5, 24)
    want = ours(x)
    ours.q_proj = nn.Sequential(ours.q_proj, nn.Identity())
    ours.q_norm, ours.k_norm = nn.Identity(), nn.Identity()
    torch.testing.assert_close(ours(x), want)
    ours.q_norm = nn.RMSNorm(6)
    assert not torch.allclose(ours(x), want)


# Bad input


@pytest.fixture
def unchecked_shapes():
    """Switch jaxtyping off, which in these tests would speak before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"d_model": 128, "n_heads": 3},
            "d_model=128 is not divisible by n_heads=3; use n_heads=2",
        ),
        ({"d_model": 24, "n_heads": 4, "n_kv_heads": 3}, "n_heads a multiple of n_kv_heads"),
        ({"d_model": 24, "n_heads": 0}, "wanted all above 0"),
        ({"d_model": 24, "n_heads": 8, "rope_theta": 1e4}, "head_dim=3 is odd"),
        ({"d_model": 24, "n_heads": 4, "window": 0}, "window=0; use at least 1"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Attention(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, x: a(normal(2, 5, 16)), r"x is \[2, 5, 16\], wanted \[batch, seq, d_model=24\]"),
        (lambda a, x: a(x, torch.zeros(2, 4, dtype=torch.long)), r"wanted integers \[2, 5\] or"),
        (lambda a, x: a(x, torch.zeros(3, 5, dtype=torch.long)), r"wanted integers \[2, 5\] or"),
        (lambda a, x: a(x, kv=a.remember(x)), "cross-attention with causal=False"),
        (lambda a, x: a(x, torch.arange(5)[None] * 1.0), "token_positions makes them"),
        (lambda a, x: a(x, kv=RowsCache(2, 4, 5, 6)), "kv without positions"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(call, message, unchecked_shapes):
    with pytest.raises(ConfigError, match=message):
        call(layer("gpt2"), normal(2, 5, 24))


def test_functions_refuse_what_does_not_fit(unchecked_shapes):
    q, k, v = queries_keys_values(n=9, m=9)
    here = torch.arange(9)[None]
    for function in (attend, fused_attention):
        with pytest.raises(ConfigError, match="queries have width 8 and keys 4"):
            function(q, k[..., :4], v)
        with pytest.raises(ConfigError, match="6 query heads do not form equal groups over 4"):
            function(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    with pytest.raises(ConfigError, match="block_size=0"):
        blockwise_attention(q, k, v, here, here, block_size=0)
    with pytest.raises(ConfigError, match="window=0"):
        attention_mask(here, here, window=0)
    with pytest.raises(ConfigError, match="causal=True with 9 queries, 9 keys"):
        fused_attention(q, k, v, attention_mask(here, here), causal=True)
    with pytest.raises(ConfigError, match="width 7 is odd"):
        rotary_angles(here, 7)


def test_every_public_name_is_documented():
    for name in attention.__all__:
        assert getattr(attention, name).__doc__, name
