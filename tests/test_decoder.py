"""The Decoder: equal logits for every form of the model, packed matrices, and bad input."""

import gc
import weakref

import numpy as np
import pytest
import torch
from test_model import ALL, build, random_ids
from torch import nn
from torch.nn import functional as F  # noqa: N812

from minilm import decoder as module
from minilm.cache import KVCache
from minilm.decoder import Decoder, FastRMSNorm, PackedLinear, fits_fbgemm, join_linears
from minilm.errors import ConfigError
from minilm.generation import GREEDY, generate
from minilm.measure import ByteTokenizer, LanguageModel
from minilm.model import RMSNorm, Transformer, llama_config, pad_left

FP32 = {"atol": 1e-5, "rtol": 1e-5}
each_config = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


@each_config
@torch.no_grad()
def test_logits_are_those_of_the_model(config):
    """Whole texts, and a batch that is padded on the left."""
    model, ids = build(config), random_ids(config)
    decoder = Decoder(model)
    torch.testing.assert_close(decoder(ids), model(ids), **FP32)
    ids, positions = pad_left([[1, 2, 3, 4, 5], [6], [7, 8]])
    here = positions >= 0
    torch.testing.assert_close(decoder(ids, positions)[here], model(ids, positions)[here], **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_config
@torch.no_grad()
def test_16_bit_weights_are_rounded_and_nothing_else_is(config, dtype):
    """As near to float32 as the model whose matrices are rounded, and computed in float32."""
    model = build(config)
    decoder = Decoder(model, dtype)
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 2 and "embed_positions" not in name) or "proj.bias" in name:
            parameter.copy_(parameter.to(dtype))
    ids = random_ids(config)
    logits = decoder(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_is_nearer_to_float32_than_the_model_in_bfloat16():
    model = build(ALL["llama 2 KV heads"])
    ids = random_ids(model.config)
    exact = model(ids)
    ours = (Decoder(model, torch.bfloat16)(ids) - exact).abs().mean()
    plain = (model.bfloat16()(ids).float() - exact).abs().mean()
    from_bf16 = Decoder(model)  # the dtype of the model
    assert ours < plain and from_bf16.embed_tokens.weight.dtype == torch.bfloat16
    assert next(from_bf16.norm.parameters()).dtype == torch.float32


@torch.no_grad()
def test_float64_stays_float64():
    model = build(ALL["qwen3-like"]).double()
    ids = random_ids(model.config)
    torch.testing.assert_close(Decoder(model)(ids), model(ids), atol=1e-12, rtol=1e-12)


def test_it_is_a_language_model():
    model = build(llama_config(257, 16, d_model=24, n_layers=2, n_heads=2), 0, ByteTokenizer())
    decoder = Decoder(model)
    assert isinstance(decoder, LanguageModel) and decoder.begin_id == 256
    assert decoder.max_seq_len == 16 and decoder.tokenizer is model.tokenizer
    ids = np.random.default_rng(0).integers(0, 256, (3, 16))
    assert np.allclose(decoder.log_probs(ids), model.log_probs(ids), atol=1e-5)
    assert not hasattr(Decoder(build(ALL["llama"])), "tokenizer")


def test_it_has_no_gradients_and_leaves_the_model_as_it_was():
    model = build(ALL["gpt2"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = Decoder(model, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not decoder.training and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_may_be_thrown_away():
    model = build(ALL["llama 2 KV heads"])
    decoder, ids = Decoder(model), random_ids(model.config)
    wanted, gone = decoder(ids), weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert gone() is None and torch.equal(decoder(ids), wanted)


# Matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("road", ["quick", "fallback"])
def test_a_packed_linear_is_f_linear(dtype, bias, road, monkeypatch):
    """Both roads, one row to many; the exact answer is that of float64."""
    if road == "fallback":
        monkeypatch.setattr(module, "fits_fbgemm", lambda weight: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 53, generator=generator).to(dtype)
    offset = torch.randn(37, generator=generator).to(dtype) if bias else None
    layer = PackedLinear(weight, offset)
    assert layer.nbytes == (37 * 53 + 37 * bias) * dtype.itemsize
    loose = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 2e-5)
    for shape in ((1, 53), (3, 1, 53), (2, 9, 53)):
        x = torch.randn(shape, generator=generator)
        x = x if dtype != torch.float64 else x.double()
        exact = F.linear(x.double(), weight.double(), None if not bias else offset.double())
        got = layer(x)
        assert got.dtype == x.dtype and got.shape == exact.shape
        tolerance = 2e-5 if road == "quick" and fits_fbgemm(weight) else loose
        torch.testing.assert_close(got.double(), exact, atol=tolerance * 10, rtol=tolerance)
    layer = PackedLinear(weight, offset)
    weight.zero_()
    assert dtype == torch.float64 or layer(x).abs().max() > 0.1 or road == "fallback"


def test_fbgemm_is_there_and_its_limits():
    """On x86 processors; elsewhere the fallback serves."""
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert fits_fbgemm(weight) and fits_fbgemm(weight.half())
    assert not fits_fbgemm(weight.float()) and not fits_fbgemm(70_000 * weight)
    large = PackedLinear(70_000 * weight)
    assert (large(torch.ones(1, 3)) - 3 * 70_000).abs().max() < 2000
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() <= 65504) & (every.abs() >= 2.0**-17)]
    layer = PackedLinear(every[:, None])
    assert torch.equal(layer(torch.ones(1, 1))[0], every.float())  # each bfloat16 number, exactly


def test_a_fast_norm_is_the_norm():
    torch.manual_seed(0)
    for scale in (1e-4, 1.0, 1e3):
        norm = RMSNorm(48, eps=1e-5)
        nn.init.normal_(norm.weight)
        x = scale * torch.randn(3, 5, 48)
        got = FastRMSNorm(norm, torch.float32)(x)
        torch.testing.assert_close(got, norm(x).detach(), **FP32)
    assert FastRMSNorm(norm, torch.float32)(torch.zeros(1, 48)).isfinite().all()


# Other linears


@torch.no_grad()
def test_a_factory_makes_every_matrix():
    """Joined, in the order that is promised; the last is that of the logits."""
    made = []

    def factory(weight, bias):
        made.append((tuple(weight.shape), bias is not None, weight.dtype))
        return PackedLinear(weight, bias)

    config = ALL["llama 2 KV heads"]  # 4 heads of 12, 2 KV heads, d_ff 128
    decoder = Decoder(build(config), linear=factory)
    layer = [(96, 48), (48, 48), (2 * config.d_ff, 48), (48, config.d_ff)]
    assert [shape for shape, _, _ in made] == layer * 3 + [(101, 48)]
    assert decoder.weight_bytes == 4 * sum(a * b for (a, b), _, _ in made)
    made.clear()
    tied = Decoder(build(ALL["gpt2"]), torch.bfloat16, factory)
    assert [bias for _, bias, _ in made] == [True] * 12 + [False]
    assert {dtype for _, _, dtype in made} == {torch.bfloat16} and made[-1][0] == (101, 48)
    assert tied.weight_bytes == 2 * sum(a * b + a * bias for (a, b), bias, _ in made)


class Doubled(nn.Module):
    """Another kind of layer: keeps twice its weight."""

    def __init__(self, weight):
        super().__init__()
        self.twice = 2 * weight.detach()

    @classmethod
    def concatenate(cls, layers):
        return cls(torch.cat([layer.twice / 2 for layer in layers]))

    def forward(self, x):
        return F.linear(x, self.twice / 2)


@torch.no_grad()
def test_layers_of_another_kind_are_joined_by_their_own_method():
    model = build(ALL["llama 2 KV heads"])
    ids = random_ids(model.config)
    wanted = model(ids)
    for block in model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, part in list(owner.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(owner, name, Doubled(part.weight))
    decoder = Decoder(model)
    assert isinstance(decoder.layers[0].qkv, Doubled)
    assert decoder.layers[0].o is model.layers[0].self_attn.o_proj
    torch.testing.assert_close(decoder(ids), wanted, **FP32)
    cache = KVCache(model.config, 3, 11)
    got = [decoder(ids[:, i : i + 1], torch.full((3, 1), i), cache) for i in range(11)]
    torch.testing.assert_close(torch.cat(got, dim=1), wanted, **FP32)


def test_joining_is_side_by_side():
    torch.manual_seed(0)
    layers, x = [nn.Linear(5, n) for n in (3, 1, 4)], torch.randn(2, 6, 5)
    got = join_linears(layers, PackedLinear)(x)
    torch.testing.assert_close(got, torch.cat([layer(x) for layer in layers], dim=-1), **FP32)


# Bad input


def test_what_cannot_be_arranged(monkeypatch):
    model = build(ALL["llama"])
    decoder, ids = Decoder(model), random_ids(model.config)
    cache, positions = KVCache(model.config, 3, 11), torch.arange(11)[None]
    patched = build(ALL["llama"])
    patched.layers[1].self_attn.q_proj = nn.Sequential(patched.layers[1].self_attn.q_proj)
    cases = [
        (lambda: Decoder(patched), "Sequential, Linear, Linear cannot become one layer"),
        (lambda: Decoder(model, torch.int8), "dtype=torch.int8; use a float type"),
        (lambda: decoder(ids, kv=cache), "with positions False"),
        (lambda: decoder(ids, positions, kv=[]), "0 stores for 3 layers"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


@torch.no_grad()
def test_positions_of_one_row_serve_all():
    model, decoder = build(ALL["gpt2"]), Decoder(build(ALL["gpt2"]))
    ids, positions = random_ids(model.config), torch.arange(11)[None]
    torch.testing.assert_close(decoder(ids, positions), model(ids), **FP32)
    got = decoder(ids, positions, KVCache(model.config, 3, 11))
    torch.testing.assert_close(got, model(ids), **FP32)


def test_a_deep_narrow_model_writes_the_same():
    """30 layers: errors do not add up to another id."""
    model = build(llama_config(257, 64, d_model=24, n_layers=30, n_heads=3, n_kv_heads=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    prompts = [[1, 2, 3], [200]]
    assert isinstance(Decoder(model), Transformer)
    assert generate(Decoder(model), prompts, 40, GREEDY) == generate(model, prompts, 40, GREEDY)
