"""The engine of chapter 02: parity with torch first, then finite differences, then bad input."""

import inspect
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import broadcastable, dtypes, matrix_pairs, reductions, seeds, shapes, values

from minilm import autograd
from minilm.autograd import (
    MLP,
    SGD,
    Adam,
    Optimizer,
    Tensor,
    clip_gradients,
    connect,
    context_windows,
    cross_entropy,
    log_softmax,
    no_grad,
    softmax,
    topological_order,
    unbroadcast,
)
from minilm.corpus import Play, Scene
from minilm.errors import ConfigError
from minilm.measure import LanguageModel, score

settings.register_profile("autograd", deadline=None, max_examples=60)
settings.load_profile("autograd")

TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-5}, "float64": {"rtol": 1e-11, "atol": 1e-11}}


def agree(got: np.ndarray, want: np.ndarray, message: str = "") -> None:
    """Equal shape, dtype and, within what the arithmetic allows, values."""
    assert got.shape == want.shape, f"{message}: {got.shape} against {want.shape}"
    assert got.dtype == want.dtype, f"{message}: {got.dtype} against {want.dtype}"
    np.testing.assert_allclose(got, want, err_msg=message, **TOLERANCE[str(want.dtype)])


def same_as_torch(ours: Callable, theirs: Callable, *inputs: np.ndarray) -> None:
    """Value and every gradient of a function agree with torch, for a random gradient at the end."""
    mine = [Tensor(x.copy(), requires_grad=True) for x in inputs]
    torchs = [torch.tensor(x, requires_grad=True) for x in inputs]
    out, want = ours(*mine), theirs(*torchs)
    agree(out.data, want.detach().numpy(), "value")
    end = values(0, out.shape, out.dtype)
    out.backward(end)
    want.backward(torch.tensor(end))
    for i, (a, b, x) in enumerate(zip(mine, torchs, inputs, strict=True)):
        agree(a.grad, b.grad.numpy(), f"gradient of input {i}")
        assert np.array_equal(a.data, x), f"input {i} was written to"


def same_as_finite_differences(function: Callable, *inputs: np.ndarray) -> None:
    """Every gradient agrees with central differences in float64."""
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    out = function(*tensors)
    end, step = values(0, out.shape), 1e-6
    out.backward(end)
    for i, x in enumerate(inputs):
        slopes = np.empty(x.size)
        for k in range(x.size):
            ends = []
            for sign in (1, -1):
                moved = [y.copy() for y in inputs]
                moved[i].reshape(-1)[k] += sign * step
                with no_grad():
                    ends.append(np.sum(function(*map(Tensor, moved)).data * end))
            slopes[k] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(tensors[i].grad, slopes.reshape(x.shape), rtol=1e-5, atol=1e-6)


def away_from_zero(x: np.ndarray) -> np.ndarray:
    return x + np.sign(x) * np.asarray(0.2, x.dtype)


BINARY = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
    "divide": (lambda a, b: a / b, lambda a, b: a / b),
}
UNARY = {
    "negative": (lambda a: -a, lambda a: -a),
    "exp": (lambda a: a.exp(), torch.exp),
    "log": (lambda a: (a * a + 0.1).log(), lambda a: (a * a + 0.1).log()),
    "tanh": (lambda a: a.tanh(), torch.tanh),
    "relu": (lambda a: a.relu(), torch.relu),
    "square": (lambda a: a**2, lambda a: a**2),
    "cube": (lambda a: a**3, lambda a: a**3),
    "power 0": (lambda a: a**0, lambda a: a**0),
    "power 1": (lambda a: a**1, lambda a: a**1),
    "inverse": (lambda a: a**-1, lambda a: a**-1),
    "root": (lambda a: (a * a) ** 0.5, lambda a: (a * a) ** 0.5),
    "number - a": (lambda a: 2.0 - a, lambda a: 2.0 - a),
    "number / a": (lambda a: 2.0 / a, lambda a: 2.0 / a),
    "a / number": (lambda a: a / 3, lambda a: a / 3),
    "number * a + number": (lambda a: 3 * a + 1, lambda a: 3 * a + 1),
    "used twice": (lambda a: a * a + a, lambda a: a * a + a),
    "used on two paths": (lambda a: a.tanh() * a + a.exp(), lambda a: a.tanh() * a + a.exp()),
}


@pytest.mark.parametrize("name", BINARY)
@given(pair=broadcastable(), seed=seeds, dtype=dtypes)
def test_binary_operations_broadcast_like_torch(name, pair, seed, dtype):
    a, b = values(seed, pair[0], dtype), away_from_zero(values(seed + 1, pair[1], dtype))
    same_as_torch(*BINARY[name], a, b)


@pytest.mark.parametrize("name", UNARY)
@given(shape=shapes(), seed=seeds, dtype=dtypes)
def test_unary_operations_are_those_of_torch(name, shape, seed, dtype):
    same_as_torch(*UNARY[name], away_from_zero(values(seed, shape, dtype)))


@given(shape=shapes(), seed=seeds, dtype=dtypes)
def test_relu_is_that_of_torch_at_and_near_zero(shape, seed, dtype):
    near = np.asarray(np.round(values(seed, shape)) * 0.01, dtype)
    same_as_torch(lambda a: a.relu(), torch.relu, near)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 1.5])
def test_powers_of_zero_are_those_of_torch(exponent):
    same_as_torch(lambda a: a**exponent, lambda a: a**exponent, np.array([0.0, 2.0]))


@given(pair=matrix_pairs(), seed=seeds, dtype=dtypes)
def test_batched_matmul_is_that_of_torch(pair, seed, dtype):
    a, b = values(seed, pair[0], dtype), values(seed + 1, pair[1], dtype)
    same_as_torch(lambda x, y: x @ y, lambda x, y: x @ y, a, b)


@pytest.mark.parametrize("name", ["sum", "mean", "amax"])
@given(case=reductions(), seed=seeds, dtype=dtypes)
def test_reductions_are_those_of_torch(name, case, seed, dtype):
    shape, axis, keep = case
    mine = {"amax": "max"}.get(name, name)
    dims = tuple(range(len(shape))) if axis is None else axis
    same_as_torch(
        lambda a: getattr(a, mine)(axis, keepdims=keep),
        lambda a: getattr(a, name)(dims, keepdim=keep),
        values(seed, shape, dtype),
    )


@given(shape=shapes(min_dims=1), seed=seeds)
def test_equal_maxima_share_the_gradient(shape, seed):
    tied = np.round(values(seed, shape))
    same_as_torch(lambda a: a.max(-1), lambda a: a.amax(-1), tied)


@given(shape=shapes(), seed=seeds, dtype=dtypes, data=st.data())
def test_reshape_and_transpose_are_those_of_torch(shape, seed, dtype, data):
    x = values(seed, shape, dtype)
    other = tuple(data.draw(st.permutations(shape)))
    same_as_torch(lambda a: a.reshape(*other), lambda a: a.reshape(other), x)
    same_as_torch(lambda a: a.reshape(-1), lambda a: a.reshape(-1), x)
    if shape:
        order = tuple(data.draw(st.permutations(range(len(shape)))))
        negative = tuple(axis - len(shape) for axis in order)
        same_as_torch(lambda a: a.transpose(*order), lambda a: a.permute(order), x)
        same_as_torch(lambda a: a.transpose(*negative), lambda a: a.permute(order), x)
    if len(shape) > 1:
        same_as_torch(lambda a: a.transpose(), lambda a: a.transpose(-1, -2), x)


@given(shape=shapes(min_dims=1), seed=seeds, dtype=dtypes, data=st.data())
def test_gather_adds_up_repeated_ids(shape, seed, dtype, data):
    kind = data.draw(st.sampled_from([np.int64, np.int32, np.uint8]))
    low = 0 if kind is np.uint8 else -shape[0]
    ids = data.draw(
        shapes(min_dims=0, max_dims=3).flatmap(
            lambda s: st.lists(
                st.integers(low, shape[0] - 1),
                min_size=int(np.prod(s)),
                max_size=int(np.prod(s)),
            ).map(lambda found: np.array(found, dtype=kind).reshape(s))
        )
    )
    wanted = torch.tensor(ids.astype(np.int64))
    same_as_torch(lambda a: a[ids], lambda a: a[wanted], values(seed, shape, dtype))


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        slice(None, None, 2),
        (slice(None), 1),
        (..., 0),
        (None, 2),
        (np.array([0, 0, 3]), np.array([1, 1, 2])),
        (slice(None), np.array([2, 2])),
        np.array([True, False, True, True]),
        [1, 1],
    ],
    ids=str,
)
def test_every_other_index_is_that_of_torch(index):
    same_as_torch(lambda a: a[index], lambda a: a[index], values(3, (4, 3, 2)))


def test_no_id_is_an_empty_gather():
    table = Tensor(np.ones((4, 3)), requires_grad=True)
    table[np.zeros(0, dtype=np.int64)].sum().backward()
    assert np.array_equal(table.grad, np.zeros((4, 3)))


@given(shape=shapes(min_dims=1), seed=seeds, dtype=dtypes, data=st.data())
def test_softmax_is_that_of_torch(shape, seed, dtype, data):
    x, axis = values(seed, shape, dtype), data.draw(st.integers(-len(shape), len(shape) - 1))
    same_as_torch(lambda a: softmax(a, axis), lambda a: torch.softmax(a, axis), x)
    same_as_torch(lambda a: log_softmax(a, axis), lambda a: torch.log_softmax(a, axis), x)


@given(shape=shapes(min_dims=1), seed=seeds, dtype=dtypes, large=st.sampled_from([1, 300]))
def test_cross_entropy_is_that_of_torch(shape, seed, dtype, large):
    ids = np.random.default_rng(seed).integers(0, shape[-1], shape[:-1])
    flat = torch.tensor(ids.reshape(-1))
    same_as_torch(
        lambda a: cross_entropy(a, ids),
        lambda a: F.cross_entropy(a.reshape(-1, shape[-1]), flat),
        values(seed, shape, dtype) * dtype(large),
    )


def test_cross_entropy_equals_picking_from_log_softmax():
    x, ids = values(1, (6, 5)), np.array([0, 4, 2, 2, 1, 3])
    fused, picked = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
    cross_entropy(fused, ids).backward()
    (-log_softmax(picked)[np.arange(6), ids].mean()).backward()
    agree(fused.grad, picked.grad)


FINITE = {
    **{name: (ours, 2) for name, (ours, _) in BINARY.items()},
    **{name: (ours, 1) for name, (ours, _) in UNARY.items()},
    "matmul": (lambda a, b: a @ b.transpose(), 2),
    "max": (lambda a: a.max(-1), 1),
    "mean": (lambda a: a.mean(0), 1),
    "gather": (lambda a: a[np.array([1, 0, 1])], 1),
    "softmax": (softmax, 1),
    "cross entropy": (lambda a: cross_entropy(a, np.array([1, 0, 2])), 1),
    "a small network": (lambda a, b: softmax((a @ b.transpose()).tanh() + b.sum(-1)).log(), 2),
}


@pytest.mark.parametrize("name", FINITE)
@settings(max_examples=10)
@given(seed=seeds)
def test_gradients_are_finite_differences(name, seed):
    function, n = FINITE[name]
    same_as_finite_differences(
        function, *(away_from_zero(values(seed + i, (3, 4))) for i in range(n))
    )


@given(pair=broadcastable(), seed=seeds)
def test_unbroadcast_undoes_broadcasting(pair, seed):
    """<broadcast(x), g> = <x, unbroadcast(g)> for every x and g: the two are adjoint."""
    x = values(seed, pair[0])
    g = values(seed + 1, np.broadcast_shapes(*pair))
    back = unbroadcast(g, x.shape)
    assert back.shape == x.shape
    assert np.sum(np.broadcast_to(x, g.shape) * g) == pytest.approx(np.sum(x * back))


# The graph


CHAIN = """
import numpy as np
from minilm.autograd import Tensor, topological_order

x = Tensor(np.array([1.0]), requires_grad=True)
y = x
for _ in range({length}):
    y = y + x * 1e-4
y.backward()
assert abs(x.grad[0] - (1 + {length} * 1e-4)) < 1e-6, x.grad
order = topological_order(y)
assert len(order) == 2 * {length} + 1, len(order)  # a product and a sum a link, and the leaf
del y, order  # freeing the chain must not recurse either
"""


def test_a_chain_of_10_000_links_works():
    exec(CHAIN.format(length=10_000), {})


def test_a_chain_of_100_000_links_works():
    """In a process of its own: without the type checks of this one it takes a second."""
    subprocess.run([sys.executable, "-c", CHAIN.format(length=100_000)], check=True)


def test_doubling_thirty_times_costs_thirty_steps_not_a_billion():
    x = Tensor([1.0], requires_grad=True)
    y = x
    for _ in range(30):
        y = y + y
    y.backward()
    assert x.grad == 2.0**30


@given(seed=seeds)
def test_topological_order_puts_inputs_first(seed):
    rng = np.random.default_rng(seed)
    nodes = [Tensor([1.0], requires_grad=True) for _ in range(3)]
    for _ in range(20):
        nodes.append(nodes[rng.integers(len(nodes))] * nodes[rng.integers(len(nodes))])
    order = topological_order(nodes[-1])
    place = {node: i for i, node in enumerate(order)}
    assert len(place) == len(order) and order[-1] is nodes[-1]
    assert all(place[parent] < place[node] for node in order for parent, _ in node.edges)


def test_backward_adds_to_what_is_there():
    x = Tensor(np.array([2.0]), requires_grad=True)
    (x * x).backward()
    (x * x).backward()
    assert x.grad == 8.0
    loss = (x * x) * x
    x.grad = None
    loss.backward()
    loss.backward()  # the same graph again: nothing is left over inside it
    assert x.grad == 24.0


def test_gradients_never_share_memory():
    a, b = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    end = np.ones(3)
    (a + b).backward(end)
    assert not np.shares_memory(a.grad, b.grad) and not np.shares_memory(a.grad, end)
    a.grad *= 0
    assert np.array_equal(b.grad, np.ones(3))
    matrix = Tensor(np.ones((2, 3)), requires_grad=True)
    matrix.sum().backward()
    matrix.grad += 1  # a broadcast view could not be written to
    assert np.array_equal(matrix.grad, np.full((2, 3), 2.0))


def test_a_parameter_changed_between_forward_and_backward_does_not_change_the_gradient():
    x = Tensor(np.array([3.0]), requires_grad=True)
    loss = (x * x).sum()
    loss.backward()
    SGD([x], 1.0).step()
    x.grad = None
    loss.backward()
    assert x.grad == 6.0


def test_constants_stay_out_of_the_graph():
    called = []
    x, constant = Tensor([1.0], requires_grad=True), Tensor([2.0])
    out = connect(
        x.data * constant.data, (x, lambda g: g * 2.0), (constant, lambda g: called.append(g) or g)
    )
    out.backward()
    assert not called and constant.grad is None and x.grad == 2.0
    assert not (constant * constant).requires_grad


def test_no_grad_keeps_no_edges_and_ends_even_after_an_error():
    x = Tensor([1.0], requires_grad=True)
    with no_grad():
        inside = x * 2.0
        with no_grad():
            pass
        still = x * 2.0
    assert not inside.requires_grad and inside.edges == ()
    assert not still.requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        _ = 1 / 0
    assert (x * 2.0).requires_grad
    seen = []
    with no_grad():  # only for the thread that asked
        thread = threading.Thread(target=lambda: seen.append((x * 2.0).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


# Dtypes


@given(dtype=dtypes)
def test_dtype_is_kept_from_data_to_gradient_to_step(dtype):
    x = Tensor(np.ones((2, 3), dtype), requires_grad=True)
    y = 2 * x + 1 - np.float64(0.5) + np.ones(3) * np.arange(3) / (x + 3) ** np.float64(2)
    y = y.relu().mean(0, keepdims=True).exp() + np.uint8(3) - np.arange(3, dtype=np.uint8)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    clip_gradients([x], np.float64(1e-3))
    for optimizer in (SGD([x], np.float64(0.1), momentum=0.9), Adam([x], np.float64(0.1))):
        optimizer.step()
        assert x.dtype == x.grad.dtype == dtype


def test_small_unsigned_constants_do_not_wrap():
    assert (Tensor([1.0]) - np.array([2], dtype=np.uint8)).data == -1.0


def test_arrays_on_the_left_give_tensors():
    x, left = Tensor(np.ones((3, 2)), requires_grad=True), np.full((4, 3), 2.0)
    for out in (left @ x, left[0, :2] * x, left[0, :2] - x, left[0, :2] / x, left[0, :2] + x):
        assert isinstance(out, Tensor)
    (left @ x).sum().backward()
    assert np.array_equal(x.grad, np.full((3, 2), 8.0))


def test_a_scalar_parameter_has_an_array_as_gradient():
    x = Tensor(np.float64(3.0), requires_grad=True)
    for _ in range(2):
        (x * x).backward()
        assert isinstance(x.grad, np.ndarray) and x.grad.shape == ()


# Training


def same_losses_as_torch(make_ours, make_torch, dtype, tolerance):
    """The losses of 100 steps on the same network, weights and batches."""
    rng = np.random.default_rng(0)
    model = MLP(context=4, d_embed=6, d_hidden=16, seed=1, dtype=dtype)
    torchs = [torch.tensor(p.data, requires_grad=True) for p in model.parameters()]
    ours, theirs = make_ours(model.parameters()), make_torch(torchs)
    losses = []
    for _ in range(100):
        contexts, targets = rng.integers(0, 257, (32, 4)), rng.integers(0, 20, 32)
        ours.zero_grad()
        loss = cross_entropy(model(contexts), targets)
        loss.backward()
        norm = clip_gradients(model.parameters(), 1.0)
        ours.step()

        e, w1, b1, w2, b2 = torchs
        theirs.zero_grad()
        hidden = torch.tanh(e[torch.tensor(contexts)].reshape(32, -1) @ w1 + b1)
        want = F.cross_entropy(hidden @ w2 + b2, torch.tensor(targets))
        want.backward()
        want_norm = torch.nn.utils.clip_grad_norm_(torchs, 1.0)
        theirs.step()
        assert loss.item() == pytest.approx(want.item(), rel=tolerance)
        # torch adds 1e-6 to the norm that it divides by
        assert norm == pytest.approx(want_norm.item(), rel=max(tolerance, 1e-5))
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for p, q in zip(model.parameters(), torchs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-6), (np.float32, 1e-4)])
def test_sgd_with_momentum_follows_torch(dtype, tolerance):
    same_losses_as_torch(
        lambda p: SGD(p, 0.3, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
        dtype,
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-6), (np.float32, 1e-4)])
def test_adam_follows_torch(dtype, tolerance):
    same_losses_as_torch(
        lambda p: Adam(p, 0.01, betas=(0.8, 0.99)),
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99)),
        dtype,
        tolerance,
    )


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.1)])
def test_optimizer_passes_over_parameters_without_gradient(make):
    used, unused = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    kept = used.data
    optimizer = make([used, unused])
    (used * used).sum().backward()
    optimizer.step()
    assert np.array_equal(unused.data, np.ones(2)) and unused.grad is None
    assert np.array_equal(kept, np.ones(2)), "the old array was written to"
    assert np.all(used.data < 1)
    optimizer.zero_grad()
    assert used.grad is None


def test_plain_sgd_is_minus_rate_times_gradient():
    x = Tensor(np.array([1.0, -2.0]), requires_grad=True)
    optimizer = SGD([x], 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (x * 3.0).sum().backward()
        optimizer.step()
    assert np.array_equal(x.data, [-2.0, -5.0])


def test_clipping_scales_all_gradients_by_one_factor():
    a, b = (Tensor(np.zeros(n), requires_grad=True) for n in (1, 2))
    a.grad, b.grad = np.array([3.0]), np.array([0.0, 4.0])
    assert clip_gradients([a, b, Tensor([1.0], requires_grad=True)], 10.0) == 5.0
    assert np.array_equal(b.grad, [0.0, 4.0])
    assert clip_gradients([a, b], 0.5) == 5.0
    agree(np.concatenate([a.grad, b.grad]), np.array([0.3, 0.0, 0.4]))
    big = Tensor(np.zeros(1, np.float32), requires_grad=True)
    big.grad = np.array([1e30], dtype=np.float32)  # its square does not fit float32
    assert clip_gradients([big], 1.0) == pytest.approx(1e30, rel=1e-6)


# The language model


def test_context_windows_hold_what_came_before():
    ids = np.arange(10).reshape(2, 5)
    windows = context_windows(ids, context=3, begin=99)
    assert windows.shape == (2, 5, 3)
    for row in range(2):
        padded = [99, 99, 99, *ids[row]]
        for t in range(5):
            assert list(windows[row, t]) == padded[t : t + 3]
    assert context_windows(ids[:, :1], 3, 99).tolist() == [[[99] * 3]] * 2


def test_mlp_is_a_language_model_that_sums_to_one_and_sees_no_future():
    model = MLP(context=3, d_embed=4, d_hidden=8, seed=2, dtype=np.float64)
    assert isinstance(model, LanguageModel) and model.max_seq_len is None
    every = np.concatenate([np.full((256, 1), 65), np.arange(256)[:, None]], axis=1)
    assert np.exp(model.log_probs(every)[:, 1]).sum() == pytest.approx(1)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, 5000))  # longer than one part of the scoring loop
    got = model.log_probs(ids)
    assert got.shape == ids.shape and got.dtype == np.float64
    changed = ids.copy()
    changed[:, 4500] = (changed[:, 4500] + 1) % 256
    differs = np.flatnonzero(np.any(model.log_probs(changed) != got, axis=0))
    assert differs.tolist() == [4500, 4501, 4502, 4503]
    alone = np.concatenate([model.log_probs(row[None, :20]) for row in ids])
    agree(got[:, :20], alone)


def test_mlp_scores_a_play_and_starts_at_ln_256():
    text = "HAMLET:\nWords, words, words.\n\n"
    play = Play("p", "P", "tragedy", "test", text, (Scene("I", "1", 0, len(text)),))
    assert score(MLP(), [play]).bits_per_byte == pytest.approx(8.0, abs=0.1)


def test_equal_seeds_give_equal_models():
    a, b, c = MLP(seed=1), MLP(seed=1), MLP(seed=2)
    assert all(
        np.array_equal(x.data, y.data) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )
    assert not np.array_equal(a.w1.data, c.w1.data)
    assert sum(p.data.size for p in a.parameters()) == 257 * 32 + 257 * 512 + 513 * 256


# Bad input: what was got, what was wanted, how to mend it


def leaf(*shape: int, dtype: type = np.float32) -> Tensor:
    return Tensor(np.ones(shape, dtype), requires_grad=True)


unchecked = inspect.unwrap  # what a user calls: the tests' type checks would answer first


ERRORS = {
    "backward on many": (lambda: (leaf(3) * 2).backward(), r"\(3,\).*one number.*\.sum\(\)"),
    "backward on a constant": (lambda: Tensor([1.0]).backward(), "requires_grad=True"),
    "gradient of another shape": (
        lambda: leaf(3).backward(np.ones(2)),
        r"\(2,\), wanted \(3,\)",
    ),
    "integers": (lambda: Tensor(np.arange(3)), r"int64, wanted float32 or float64.*astype"),
    "float16": (lambda: Tensor(np.ones(3, np.float16)), "float16, wanted float32"),
    "two dtypes": (lambda: leaf(2) + leaf(2, dtype=np.float64), "float32 beside float64.*astype"),
    "shapes that do not broadcast": (lambda: leaf(2, 3) + leaf(2), r"\(2, 3\) and \(2,\).*right"),
    "inner sizes": (lambda: leaf(2, 3) @ leaf(2, 3), r"\(2, 3\) @ \(2, 3\).*transpose"),
    "a vector in a product": (lambda: leaf(3) @ leaf(3), r"\(3,\) @ \(3,\).*reshape"),
    "stacks that do not broadcast": (
        lambda: leaf(2, 3, 4) @ leaf(3, 4, 5),
        r"\(2, 3, 4\) and \(3, 4, 5\) do not broadcast",
    ),
    "a word": (lambda: leaf(2) + "a", "got a str"),
    "nothing": (lambda: leaf(2) * None, "got a NoneType"),
    "a tensor as exponent": (
        lambda: unchecked(Tensor.__pow__)(leaf(2), leaf(2)),
        r"exponent is a Tensor.*log\(\)",
    ),
    "reshape": (lambda: leaf(2, 3).reshape(4, 2), r"\(2, 3\) \(6 elements\) to \(4, 2\)"),
    "two -1": (lambda: leaf(2, 3).reshape(-1, -1), "at most one may be -1"),
    "transpose": (lambda: leaf(2, 3).transpose(0, 0), r"\(0, 0\).*each of 2 axes once"),
    "transpose of a vector": (lambda: leaf(3).transpose(), r"shape \(3,\)"),
    "targets of another shape": (
        lambda: cross_entropy(leaf(4, 5), np.zeros((4, 1), int)),
        r"int64\[4, 1\].*\[4\]",
    ),
    "targets that are not ids": (
        lambda: unchecked(cross_entropy)(leaf(4, 5), np.zeros(4)),
        r"float64\[4\].*integers",
    ),
    "target too large": (lambda: cross_entropy(leaf(2, 5), np.array([0, 5])), "0 to 5.*0 to 4"),
    "target below zero": (lambda: cross_entropy(leaf(2, 5), np.array([-1, 0])), "-1 to 0"),
    "no target": (lambda: cross_entropy(leaf(0, 5), np.zeros(0, int)), "no targets"),
    "no parameters": (lambda: SGD([], 0.1), "0 parameters.*at least one"),
    "a parameter without gradient": (lambda: Adam([Tensor([1.0])]), "requires_grad=True"),
    "rate 0": (lambda: SGD([leaf(1)], 0.0), "learning_rate=0.0.*above 0"),
    "rate NaN": (lambda: Adam([leaf(1)], float("nan")), "learning_rate=nan"),
    "momentum 1": (lambda: SGD([leaf(1)], 0.1, momentum=1.0), "momentum=1.0.*0.9"),
    "beta 1": (lambda: Adam([leaf(1)], betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
    "max_norm 0": (lambda: clip_gradients([leaf(1)], 0.0), "max_norm=0.0"),
    "no context": (lambda: MLP(context=0), "context=0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_got_wanted_and_fix(name):
    call, message = ERRORS[name]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_is_not_clipped(bad):
    x = leaf(2)
    x.grad = np.array([1.0, bad])
    with pytest.raises(ConfigError, match=r"norm is (inf|nan); lower the learning rate"):
        clip_gradients([x], 1.0)


def test_an_id_outside_the_table_is_an_index_error():
    with pytest.raises(IndexError, match="out of bounds"):
        leaf(4, 2)[np.array([4])]


def test_the_optimizer_base_class_has_no_direction():
    x = leaf(1)
    x.sum().backward()
    with pytest.raises(NotImplementedError):
        Optimizer([x], 0.1).step()


def test_public_names_exist():
    assert all(hasattr(autograd, name) for name in autograd.__all__)
