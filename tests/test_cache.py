"""The KV cache: cached = uncached for every form of the model, ragged rows, and bad calls."""

import pytest
import torch
from test_model import ALL, build, random_ids

from minilm.attention import KeyValueStore
from minilm.cache import KVCache, cache_bytes
from minilm.decoder import Decoder
from minilm.errors import ConfigError
from minilm.model import Transformer, gpt2_config, llama_config, pad_left

FP32 = {"atol": 1e-5, "rtol": 1e-5}
each_config = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
KINDS = {"model": lambda model: model, "decoder": Decoder}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
each_window = pytest.mark.parametrize("window", [None, 3])
EVERYWHERE = torch.arange(11).expand(3, 11)


def with_window(model: Transformer, window: int | None) -> Transformer:
    """The model with a window in every other layer."""
    for layer in model.layers[::2]:
        layer.self_attn.window = window
    return model


@each_config
@each_window
@each_kind
@torch.no_grad()
def test_cached_is_uncached(config, window, kind):
    """Four tokens, one, one, then five at once: all logits are those of reading the whole text."""
    model = with_window(build(config), window)
    ids, wanted = random_ids(config), None
    wanted = model(ids)
    decoder = kind(model)
    cache = KVCache(config, batch_size=3, max_len=11)
    pieces = [
        decoder(ids[:, part], EVERYWHERE[:, part], cache)
        for part in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 11))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, **FP32)
    assert cache.lengths.tolist() == [11, 11, 11]


@each_config
@each_window
@each_kind
@torch.no_grad()
def test_a_ragged_batch_is_each_row_alone(config, window, kind):
    """Prompts of 7, 3 and 1 tokens, padded on either side, then four more tokens each."""
    model = with_window(build(config), window)
    decoder, lengths, ids = kind(model), [7, 3, 1], random_ids(config)
    wanted = [model(row[None, : n + 4])[0] for row, n in zip(ids, lengths, strict=True)]
    left, where = pad_left([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)])
    right = torch.where(torch.arange(7) < torch.tensor(lengths)[:, None], torch.arange(7), -1)
    for first, positions in ((left, where), (ids[:, :7], right)):
        cache = KVCache(config, batch_size=3, max_len=11)
        got = decoder(first, positions, cache)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(got[i, positions[i] >= 0], wanted[i][:n], **FP32)
        for more in range(4):
            at = torch.tensor(lengths)[:, None] + more
            got = decoder(ids.gather(1, at), at, cache)
            for i, n in enumerate(lengths):
                torch.testing.assert_close(got[i, 0], wanted[i][n + more], **FP32)
        assert cache.lengths.tolist() == [11, 7, 5]


@each_kind
@torch.no_grad()
def test_a_row_may_pause(kind):
    """Position -1 stores nothing, changes no other row, and gives finite logits."""
    model = build(ALL["llama 2 KV heads"])
    decoder, ids = kind(model), random_ids(model.config)
    cache = KVCache(model.config, 3, 11)
    decoder(ids[:, :4], EVERYWHERE[:, :4], cache)
    assert decoder(ids[:, 4:5], torch.tensor([[4], [-1], [4]]), cache).isfinite().all()
    assert cache.lengths.tolist() == [5, 4, 5]
    got = decoder(ids[:, 5:6], torch.tensor([[5], [-1], [5]]), cache)
    torch.testing.assert_close(got[[0, 2], 0], model(ids)[[0, 2], 5], **FP32)
    got = decoder(ids[:, 4:5], torch.tensor([[-1], [4], [-1]]), cache)
    torch.testing.assert_close(got[1, 0], model(ids)[1, 4], **FP32)


@each_kind
@torch.no_grad()
def test_truncate_takes_tokens_back(kind):
    model = build(ALL["llama 2 KV heads"])
    decoder, ids = kind(model), random_ids(model.config)
    cache = KVCache(model.config, 3, 11)
    decoder(random_ids(model.config, seed=5), EVERYWHERE, cache)
    cache.truncate([0, 0, 0])
    decoder(ids[:, :6], EVERYWHERE[:, :6], cache)
    cache.truncate([6, 2, 4])
    assert cache.lengths.tolist() == [6, 2, 4]
    at = torch.tensor([[6], [2], [4]])
    got = decoder(ids.gather(1, at), at, cache)[:, 0]
    torch.testing.assert_close(got, model(ids)[torch.arange(3), at[:, 0]], **FP32)


def test_a_plan_does_not_outlive_what_it_was_made_for():
    """As when a call fails after its first layer, and is taken back."""
    cache, first = KVCache(ALL["llama"], 2, 5), torch.tensor([[0], [0]])
    assert cache.plan(first) is cache.plan(first) and cache.lengths.tolist() == [1, 1]
    cache.truncate([0, 0])
    cache.plan(first)
    assert cache.lengths.tolist() == [1, 1]
    cache.select([1, 0])
    with pytest.raises(ConfigError, match="row 0 holds 1 tokens"):
        cache.plan(first)


@each_kind
@torch.no_grad()
def test_select_keeps_repeats_and_reorders_rows(kind):
    model = build(ALL["gpt2"])
    decoder, ids = kind(model), random_ids(model.config)
    cache = KVCache(model.config, 3, 11)
    first, positions = pad_left([ids[0, :5].tolist(), ids[1, :3].tolist(), ids[2, :4].tolist()])
    decoder(first, positions, cache)
    cache.select([2, 0, 0])
    assert cache.lengths.tolist() == [4, 5, 5]
    rows, at = torch.tensor([2, 0, 0]), torch.tensor([[4], [5], [5]])
    new = ids[rows].gather(1, at)
    new[2] = 7  # the two copies go their own ways
    texts = ids[rows].clone().scatter(1, at, new)
    got = decoder(new, at, cache)[:, 0]
    torch.testing.assert_close(got, model(texts)[torch.arange(3), at[:, 0]], **FP32)


@torch.no_grad()
def test_bfloat16():
    model = build(ALL["llama 2 KV heads"]).bfloat16()
    ids = random_ids(model.config)
    cache = KVCache(model.config, 3, 11, torch.bfloat16)
    pieces = [model(ids[:, i : i + 1], EVERYWHERE[:, i : i + 1], cache) for i in range(11)]
    got, wanted = torch.cat(pieces, dim=1).float(), model(ids).float()
    assert cache[0].k.dtype == torch.bfloat16
    assert (got - wanted).abs().mean() / wanted.std() < 0.02  # two orders of bfloat16 sums


@each_config
def test_the_bytes_are_the_formula(config):
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, 3, 17, dtype)
        assert cache.nbytes == cache_bytes(config, 3, 17, dtype)
    assert len(cache) == config.n_layers == len(list(cache))
    assert all(isinstance(layer, KeyValueStore) for layer in cache)


def test_published_bytes_of_a_token():
    """Llama 2 7B: half a megabyte in 16 bits; SmolLM2-135M: 45 KiB in float32."""
    llama2 = llama_config(32_000, 4096, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008)
    assert cache_bytes(llama2, 1, 1, torch.float16) == 524_288
    smol = llama_config(49_152, 8192, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3)
    assert cache_bytes(smol, 1, 1) == 46_080 and cache_bytes(smol, 4, 100) == 400 * 46_080


def test_what_extend_returns_is_a_view_with_positions():
    config = ALL["llama 2 KV heads"]
    cache = KVCache(config, 2, 8)
    k = torch.randn(2, 2, 3, config.head_dim)
    keys, values, there = cache[1].extend(k, 2 * k, torch.tensor([[0, 1, 2], [-1, -1, 0]]))
    assert there.tolist() == [[0, 1, 2], [0, -1, -1]]
    assert torch.equal(keys[0], k[0]) and torch.equal(values[1, :, 0], 2 * k[1, :, 2])
    assert keys.data_ptr() == cache[1].k.data_ptr()
    assert (cache[0].k == 0).all()  # another layer's


# Bad calls


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_as_it_was():
    model = build(ALL["llama"])
    ids = random_ids(model.config)
    cache = KVCache(model.config, 3, 6)
    with pytest.raises(ConfigError, match=r"full: 11 tokens in row 0, room for max_len=6.*short"):
        model(ids, EVERYWHERE, cache)
    model(ids[:, :6], EVERYWHERE[:, :6], cache)
    kept = cache[0].k.clone()
    with pytest.raises(ConfigError, match=r"full: 7 tokens .*max_len=7 or more"):
        model(ids[:, 6:7], EVERYWHERE[:, 6:7], cache)
    assert cache.lengths.tolist() == [6, 6, 6] and torch.equal(kept, cache[0].k)


@each_kind
@torch.no_grad()
def test_positions_must_be_the_next_ones(kind):
    model = build(ALL["llama"])
    decoder, ids = kind(model), random_ids(model.config)
    cache = KVCache(model.config, 3, 11)
    with pytest.raises(ConfigError, match=r"row 0 holds 0 tokens.*\[1\]; go on at 0"):
        decoder(ids[:, :1], EVERYWHERE[:, 1:2], cache)
    decoder(ids[:, :4], EVERYWHERE[:, :4], cache)
    for start in (3, 5):
        with pytest.raises(ConfigError, match=rf"row 0 holds 4 tokens.*\[{start}\]; go on at 4"):
            decoder(ids[:, start : start + 1], EVERYWHERE[:, start : start + 1], cache)
    with pytest.raises(ConfigError, match=r"row 2 holds 4 tokens.*\[5, 4\]"):
        decoder(ids[:, :2], torch.tensor([[4, 5], [-1, 4], [5, 4]]), cache)
    decoder(ids[:, 4:5], EVERYWHERE[:, 4:5], cache)
    with pytest.raises(ConfigError, match=r"row 0 holds 5 tokens"):  # forgot to move on
        decoder(ids[:, 4:5], EVERYWHERE[:, 4:5], cache)
    with pytest.raises(ConfigError, match=r"2 rows for a cache of batch_size=3"):
        decoder(ids[:2, :1], EVERYWHERE[:2, :1], cache)


@torch.no_grad()
def test_positions_changed_in_place_are_seen():
    model = build(ALL["llama"])
    ids, positions = random_ids(model.config), torch.zeros(3, 1, dtype=torch.int64)
    cache = KVCache(model.config, 3, 11)
    for i in range(4):
        got = model(ids[:, i : i + 1], positions, cache)
        positions += 1
    torch.testing.assert_close(got[:, 0], model(ids)[:, 3], **FP32)


def test_bad_sizes_rows_and_lengths():
    config = ALL["llama"]
    cache = KVCache(config, 2, 5)
    cases = [
        (lambda: KVCache(config, 0, 5), "batch_size=0, max_len=5"),
        (lambda: KVCache(config, 1, 0), "max_len=0"),
        (lambda: KVCache(gpt2_config(9, 6, 8, 1, 1), 1, 7), "learned 6 positions"),
        (lambda: cache.select([]), "rows \\[\\] of a cache of batch_size=2"),
        (lambda: cache.select([2]), "from 0 to 1"),
        (lambda: cache.select([-1]), "from 0 to 1"),
        (lambda: cache.truncate([1, 0]), r"to \[1, 0\], but the rows hold \[0, 0\]"),
        (lambda: cache.truncate([-1, 0]), "one length from 0"),
        (lambda: cache.truncate([0]), "one length from 0"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
