"""Optimizers and schedules: parity with torch and transformers, then properties, then bad input."""

import json
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from minilm.errors import ConfigError
from minilm.model import Transformer, gpt2_config, llama_config, next_token_loss
from minilm.optim import (
    SCHEDULES,
    SGD,
    Adam,
    AdamW,
    ForeachOptimizer,
    Muon,
    MuonAdamW,
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    constant,
    cosine,
    gradient_noise_scale,
    linear,
    matrices_and_others,
    newton_schulz,
    parameter_groups,
    set_learning_rate,
    wsd,
)

STEPS = 100
SHAPES = [(4, 6), (6, 4), (5, 5), (6, 4), (3, 9)]  # wide, tall, square; two that share a stack
VECTORS = [(7,), (2, 3, 4), ()]

# Ours, theirs, settings of both.
PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.05}),
    "sgd decay": (SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.2}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "nesterov": (
        SGD,
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    "adam": (Adam, torch.optim.Adam, {}),
    "adam settings": (
        Adam,
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    ),
    "adamw": (AdamW, torch.optim.AdamW, {}),
    "adamw settings": (
        AdamW,
        torch.optim.AdamW,
        {"lr": 0.03, "betas": (0.7, 0.97), "eps": 1e-4, "weight_decay": 0.5},
    ),
}
each_pair = pytest.mark.parametrize("ours, theirs, settings", PAIRS.values(), ids=PAIRS.keys())


def parameters(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def gradients(params, step):
    """A noisy bowl's. Depends on where the parameters are, so that an error would grow."""
    generator = torch.Generator().manual_seed(1000 + step)
    for scale, p in enumerate(params, 1):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (0.1 * scale * p.detach() + 0.3 * noise).to(p.dtype)


def follow(optimizer, params, start=0, stop=STEPS):
    for step in range(start, stop):
        gradients(params, step)
        if step % 7 == 3:
            params[1].grad = None  # a parameter that a batch does not touch
        optimizer.step()
    return [p.detach().clone() for p in params]


def distance(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.fixture
def exact_muon(monkeypatch):
    """torch.optim.Muon computes in bfloat16; without that conversion it is exact."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())


# Parity: 100 steps as torch.optim


@each_pair
def test_optimizers_are_torchs(ours, theirs, settings):
    settings = {"lr": 0.01} | settings
    mine, reference = parameters(SHAPES + VECTORS), parameters(SHAPES + VECTORS)
    here = follow(ours(mine, **settings), mine)
    there = follow(theirs(reference, **settings), reference)
    assert distance(here, there) < 1e-10
    assert distance(here, [p.detach() for p in parameters(SHAPES + VECTORS)]) > 0.1  # it did move


@each_pair
def test_float32_to_its_precision(ours, theirs, settings):
    settings = {"lr": 0.01} | settings
    mine, reference = (parameters(SHAPES, torch.float32) for _ in range(2))
    here = follow(ours(mine, **settings), mine)
    there = follow(theirs(reference, **settings), reference)
    assert distance(here, there) < 1e-5


@each_pair
def test_groups_have_their_own_settings(ours, theirs, settings):
    results = []
    for optimizer in (ours, theirs):
        params = parameters(SHAPES)
        groups = [{"params": params[:2], "lr": 0.07}, {"params": params[2:], "weight_decay": 0.4}]
        results.append(follow(optimizer(groups, **({"lr": 0.01} | settings)), params))
    assert distance(*results) < 1e-10


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(exact_muon, scale, nesterov):
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    mine, reference = parameters(SHAPES), parameters(SHAPES)
    here = follow(Muon(mine, **settings, scale=scale, dtype=torch.float64, ns_steps=4), mine)
    theirs = torch.optim.Muon(reference, **settings, adjust_lr_fn=scale, ns_steps=4)
    assert distance(here, follow(theirs, reference)) < 1e-10


def test_muons_defaults_are_the_contract(exact_muon):
    mine, reference = parameters(SHAPES), parameters(SHAPES)
    here = follow(Muon(mine, dtype=torch.float64), mine)
    theirs = torch.optim.Muon(reference, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1)
    assert distance(here, follow(theirs, reference)) < 1e-10


def test_muon_in_bfloat16_is_torchs_to_bfloat16s_precision():
    # One step: what two roundings do to an iteration that is stopped early is then not followed.
    mine, reference = (parameters(SHAPES, torch.float32) for _ in range(2))
    here = follow(Muon(mine, dtype=torch.bfloat16), mine, stop=1)
    theirs = torch.optim.Muon(reference, lr=0.02)
    assert distance(here, follow(theirs, reference, stop=1)) < 0.02 * 2 * 2**-7


def test_muon_adamw_is_both(exact_muon):
    mine, reference = parameters(SHAPES + VECTORS), parameters(SHAPES + VECTORS)
    split = len(SHAPES)
    both = MuonAdamW(mine[:split], mine[split:], lr=0.03, adamw_lr=0.01, dtype=torch.float64)
    muon = torch.optim.Muon(
        reference[:split], lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(reference[split:], lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for step in range(STEPS):
        for params, optimizers in ((mine, [both]), (reference, [muon, adamw])):
            gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
    assert distance(mine, reference) < 1e-10


def make(name, params):
    """One of each kind, by the name of the test."""
    kinds = {
        "sgd": lambda: SGD(params, 0.05, 0.9, nesterov=True, weight_decay=0.1),
        "adam": lambda: Adam(params, 0.02, weight_decay=0.1),
        "adamw": lambda: AdamW(params, 0.02),
        "muon": lambda: Muon(params, dtype=torch.float32),
        "muon and adamw": lambda: MuonAdamW(params[:3], params[3:], adamw_lr=0.01),
    }
    return kinds[name]()


each_kind = pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon", "muon and adamw"])


@each_kind
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name):
    params = parameters(SHAPES, torch.float32)
    straight = follow(make(name, params), params)

    first = parameters(SHAPES, torch.float32)
    optimizer = make(name, first)
    set_learning_rate(optimizer, 1.0)
    half = follow(optimizer, first, stop=50)
    saved = optimizer.state_dict()
    groups = json.loads(json.dumps(saved["param_groups"]))  # as a checkpoint keeps them
    second = [nn.Parameter(p) for p in half]
    resumed = make(name, second)
    resumed.load_state_dict({"state": saved["state"], "param_groups": groups})
    assert distance(follow(resumed, second, start=50), straight) == 0.0


@each_kind
def test_the_state_is_tensors_and_json(name):
    params = parameters(SHAPES, torch.float32)
    optimizer = make(name, params)
    follow(optimizer, params, stop=3)
    saved = optimizer.state_dict()
    assert json.dumps(saved["param_groups"])
    assert all(
        isinstance(v, torch.Tensor) for state in saved["state"].values() for v in state.values()
    )
    assert len(saved["state"]) == len(SHAPES)


@each_pair
def test_state_can_be_exchanged_with_torch(ours, theirs, settings):
    settings = {"lr": 0.01} | settings
    results = []
    for begin, end in ((theirs, theirs), (theirs, ours), (ours, theirs)):
        if end is torch.optim.SGD and begin is SGD:
            continue  # theirs asks for settings, such as dampening, that ours does not have
        params = parameters(SHAPES)
        optimizer = begin(params, **settings)
        follow(optimizer, params, stop=30)
        other = end(params, **settings)
        other.load_state_dict(optimizer.state_dict())
        results.append(follow(other, params, start=30, stop=60))
    assert all(distance(results[0], other) < 1e-10 for other in results[1:])


@each_kind
def test_gradients_are_left_as_they_are(name):
    params = parameters(SHAPES)
    optimizer = make(name, params)
    for step in range(3):
        gradients(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert distance(before, [p.grad for p in params]) == 0.0


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_dtype(name, dtype):
    params = parameters(SHAPES, dtype)
    moved = follow(make(name, params), params, stop=5)
    assert all(p.dtype == dtype and p.isfinite().all() for p in moved)


def test_a_closure_computes_the_gradients():
    params = parameters(SHAPES[:1])
    optimizer = SGD(params, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss.item()

    before = params[0].square().sum().item()
    assert optimizer.step(closure) == before
    assert torch.allclose(params[0], 0.8 * parameters(SHAPES[:1])[0])


def test_an_update_must_be_written():
    params = parameters(SHAPES[:1])
    gradients(params, 0)
    with pytest.raises(NotImplementedError):
        ForeachOptimizer(params, {"lr": 0.1}).step()


# Newton-Schulz


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6), (3, 4, 12, 5)])
def test_newton_schulz_evens_out_singular_values_and_keeps_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = newton_schulz(matrix)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ result @ vh.mT  # the result in the coordinates of the singular vectors
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert result.shape == matrix.shape
    assert (values > 0.3).all() and (values < 1.3).all()
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9


def test_newton_schulz_is_its_polynomial():
    values = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(newton_schulz(torch.diag(values)), torch.diag(expected), atol=1e-12)
    assert ((expected > 0.6) & (expected < 1.25)).all()


def test_newton_schulz_of_a_stack_is_that_of_each_and_nothing_is_overwritten():
    stack = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = stack.clone()
    together = newton_schulz(stack, steps=3)
    assert all(
        torch.allclose(together[i], newton_schulz(stack[i], 3), atol=1e-12) for i in range(5)
    )
    assert torch.equal(stack, kept)
    assert newton_schulz(torch.zeros(2, 3)).abs().max() == 0.0
    assert newton_schulz(stack, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (9, 9)])
def test_match_rms_adamw_moves_numbers_as_adamw_does(shape):
    # Singular values of the step are between 0.7 and 1.2, so its RMS is 0.2 times that, times lr.
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0, scale="match_rms_adamw", dtype=torch.float32).step()
    assert 0.2 * 0.6 < p.square().mean().sqrt() < 0.2 * 1.25


# Which parameters


CONFIGS = {
    "gpt2": gpt2_config(50, 16, 24, 2, 3),
    "gpt2 untied": gpt2_config(50, 16, 24, 2, 3, tie_embeddings=False),
    "llama": llama_config(50, 16, 24, 2, 3),
    "llama tied, qk norm": llama_config(50, 16, 24, 2, 3, tie_embeddings=True, qk_norm=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def names_of(model, params):
    wanted = {id(p) for p in params}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@each_config
def test_matrices_decay_and_vectors_and_embeddings_do_not(config):
    model = Transformer(config)
    groups = parameter_groups(model, 0.3)
    decayed = names_of(model, [p for g in groups if g["weight_decay"] == 0.3 for p in g["params"]])
    rest = names_of(model, [p for g in groups if g["weight_decay"] == 0.0 for p in g["params"]])
    every = {name for name, _ in model.named_parameters()}
    assert decayed == {n for n in every if n.endswith(("_proj.weight", "lm_head.weight"))}
    assert decayed | rest == every and not decayed & rest


@each_config
def test_muon_gets_the_matrices_inside(config):
    model = Transformer(config)
    matrices, others = matrices_and_others(model)
    every = {name for name, _ in model.named_parameters()}
    inside = {n for n in every if n.startswith("layers.") and n.endswith("_proj.weight")}
    assert names_of(model, matrices) == inside
    assert names_of(model, others) == every - inside
    assert len(matrices) + len(others) == len(every)


def test_frozen_parameters_are_left_out():
    model = Transformer(CONFIGS["gpt2"])
    model.layers[0].requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    groups = parameter_groups(model, 0.1)
    assert frozen and not frozen & names_of(model, [p for g in groups for p in g["params"]])
    assert not frozen & names_of(
        model, [*matrices_and_others(model)[0], *matrices_and_others(model)[1]]
    )
    assert parameter_groups(nn.LayerNorm(3), 0.1)[0]["weight_decay"] == 0.0  # one group only


# Clipping


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs(max_norm, dtype):
    mine, reference = (parameters(SHAPES + VECTORS, dtype) for _ in range(2))
    for params in (mine, reference):
        gradients(params, 0)
        params[2].grad = None
    norm = clip_gradients(mine, max_norm)
    assert torch.isclose(norm, nn.utils.clip_grad_norm_(reference, max_norm), atol=1e-7)
    for a, b in zip(mine, reference, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-7)
    assert clip_gradients(iter(mine), math.inf) <= max_norm * (1 + 1e-6)


def test_clipping_edges():
    params = parameters(SHAPES)
    assert clip_gradients(params, 1.0) == 0.0  # no gradient anywhere
    gradients(params, 0)
    before = [p.grad.clone() for p in params]
    clip_gradients(params, math.inf)
    assert distance(before, [p.grad for p in params]) == 0.0
    params[0].grad[0, 0] = math.nan
    assert not clip_gradients(params, 1.0).isfinite()
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="max_norm"):
            clip_gradients(params, bad)


# Gradient noise


def test_noise_scale_of_known_noise():
    # Gradients signal + noise: |signal|^2 = 4, tr(covariance) = 50 * 9, so the scale is 112.5.
    # The estimate from 4,000 pairs has a deviation of 1.1 (found by repeating): 10 is 9 of them.
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(50, dtype=torch.float64)
    signal[0] = 2.0

    def squares(batch, count):
        noise = torch.randn(count, 50, generator=generator, dtype=torch.float64)
        return (signal + 3.0 * noise / batch**0.5).square().sum(1).tolist()

    estimate = gradient_noise_scale(squares(8, 16_000), squares(128, 4_000), 8, 128)
    assert abs(estimate - 112.5) < 10


def test_noise_scale_by_hand():
    # signal + noise / batch = 10 at batch 1 and 4 at batch 4: noise 8, signal 2.
    assert gradient_noise_scale([9.0, 11.0], [4.0], 1, 4) == pytest.approx(4.0)
    assert gradient_noise_scale([5.0], [5.0], 2, 8) == 0.0  # no noise
    assert gradient_noise_scale([8.0], [1.0], 2, 8) == math.inf  # all noise, or unlucky
    for small, large, batches in (([], [1.0], (1, 2)), ([1.0], [], (1, 2)), ([1.0], [1.0], (2, 2))):
        with pytest.raises(ConfigError, match="wanted at least one of each"):
            gradient_noise_scale(small, large, *batches)


# Schedules


def rates_of(scheduler_of, total):
    """The learning rates of a scheduler of torch or transformers, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = scheduler_of(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs():
    theirs = rates_of(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.1), 50
    )
    assert [cosine(t, 50, final=0.1) for t in range(50)] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_after_the_warmup_schedules_are_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours = SCHEDULES[name.split("_")[0]]
    theirs = rates_of(lambda o: transformers.get_scheduler(name, o, 10, 60), 60)
    assert [ours(t, 60, 10) for t in range(10, 60)] == pytest.approx(theirs[10:], abs=1e-12)
    # Their first step has the rate 0 and so is lost; ours has one tenth.
    assert [ours(t, 60, 10) for t in range(9)] == pytest.approx(theirs[1:10], abs=1e-12)


def test_wsd_by_hand():
    factors = [wsd(t, 14, warmup=4, final=0.2, decay=0.4) for t in range(15)]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert factors == pytest.approx(expected)
    assert [wsd(t, 100) for t in (80, 81, 99)] == pytest.approx([1, 0.95, 0.05])


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 60),
    st.data(),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall_between_their_ends(name, total, data, final):
    warmup = data.draw(st.integers(0, total - 1))
    factors = [SCHEDULES[name](t, total, warmup, final) for t in range(total + 1)]
    top = max(warmup - 1, 0)
    assert factors[top] == pytest.approx(1.0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0
    if name != "constant":
        assert factors[-1] == pytest.approx(final)
        assert SCHEDULES[name](total + 5, total, warmup, final) == pytest.approx(final)
        if final == 0.0:
            assert factors[-2] > 0  # no step is lost


@pytest.mark.parametrize("schedule", [constant, linear, cosine, wsd])
@pytest.mark.parametrize("numbers", [(-1, 10, 0), (0, 10, 10), (0, 10, -1), (0, 0, 0)])
def test_impossible_schedules_are_refused(schedule, numbers):
    with pytest.raises(ConfigError, match="wanted step from 0 up"):
        schedule(*numbers)


def test_learning_rates_are_set_relative_to_the_first():
    params = parameters(SHAPES)
    groups = [{"params": params[:2], "lr": 0.4}, {"params": params[2:]}]
    optimizer = SGD(groups, lr=0.1)
    for factor in (0.5, 0.25, 1.0):
        set_learning_rate(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.1 * factor])
    set_learning_rate(optimizer, 0.0)
    resumed = SGD(parameters(SHAPES), lr=0.7)
    resumed.load_state_dict(SGD(params, lr=0.7).state_dict())
    other = SGD([{"params": params[:2]}, {"params": params[2:]}], lr=9.0)
    other.load_state_dict(optimizer.state_dict())
    set_learning_rate(other, 1.0)
    assert [group["lr"] for group in other.param_groups] == [0.4, 0.1]


# By name


@pytest.mark.parametrize(
    "name, kind", [("sgd", SGD), ("adam", Adam), ("adamw", AdamW), ("muon", MuonAdamW)]
)
@each_config
def test_every_optimizer_trains_every_model(name, kind, config):
    torch.manual_seed(0)
    model = Transformer(config)
    settings = OptimizerConfig(name, lr={"sgd": 0.1}.get(name, 0.01), weight_decay=0.3)
    optimizer = build_optimizer(model, settings)
    assert type(optimizer) is kind
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert names_of(model, owned) == {n for n, _ in model.named_parameters()}
    assert len(owned) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        for n in names_of(model, group["params"]):
            inside = n.endswith("_proj.weight") or (n == "lm_head.weight" and name != "muon")
            assert group["weight_decay"] == (0.3 if inside else 0.0), n
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(20):
        set_learning_rate(optimizer, settings.factor(step, 20))
        optimizer.zero_grad()
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15


def test_build_hands_every_setting_on():
    model = Transformer(CONFIGS["llama"])
    numbers = {"lr": 0.3, "weight_decay": 0.2, "betas": (0.5, 0.6), "momentum": 0.7}
    sgd = build_optimizer(model, OptimizerConfig("sgd", **numbers)).param_groups
    assert all((g["lr"], g["momentum"], g["nesterov"]) == (0.3, 0.7, True) for g in sgd)
    plain = build_optimizer(model, OptimizerConfig("sgd", momentum=0.0))
    assert not plain.param_groups[0]["nesterov"]
    for name in ("adam", "adamw"):
        groups = build_optimizer(model, OptimizerConfig(name, **numbers)).param_groups
        assert all((g["lr"], g["betas"]) == (0.3, (0.5, 0.6)) for g in groups)
    muon = build_optimizer(model, OptimizerConfig("muon", adamw_lr=0.1, ns_steps=3, **numbers))
    one, other = muon.param_groups
    assert (one["muon"], one["lr"], one["momentum"], muon.ns_steps) == (True, 0.3, 0.7, 3)
    assert (other["muon"], other["lr"], other["betas"]) == (False, 0.1, (0.5, 0.6))
    same = build_optimizer(model, OptimizerConfig("muon", lr=0.3))
    assert [g["lr"] for g in same.param_groups] == [0.3, 0.3]
    assert same.scale == "match_rms_adamw"


def test_the_configs_factor_is_its_schedules():
    config = OptimizerConfig(schedule="wsd", warmup=5, final_factor=0.3)
    assert [config.factor(t, 50) for t in range(50)] == [wsd(t, 50, 5, 0.3) for t in range(50)]
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "wsd"}


def test_the_config_is_json():
    config = OptimizerConfig()
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    assert json.loads(json.dumps(values))["name"] == "adamw"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"name": "lion"}, "use one of sgd, adam, adamw, muon"),
        ({"schedule": "cosin"}, "use one of constant, linear, cosine, wsd"),
        ({"lr": 0.0}, "lr above 0"),
        ({"lr": math.nan}, "lr above 0"),
        ({"adamw_lr": -0.1}, "adamw_lr=-0.1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "beta2=1.0"),
        ({"betas": (-0.1, 0.9)}, "beta1=-0.1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"ns_steps": 0}, "ns_steps=0"),
        ({"warmup": -1}, "warmup from 0 up"),
        ({"final_factor": 1.5}, "final_factor from 0 to 1"),
        ({"clip": 0.0}, "clip=0.0"),
    ],
)
def test_bad_configs_are_refused(change, says):
    # beartype refuses a wrong literal before we do; without it the sentence is ours.
    with pytest.raises((ConfigError, TypeError)) as caught:
        OptimizerConfig(**change)
    if isinstance(caught.value, ConfigError):
        assert says in str(caught.value)
    else:
        assert "name" in change or "schedule" in change


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda p: SGD(p, -0.1), "lr=-0.1"),
        (lambda p: SGD(p, 0.1, momentum=1.5), "momentum=1.5"),
        (lambda p: SGD(p, 0.1, nesterov=True), "nesterov=True with momentum=0"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "beta2=1.0"),
        (lambda p: AdamW(p, weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda p: AdamW(p, lr=math.nan), "lr=nan"),
        (lambda p: Muon(p, momentum=-0.1), "momentum=-0.1"),
        (lambda p: Muon(p, ns_steps=0), "ns_steps=0"),
        (lambda p: MuonAdamW(p, [], adamw_lr=-1.0), "adamw_lr=-1.0"),
    ],
)
def test_impossible_settings_are_refused(build, says):
    with pytest.raises(ConfigError, match=says):
        build(parameters(SHAPES))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ConfigError, match=r"shape \[7\], wanted a matrix"):
        Muon(parameters([(4, 5), (7,)]))
    with pytest.raises(ConfigError, match="wanted a matrix"):
        MuonAdamW(parameters([(2, 3, 4)]), [])


def test_a_ravine_needs_more_than_gradient_descent():
    # The chapter's opening, as a test: f = (x^2 + 100 y^2) / 2 from (10, 1), 100 steps each.
    curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
    left = {}
    for name, build in {
        "sgd": lambda p: SGD(p, 0.018),
        "momentum": lambda p: SGD(p, 0.02, momentum=0.8),
    }.items():
        p = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
        optimizer = build([p])
        for _ in range(100):
            optimizer.zero_grad()
            (curvature * p.square()).sum().div(2).backward()
            optimizer.step()
        left[name] = p.detach().norm().item()
    assert left["sgd"] > 1.0 > 0.01 > left["momentum"]
    assert F.relu(torch.tensor(left["momentum"])) < left["sgd"] / 100
