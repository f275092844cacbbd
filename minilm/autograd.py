"""Reverse-mode automatic differentiation over NumPy, in the order chapter 02 explains it.

A `Tensor` holds an array and the *edges* to the tensors it was computed from. An edge is a pair:
the input, and a *pull*, the function that turns the gradient of the output into the gradient of
that input. So each operation below is a value and, beside it, one rule for each input.
`Tensor.backward` walks the edges from the loss to the leaves and adds up what the pulls return.

Three habits keep it correct. No array is ever written to once it is in a graph: gradients are added
into new arrays, and optimizers put a new array in place of the old one. Rules ignore broadcasting:
`Tensor.backward` sums each gradient back to the shape of its input. Nothing here is recursive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from minilm.errors import ConfigError
from minilm.measure import ByteTokenizer

__all__ = [
    "MLP",
    "SGD",
    "Adam",
    "Optimizer",
    "Tensor",
    "clip_gradients",
    "connect",
    "context_windows",
    "cross_entropy",
    "log_softmax",
    "no_grad",
    "softmax",
    "topological_order",
    "unbroadcast",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Pull: TypeAlias = Callable[[Array], Array]
Axis: TypeAlias = int | tuple[int, ...] | None

_recording: ContextVar[bool] = ContextVar("recording", default=True)


# The graph


@contextmanager
def no_grad() -> Iterator[None]:
    """Compute values only: inside this context no operation keeps edges, so nothing is stored.

    Example:
        >>> w = Tensor([2.0], requires_grad=True)
        >>> with no_grad():
        ...     (w * w).requires_grad
        False
    """
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def connect(value: Array | np.floating[Any], *edges: tuple[Tensor, Pull]) -> Tensor:
    """Wrap the value of an operation, with an edge to each input that needs a gradient.

    This is all that a new operation needs. Edges to constants are dropped: their rules never run.

    Args:
        value: Result of the operation.
        *edges: One pair for each input: the input, and its pull, which takes the gradient of the
            loss with respect to `value` and returns the gradient with respect to that input.

    Returns:
        A tensor that requires a gradient if any input does and recording is on.

    Example:
        >>> x = Tensor([1.0, 4.0], requires_grad=True)
        >>> root = connect(np.sqrt(x.data), (x, lambda g: g / (2 * np.sqrt(x.data))))
        >>> root.sum().backward()
        >>> x.grad
        array([0.5 , 0.25], dtype=float32)
    """
    out = Tensor(value)
    if _recording.get():
        out.edges = tuple(edge for edge in edges if edge[0].requires_grad)
        out.requires_grad = bool(out.edges)
    return out


def topological_order(root: Tensor) -> list[Tensor]:
    """List every tensor that `root` was computed from, each after all of its inputs.

    A stack of our own takes the place of recursion, so the depth of a graph is bounded by memory
    and not by Python's call stack.

    Example:
        >>> x = Tensor([1.0], requires_grad=True)
        >>> y = x * 2.0
        >>> [t is s for t, s in zip(topological_order(y + x), (x, y), strict=False)]
        [True, True]
    """
    order: list[Tensor] = []
    seen: set[Tensor] = set()
    stack = [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.edges)
    return order


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an input of `shape` was repeated.

    Broadcasting copies a value to many places; its gradient is the sum over those places.

    Args:
        gradient: Array whose shape is the result of broadcasting `shape` against something.
        shape: Shape of the input before broadcasting.

    Returns:
        An array of `shape`; `gradient` itself where nothing was repeated.

    Example:
        >>> unbroadcast(np.ones((4, 3)), (3,))
        array([4., 4., 4.])
        >>> unbroadcast(np.ones((4, 3)), (4, 1)).shape
        (4, 1)
    """
    if gradient.shape == shape:
        return gradient
    added = gradient.ndim - len(shape)
    stretched = (added + i for i, n in enumerate(shape) if n == 1 and gradient.shape[added + i] > 1)
    total: Array = np.sum(gradient, axis=(*range(added), *stretched), keepdims=True)
    return total.reshape(shape)


# Operations: a value, and beside each input its rule


def _add(a: Tensor | Array | float, b: Tensor | Array | float) -> Tensor:
    """Return `a + b`, broadcast as NumPy does: the gradient passes through unchanged.

    Raises:
        ConfigError: If the shapes do not broadcast or the dtypes differ.

    Example:
        >>> Tensor([1.0, 2.0]) + 10.0
        Tensor([11., 12.], dtype=float32)
    """
    a, b = _pair(a, b)
    return connect(a.data + b.data, (a, lambda g: g), (b, lambda g: g))


def _mul(a: Tensor | Array | float, b: Tensor | Array | float) -> Tensor:
    """Return `a * b`, element by element: the gradient of each is scaled by the other.

    Raises:
        ConfigError: If the shapes do not broadcast or the dtypes differ.

    Example:
        >>> Tensor([1.0, 2.0]) * Tensor([3.0, 4.0])
        Tensor([3., 8.], dtype=float32)
    """
    a, b = _pair(a, b)
    x, y = a.data, b.data
    return connect(x * y, (a, lambda g: g * y), (b, lambda g: g * x))


def _matmul(
    a: Float[Tensor | Array, "*left rows inner"], b: Float[Tensor | Array, "*right inner columns"]
) -> Float[Tensor, "*both rows columns"]:
    """Return `a @ b` over the last two axes; the axes before them broadcast.

    Raises:
        ConfigError: If an operand has fewer than two axes, the inner sizes differ, the batch axes
            do not broadcast, or the dtypes differ.

    Example:
        >>> Tensor([[1.0, 2.0]]) @ Tensor([[3.0], [4.0]])
        Tensor([[11.]], dtype=float32)
    """
    a, b = _pair(a, b, matrices=True)
    x, y = a.data, b.data
    return connect(
        x @ y,
        (a, lambda g: g @ np.swapaxes(y, -1, -2)),
        (b, lambda g: np.swapaxes(x, -1, -2) @ g),
    )


def _pow(a: Tensor, exponent: float | int) -> Tensor:
    """Return `a ** exponent` for a constant exponent.

    Raises:
        ConfigError: If the exponent is not a number.

    Example:
        >>> Tensor([3.0]) ** 2
        Tensor([9.], dtype=float32)
    """
    if not isinstance(exponent, Real):
        got = type(exponent).__name__
        raise ConfigError(f"exponent is a {got}, wanted a number; for a ** b: (a.log() * b).exp()")
    x, n = a.data, float(exponent)
    return connect(x**n, (a, lambda g: g * n * x ** (n - 1) if n else np.zeros_like(x)))


def _exp(a: Tensor) -> Tensor:
    """Return e to the power of each element, which is its own derivative.

    Example:
        >>> Tensor([0.0]).exp()
        Tensor([1.], dtype=float32)
    """
    y = np.exp(a.data)
    return connect(y, (a, lambda g: g * y))


def _log(a: Tensor) -> Tensor:
    """Return the natural logarithm of each element.

    Example:
        >>> Tensor([1.0]).log()
        Tensor([0.], dtype=float32)
    """
    x = a.data
    return connect(np.log(x), (a, lambda g: g / x))


def _tanh(a: Tensor) -> Tensor:
    """Return the hyperbolic tangent of each element; its slope is 1 - tanh².

    Example:
        >>> Tensor([0.0]).tanh()
        Tensor([0.], dtype=float32)
    """
    y = np.tanh(a.data)
    return connect(y, (a, lambda g: g * (1 - y * y)))


def _relu(a: Tensor) -> Tensor:
    """Return each element, or zero where it is negative; the slope at zero is taken as zero.

    Example:
        >>> Tensor([-1.0, 2.0]).relu()
        Tensor([0., 2.], dtype=float32)
    """
    x = a.data
    return connect(np.maximum(x, 0), (a, lambda g: g * (x > 0)))


def _sum(a: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the sum over `axis` (None: all axes); each element receives its sum's gradient.

    Example:
        >>> Tensor([[1.0, 2.0], [3.0, 4.0]]).sum(axis=0)
        Tensor([4., 6.], dtype=float32)
    """
    x = a.data
    return connect(
        np.sum(x, axis=axis, keepdims=keepdims),
        (a, lambda g: np.broadcast_to(_restore(g, axis, keepdims), x.shape)),
    )


def _mean(a: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the mean over `axis`: a sum divided by a count, so it needs no rule of its own.

    Example:
        >>> Tensor([1.0, 2.0, 6.0]).mean()
        Tensor(3., dtype=float32)
    """
    total = a.sum(axis, keepdims)
    return total * (total.data.size / a.data.size)


def _max(a: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the maximum over `axis`. The gradient goes to the maximum; equal maxima share it.

    Example:
        >>> Tensor([[1.0, 5.0], [7.0, 2.0]]).max(axis=1)
        Tensor([5., 7.], dtype=float32)
    """
    x = a.data
    y = np.max(x, axis=axis, keepdims=True)
    hit = x == y
    share = hit / np.sum(hit, axis=axis, keepdims=True, dtype=x.dtype)
    return connect(
        np.max(x, axis=axis, keepdims=keepdims),
        (a, lambda g: share * _restore(g, axis, keepdims)),
    )


def _reshape(a: Tensor, *shape: int) -> Tensor:
    """Return the same elements in another shape; one size may be -1.

    Raises:
        ConfigError: If the number of elements differs.

    Example:
        >>> Tensor([1.0, 2.0, 3.0, 4.0]).reshape(2, -1)
        Tensor([[1., 2.],
                [3., 4.]], dtype=float32)
    """
    x = a.data
    try:
        y = x.reshape(shape)
    except ValueError:
        raise ConfigError(
            f"cannot reshape {x.shape} ({x.size} elements) to {shape}; "
            "the sizes must multiply to the same number, and at most one may be -1"
        ) from None
    return connect(y, (a, lambda g: g.reshape(x.shape)))


def _transpose(a: Tensor, *axes: int) -> Tensor:
    """Reorder the axes; without arguments, swap the last two.

    Raises:
        ConfigError: If `axes` does not name every axis once.

    Example:
        >>> Tensor([[1.0, 2.0, 3.0]]).transpose().shape
        (3, 1)
    """
    n = a.data.ndim
    order = tuple(axis % max(n, 1) for axis in axes) or (*range(n - 2), n - 1, n - 2)
    if sorted(order) != list(range(n)):
        raise ConfigError(f"got axes {axes} for shape {a.shape}, wanted each of {n} axes once")
    back = np.argsort(order)
    return connect(np.transpose(a.data, order), (a, lambda g: np.transpose(g, back)))


def _getitem(a: Tensor, index: Any) -> Tensor:
    """Return `a[index]`, for any index that NumPy takes: numbers, slices, arrays of ids.

    An element that was taken twice receives two gradients. An array of ids, the look-up in a table
    of embeddings, has a fast rule: sort the ids, then add up each run of equal ones.

    Raises:
        IndexError: If the index is outside the shape.

    Example:
        >>> table = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> table[np.array([1, 1, 0])].sum().backward()
        >>> table.grad
        array([[1., 1.],
               [2., 2.]], dtype=float32)
    """
    x = a.data

    def pull(g: Array) -> Array:
        out = np.zeros_like(x)
        if isinstance(index, np.ndarray) and index.dtype.kind in "iu" and index.size:
            ids = index.ravel().astype(np.intp) % len(x)
            order = np.argsort(ids, kind="stable")
            starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
            rows = g.reshape(-1, *x.shape[1:])[order]
            out[ids[order[starts]]] = np.add.reduceat(rows, starts, axis=0)
        else:
            np.add.at(out, index, g)
        return out

    return connect(x[index], (a, pull))


def log_softmax(a: Tensor, axis: int = -1) -> Tensor:
    """Return the logarithm of softmax: x - log(sum(exp(x))), with the maximum taken off first.

    It is made of operations above, so it needs no rule. The maximum cancels out of the result,
    which is why it may enter as a constant; without it exp(89) overflows float32.

    Example:
        >>> log_softmax(Tensor([1000.0, 1000.0]))
        Tensor([-0.6931472, -0.6931472], dtype=float32)
    """
    top: Array = np.max(a.data, axis=axis, keepdims=True)
    shifted = a - top
    return shifted - shifted.exp().sum(axis, keepdims=True).log()


def softmax(a: Tensor, axis: int = -1) -> Tensor:
    """Return probabilities proportional to exp(a), which sum to one over `axis`.

    Example:
        >>> softmax(Tensor([0.0, 0.0]))
        Tensor([0.5, 0.5], dtype=float32)
    """
    return log_softmax(a, axis).exp()


def cross_entropy(
    logits: Float[Tensor, "*batch classes"], targets: Int[Array, "*batch"]
) -> Float[Tensor, ""]:
    """Return the mean of -log softmax(logits)[target], in nats.

    Equal to picking from `log_softmax`, with one rule in place of ten: the gradient is the
    predicted probability, less one at the target, over the number of targets.

    Args:
        logits: Scores, one for each class along the last axis.
        targets: Ids of the true classes, 0 to classes - 1; as many as there are rows of logits.

    Raises:
        ConfigError: If the shapes differ, an id is outside the classes, or there is no target.

    Example:
        >>> cross_entropy(Tensor([[0.0, 0.0]]), np.array([1]))
        Tensor(0.6931472, dtype=float32)
    """
    classes = logits.shape[-1]
    targets = np.asarray(targets)
    if targets.shape != logits.shape[:-1] or targets.dtype.kind not in "iu":
        raise ConfigError(
            f"targets are {targets.dtype}{list(targets.shape)}, "
            f"wanted integers of shape {list(logits.shape[:-1])}, one id for each row of logits"
        )
    if targets.size == 0 or targets.min() < 0 or targets.max() >= classes:
        got = f"{targets.min()} to {targets.max()}" if targets.size else "no targets"
        raise ConfigError(f"target ids are {got}, wanted 0 to {classes - 1}")
    ids, rows = targets.ravel(), np.arange(targets.size)
    x = logits.data.reshape(-1, classes)
    shifted = x - np.max(x, axis=1, keepdims=True)
    weights = np.exp(shifted)
    totals = np.sum(weights, axis=1, keepdims=True)

    def pull(g: Array) -> Array:
        out: Array = weights / totals
        out[rows, ids] -= 1
        out *= g / ids.size
        return out.reshape(logits.shape)

    return connect(np.mean(np.log(totals[:, 0]) - shifted[rows, ids]), (logits, pull))


def _restore(gradient: Array, axis: Axis, keepdims: bool) -> Array:
    """Give a reduced gradient back the axes of size one that it lost."""
    return gradient if keepdims or axis is None else np.expand_dims(gradient, axis)


def _pair(a: Any, b: Any, matrices: bool = False) -> tuple[Tensor, Tensor]:
    """Make both operands tensors of one dtype, or say why they do not fit each other."""
    dtype = next((t.dtype for t in (a, b) if isinstance(t, Tensor)), np.float32)
    for t in (a, b):
        if not isinstance(t, Tensor | np.ndarray | Real):
            raise ConfigError(f"got a {type(t).__name__}, wanted a tensor, an array or a number")
    a, b = (t if isinstance(t, Tensor) else Tensor(np.asarray(t, dtype)) for t in (a, b))
    if a.dtype != b.dtype:
        raise ConfigError(
            f"got {a.dtype} beside {b.dtype}, wanted one dtype; "
            "convert the data with .astype(...) before making the tensor"
        )
    left, right = a.shape, b.shape
    if matrices and (min(len(left), len(right)) < 2 or left[-1] != right[-2]):
        raise ConfigError(
            f"cannot multiply {left} @ {right}, wanted (..., rows, inner) @ (..., inner, columns); "
            "transpose or reshape one side"
        )
    try:
        np.broadcast_shapes(left[:-2], right[:-2]) if matrices else np.broadcast_shapes(left, right)
    except ValueError:
        raise ConfigError(
            f"shapes {left} and {right} do not broadcast: aligned from the right, "
            "two sizes must be equal or one of them 1; reshape one side"
        ) from None
    return a, b


# The tensor


class Tensor:
    """An array that remembers what it was computed from.

    Numbers and lists become float32; a float32 or float64 array is taken as it is, not copied. A
    number or array beside a tensor in an operation takes the tensor's dtype.

    Args:
        data: Values.
        requires_grad: Whether `backward` should leave a gradient in `grad`.

    Attributes:
        data: The array.
        grad: Gradient of the same shape, or None. Only leaves (tensors that were not computed from
            others) keep one; each `backward` adds to it.
        requires_grad: Whether a gradient flows to this tensor.
        edges: Pairs of an input and its pull; empty for a leaf.

    Raises:
        ConfigError: If an array is neither float32 nor float64.

    Example:
        >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> x.grad
        array([2., 4., 6.], dtype=float32)
    """

    __array_ufunc__ = None  # array + tensor: NumPy steps back, and our __radd__ answers

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if not isinstance(data, np.ndarray | np.generic):
            data = np.asarray(data, dtype=np.float32)
        if data.dtype not in (np.float32, np.float64):
            raise ConfigError(
                f"got an array of {data.dtype}, wanted float32 or float64; "
                "use data.astype(np.float32), and keep ids as plain arrays"
            )
        self.data: Array = np.asarray(data)
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.edges: tuple[tuple[Tensor, Pull], ...] = ()

    def backward(self, gradient: Array | None = None) -> None:
        """Add to `grad` of every leaf the gradient of this tensor with respect to that leaf.

        Args:
            gradient: Gradient of some later quantity with respect to this tensor, of its shape. May
                be left out for a tensor of one element, where it is 1.

        Raises:
            ConfigError: If no gradient is needed here, if it is left out for a tensor of more than
                one element, or if its shape is wrong.
        """
        if not self.requires_grad:
            raise ConfigError(
                "backward on a tensor that depends on no parameter; make the parameters with "
                "Tensor(..., requires_grad=True), and compute outside no_grad"
            )
        if gradient is None and self.data.size != 1:
            fix = "reduce it with .sum() or .mean(), or pass gradient= of that shape"
            raise ConfigError(f"backward on shape {self.shape}, wanted one number; {fix}")
        start = np.ones_like(self.data) if gradient is None else np.asarray(gradient, self.dtype)
        if start.shape != self.shape:
            raise ConfigError(f"gradient has shape {start.shape}, wanted {self.shape}")
        arrived = {self: start}
        for node in reversed(topological_order(self)):
            g = np.asarray(arrived.pop(node))
            if not node.edges:
                node.grad = np.array(g if node.grad is None else node.grad + g)
            for parent, pull in node.edges:
                share = unbroadcast(np.asarray(pull(g)), parent.shape)
                arrived[parent] = arrived[parent] + share if parent in arrived else share

    def item(self) -> float:
        """Return the one number of a tensor that holds one."""
        return float(self.data.item())

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return self.data.dtype

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Tensor | Array | float) -> Tensor:
        return self + other * -1.0

    def __rsub__(self, other: Array | float) -> Tensor:
        return -self + other

    def __truediv__(self, other: Tensor | Array | float) -> Tensor:
        return self * (other**-1 if isinstance(other, Tensor) else 1.0 / other)

    def __rtruediv__(self, other: Array | float) -> Tensor:
        return self**-1 * other

    def __rmatmul__(self, other: Array) -> Tensor:
        return _matmul(other, self)

    def __repr__(self) -> str:
        return repr(self.data).replace("array", "Tensor", 1).replace("\n", "\n ")

    # Every operation above, as an operator or a method
    __add__ = __radd__ = _add
    __mul__ = __rmul__ = _mul
    __matmul__ = _matmul
    __pow__ = _pow
    __getitem__ = _getitem
    exp = _exp
    log = _log
    tanh = _tanh
    relu = _relu
    sum = _sum
    mean = _mean
    max = _max
    reshape = _reshape
    transpose = _transpose


# Optimizers


class Optimizer:
    """What every optimizer shares: the parameters, the learning rate, and forgetting gradients.

    Args:
        parameters: Leaves with `requires_grad=True`.
        learning_rate: Step size; may be changed between steps.

    Raises:
        ConfigError: If there is no parameter, one of them needs no gradient, or the learning rate
            is not positive.
    """

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ConfigError(
                f"got {len(self.parameters)} parameters, wanted at least one, each made with "
                "Tensor(..., requires_grad=True)"
            )
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate={learning_rate}, wanted a number above 0; try 0.001")

    def zero_grad(self) -> None:
        """Forget the gradients; without it the next `backward` adds to the old ones."""
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                p.data = p.data - float(self.learning_rate) * self.direction(i, p.grad)

    def direction(self, i: int, gradient: Array) -> Array:
        """Return the direction to move parameter `i` against; subclasses say how."""
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent: step against the gradient, or against a running sum of it.

    Args:
        parameters: Leaves with `requires_grad=True`.
        learning_rate: Step size.
        momentum: Share of the last direction that is kept, from 0 up to but not including 1.

    Raises:
        ConfigError: As `Optimizer`, or if momentum is outside [0, 1).

    Example:
        >>> x = Tensor([1.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> SGD([x], learning_rate=0.25).step()
        >>> x
        Tensor([0.5], dtype=float32)

    Source:
        Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5
    """

    def __init__(
        self, parameters: Iterable[Tensor], learning_rate: float, momentum: float = 0.0
    ) -> None:
        super().__init__(parameters, learning_rate)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum={momentum}, wanted 0 <= momentum < 1; try 0.9")
        self.momentum = momentum
        self.velocity = [np.zeros_like(p.data) for p in self.parameters]

    def direction(self, i: int, gradient: Array) -> Array:
        """Return the gradient plus `momentum` times the last direction."""
        self.velocity[i] = self.momentum * self.velocity[i] + gradient
        return self.velocity[i]


class Adam(Optimizer):
    """Adam: a running mean of the gradient over the root of a running mean of its square.

    Args:
        parameters: Leaves with `requires_grad=True`.
        learning_rate: Step size; about the distance each parameter moves in one step.
        betas: Share kept at each step by the mean and by the mean square.
        eps: Added to the root, so that a gradient of zero does not divide by zero.

    Raises:
        ConfigError: As `Optimizer`, or if a beta is outside [0, 1).

    Example:
        >>> x = Tensor([1.0], requires_grad=True)
        >>> (1000.0 * x).sum().backward()
        >>> Adam([x], learning_rate=0.25).step()
        >>> x
        Tensor([0.75], dtype=float32)

    Source:
        Kingma & Ba 2015, https://arxiv.org/abs/1412.6980
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, learning_rate)
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas={betas}, wanted both in [0, 1); try (0.9, 0.999)")
        self.betas, self.eps = betas, eps
        self.mean = [np.zeros_like(p.data) for p in self.parameters]
        self.square = [np.zeros_like(p.data) for p in self.parameters]
        self.steps = [0] * len(self.parameters)

    def direction(self, i: int, gradient: Array) -> Array:
        """Return the mean over the root mean square, both corrected for their start at zero."""
        b1, b2 = self.betas
        self.steps[i] += 1
        self.mean[i] = b1 * self.mean[i] + (1 - b1) * gradient
        self.square[i] = b2 * self.square[i] + (1 - b2) * gradient**2
        mean = self.mean[i] / (1 - b1 ** self.steps[i])
        square = self.square[i] / (1 - b2 ** self.steps[i])
        return mean / (np.sqrt(square) + self.eps)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by one factor, so that their common norm is at most `max_norm`.

    Args:
        parameters: Tensors; those without a gradient are passed over.
        max_norm: Largest norm to let through.

    Returns:
        The norm before clipping.

    Raises:
        ConfigError: If the norm is infinite or NaN, which no factor mends, or `max_norm` is not
            positive.

    Example:
        >>> x = Tensor([3.0, 4.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> clip_gradients([x], max_norm=1.0), x.grad
        (10.0, array([0.6, 0.8], dtype=float32))

    Source:
        Pascanu et al. 2013, https://arxiv.org/abs/1211.5063
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm={max_norm}, wanted a number above 0; try 1.0")
    with_grad = [(p, p.grad) for p in parameters if p.grad is not None]
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for _, g in with_grad)))
    if not np.isfinite(norm):
        raise ConfigError(f"the gradient norm is {norm}; lower the learning rate or clip earlier")
    if norm > max_norm:
        for p, g in with_grad:
            p.grad = g * float(max_norm / norm)
    return norm


# A language model


def context_windows(
    ids: Int[Array, "batch seq"], context: int, begin: int
) -> Int[Array, "batch seq context"]:
    """Return for each position the `context` ids before it, with `begin` where there are none.

    The result is a view: nothing is copied until it is used.

    Example:
        >>> context_windows(np.array([[7, 8, 9]]), context=2, begin=0)[0]
        array([[0, 0],
               [0, 7],
               [7, 8]])
    """
    padded = np.pad(ids, ((0, 0), (context, 0)), constant_values=begin)
    return np.lib.stride_tricks.sliding_window_view(padded, context, axis=1)[:, : ids.shape[1]]


class MLP:
    """A language model with a fixed window: embed the last bytes, one tanh layer, 256 logits.

    Args:
        context: How many bytes back the model sees.
        d_embed: Width of a byte's embedding.
        d_hidden: Width of the hidden layer.
        seed: Of the initial weights.
        dtype: float32 or float64.

    Attributes:
        tokenizer: Bytes, one id each.
        max_seq_len: None: any length can be scored at once, as each position sees only its window.

    Raises:
        ConfigError: If a size is not positive.

    Example:
        >>> model = MLP(context=3, d_embed=4, d_hidden=8)
        >>> model.log_probs(np.array([[72, 105]])).shape
        (1, 2)

    Source:
        Bengio et al. 2003, https://www.jmlr.org/papers/v3/bengio03a.html
    """

    max_seq_len: int | None = None

    def __init__(
        self,
        context: int = 8,
        d_embed: int = 32,
        d_hidden: int = 512,
        seed: int = 0,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        if min(context, d_embed, d_hidden) < 1:
            raise ConfigError(
                f"context={context}, d_embed={d_embed}, d_hidden={d_hidden}; wanted all at least 1"
            )
        self.tokenizer, self.context = ByteTokenizer(), context
        vocab_size, rng = self.tokenizer.vocab_size, np.random.default_rng(seed)
        self.begin = vocab_size  # an id that is no byte stands before the first one

        def normal(scale: float, *shape: int) -> Tensor:
            return Tensor((scale * rng.standard_normal(shape)).astype(dtype), requires_grad=True)

        inputs = context * d_embed
        self.embedding = normal(1.0, vocab_size + 1, d_embed)
        self.w1, self.b1 = normal(inputs**-0.5, inputs, d_hidden), normal(0.0, d_hidden)
        self.w2, self.b2 = (
            normal(0.1 * d_hidden**-0.5, d_hidden, vocab_size),
            normal(0.0, vocab_size),
        )

    def parameters(self) -> list[Tensor]:
        """Return the five tensors that training changes."""
        return [self.embedding, self.w1, self.b1, self.w2, self.b2]

    def __call__(self, contexts: Int[Array, "batch context"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits of the byte that follows each context."""
        embedded = self.embedding[contexts].reshape(len(contexts), -1)
        return (embedded @ self.w1 + self.b1).tanh() @ self.w2 + self.b2

    def log_probs(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
        """Return ln p(id | the ids before it) for each id, without building a graph."""
        windows = context_windows(ids, self.context, self.begin).reshape(-1, self.context)
        targets, out = ids.ravel(), np.empty(ids.size)
        with no_grad():
            for start in range(0, ids.size, 4096):  # bounds the memory of a whole play
                part = slice(start, start + 4096)
                scores = log_softmax(self(windows[part])).data
                out[part] = scores[np.arange(len(scores)), targets[part]]
        return out.reshape(ids.shape)
