"""Questions of chapter 02: the price of a gradient, backward rules, the order of the walk."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Graph: TypeAlias = list[list[tuple[int, float]]]
Pair: TypeAlias = tuple[Any, Array]


# predict: FLOPs of a backward pass


def backward_flops(batch: int, d_in: int, d_hidden: int, d_out: int) -> int:
    return 2 * batch * (d_in * d_hidden + 2 * d_hidden * d_out)


def layer_sizes(rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    yield 1, 1, 1, 1
    for _ in range(4):
        yield tuple(int(n) for n in rng.integers(2, 200, size=4))


# implement: the pulls of a matrix product


def matmul_backward(x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ w.T, flat_x.T @ flat_g


def products(rng: np.random.Generator) -> Iterator[tuple[Array, ...]]:
    for batch, seq, d_in, d_out in ((2, 3, 4, 5), (1, 1, 1, 1), (3, 3, 3, 3), (4, 1, 2, 6)):
        yield tuple(
            rng.standard_normal(shape)
            for shape in ((batch, seq, d_in), (d_in, d_out), (batch, seq, d_out))
        )


def per_example(x: Array, w: Array, g: Array) -> Array:
    products: Array = np.swapaxes(x, 1, 2) @ g
    return products


# implement: softmax with cross-entropy, value and gradient


def softmax_cross_entropy(logits: Array, targets: Array) -> Pair:
    rows = np.arange(len(targets))
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted)
    p /= p.sum(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = p.copy()
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


def scores(rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    for n, classes in ((3, 4), (1, 2), (4, 4), (5, 3)):
        yield rng.standard_normal((n, classes)), rng.integers(0, classes, size=n)
    yield rng.standard_normal((4, 3)), np.array([1, 1, 1, 1])
    yield 1000 * rng.standard_normal((3, 5)), np.array([0, 4, 2])


def naive(logits: Array, targets: Array) -> Pair:
    rows, p = np.arange(len(targets)), np.exp(logits)
    p = p / p.sum(axis=1, keepdims=True)
    gradient = p.copy()
    gradient[rows, targets] -= 1
    return -np.log(p[rows, targets]).mean(), gradient / len(targets)


def log_of_p(logits: Array, targets: Array) -> Pair:
    _, gradient = softmax_cross_entropy(logits, targets)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return -np.log(p[np.arange(len(targets)), targets]).mean(), gradient


def wrong_axis(logits: Array, targets: Array) -> Pair:
    rows = np.arange(len(targets))
    p = np.exp(logits - logits.max(axis=0))
    p = p / p.sum(axis=0)
    gradient = p.copy()
    gradient[rows, targets] -= 1
    return -np.log(p[rows, targets]).mean(), gradient / len(targets)


def with_gradient(change: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Pair]:
    """The right loss, and a gradient made from the right one by `change`."""

    def wrong(logits: Array, targets: Array) -> Pair:
        loss, gradient = softmax_cross_entropy(logits, targets)
        return loss, change(gradient, targets)

    return wrong


def no_target(gradient: Array, targets: Array) -> Array:
    out: Array = gradient * len(targets)
    out[np.arange(len(targets)), targets] += 1
    return out / len(targets)


def whole_columns(gradient: Array, targets: Array) -> Array:
    out: Array = no_target(gradient, targets) * len(targets)
    out[:, targets] -= 1
    return out / len(targets)


# debug: the walk over a graph


class Node:
    def __init__(self, edges: "list[tuple[Node, float]]") -> None:
        self.grad, self.edges = 0.0, edges


def build(graph: Graph) -> list[Node]:
    """A graph is a list: for each node the pairs (place of an input, slope)."""
    nodes: list[Node] = []
    for edges in graph:
        nodes.append(Node([(nodes[place], slope) for place, slope in edges]))
    return nodes


def run_backward(backward: Callable[[Node], object], graph: Graph) -> list[float]:
    nodes = build(graph)
    backward(nodes[-1])
    return [node.grad for node in nodes]


def graphs(rng: np.random.Generator) -> Iterator[Graph]:
    yield [[]]
    yield [[], [(0, 3.0)], [(1, 2.0)]]  # a chain
    yield [[], [(0, 5.0), (0, 5.0)]]  # a square
    yield [[], [(0, 2.0)], [(0, 3.0), (1, 4.0)], [(2, 5.0)]]  # two paths of different length
    yield [[], [(0, 2.0)], [(1, 3.0)], [(1, 1.0), (1, 1.0), (2, 1.0)]]  # used twice by one node
    yield [[], [(0, 2.0)], [(1, 3.0)], [(2, 1.0), (0, 7.0)], [(3, 2.0), (1, 1.0)], [(4, -1.0)]]
    for _ in range(3):
        graph: Graph = [[], [(0, 1.0)]]
        for place in range(2, 9):
            inputs = [place - 1, int(rng.integers(place))]
            graph.append([(i, round(float(rng.normal()), 2)) for i in inputs])
        yield graph


def inputs_first(root: Node) -> list[Node]:
    order: list[Node] = []
    seen: set[Node] = set()
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


def walk(
    root: Node,
    order: Callable[[Node], list[Node]] | None = None,
    seed: float = 1.0,
    share: Callable[[float, float, float], float] = lambda old, slope, g: old + slope * g,
) -> None:
    """`backward`, with each of its decisions open to a mistake."""
    root.grad = seed
    for node in reversed(inputs_first(root)) if order is None else order(root):
        for parent, slope in node.edges:
            parent.grad = share(parent.grad, slope, node.grad)


def breadth_first(root: Node) -> list[Node]:
    order, seen = [root], {root}
    for node in order:
        for parent, _ in node.edges:
            if parent not in seen:
                seen.add(parent)
                order.append(parent)
    return order


def each_use(root: Node) -> list[Node]:
    order: list[Node] = []
    stack = [root]
    while stack:
        order.append(stack.pop())
        stack.extend(parent for parent, _ in order[-1].edges)
    return order


def recursive(root: Node) -> list[Node]:
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for parent, _ in node.edges:
                visit(parent)
            order.append(node)

    visit(root)
    return order[::-1]


def consumers_once(root: Node) -> list[Node]:
    """Kahn's order, but a node that uses another twice counts as one use."""
    uses: dict[Node, int] = {}
    for node in breadth_first(root):
        for parent in {parent for parent, _ in node.edges}:
            uses[parent] = uses.get(parent, 0) + 1
    order = [root]
    for node in order:
        for parent, _ in node.edges:
            uses[parent] -= 1
            if uses[parent] == 0:
                order.append(parent)
    return order


DEEP = (
    "Your walk calls itself for every node, and Python stops at about 1,000 nested calls: "
    "a chain of 20,000 nodes must work."
)


def works_on_a_long_chain(
    backward: Callable[[Node], object], rng: np.random.Generator
) -> str | None:
    try:
        got = run_backward(backward, [[], *([(i, 1.0)] for i in range(20_000))])
    except RecursionError:
        return DEEP
    return None if got[0] == 1.0 else f"A chain of 20,000 slopes of 1 gives {got[0]}, wanted 1."


class TooManyReadsError(Exception):
    """A walk has looked at the edges of a small graph more often than it needs to."""


class CountedEdges(list[tuple[Node, float]]):
    """Edges that count how often they are walked along."""

    left = 0

    def __iter__(self) -> Iterator[tuple[Node, float]]:
        CountedEdges.left -= 1
        if CountedEdges.left < 0:
            raise TooManyReadsError
        return super().__iter__()


PATHS = (
    "You walk along every path, and their number doubles with each node that is used twice: "
    "visit each node once."
)


def visits_each_node_once(
    backward: Callable[[Node], object], rng: np.random.Generator
) -> str | None:
    nodes = build([[], *([(i, 0.5), (i, 0.5)] for i in range(40))])  # 2**40 paths
    for node in nodes:
        node.edges = CountedEdges(node.edges)
    CountedEdges.left = 100 * len(nodes)
    try:
        backward(nodes[-1])
    except TooManyReadsError:
        return PATHS
    return None if nodes[0].grad == 1.0 else f"40 doublings give {nodes[0].grad}, wanted 1."


# measure: the gain that keeps ReLU activations level


RELU_GAIN = 2**0.5


QUESTIONS = (
    Predict(
        "autograd.backward_flops",
        points=1,
        reference=backward_flops,
        cases=layer_sizes,
        factor=1.01,
        note="The input is data: its edge is dropped, so one of four products is never computed.",
        mistakes=(
            Mistake(
                "twice the forward pass",
                lambda batch, d_in, d_hidden, d_out: 4 * batch * d_hidden * (d_in + d_out),
                "That is twice the forward pass; but the input is data, and nobody asks for its "
                "gradient.",
            ),
            Mistake(
                "forward only",
                lambda batch, d_in, d_hidden, d_out: 2 * batch * d_hidden * (d_in + d_out),
                "That is the forward pass: backward, the second layer needs a product for each of "
                "its two inputs.",
            ),
            Mistake(
                "a whole step",
                lambda batch, d_in, d_hidden, d_out: 6 * batch * d_hidden * (d_in + d_out),
                "That is a whole training step, forward and backward, with the gradient of the "
                "data too.",
            ),
            Mistake(
                "multiplications only",
                lambda batch, d_in, d_hidden, d_out: (
                    backward_flops(batch, d_in, d_hidden, d_out) // 2
                ),
                "You count multiplications; each comes with an addition, so FLOPs are twice that.",
            ),
            Mistake(
                "one example",
                lambda batch, d_in, d_hidden, d_out: backward_flops(1, d_in, d_hidden, d_out),
                "That is for one example; the batch has more.",
            ),
        ),
    ),
    Implement(
        "autograd.matmul_backward",
        points=2,
        reference=matmul_backward,
        forbid=("autograd._matmul", "autograd.Tensor.backward"),
        cases=products,
        mistakes=(
            Mistake(
                "no sum over the batch",
                lambda x, w, g: (g @ w.T, per_example(x, w, g)),
                "The gradient of w has one matrix for each example; w is used by all of them, so "
                "their gradients add up.",
            ),
            Mistake(
                "mean over the batch",
                lambda x, w, g: (g @ w.T, per_example(x, w, g).mean(axis=0)),
                "You average the gradient of w over the examples; the product sums, and the mean "
                "is the loss's business.",
            ),
            Mistake(
                "no transpose of w",
                lambda x, w, g: (g @ w, matmul_backward(x, w, g)[1]),
                "The gradient of x multiplies by w as it stands; compare its shape with x when "
                "d_in and d_out differ.",
            ),
            Mistake(
                "x not transposed",
                lambda x, w, g: (g @ w.T, (x @ g).sum(axis=0)),
                "The gradient of w multiplies x and g without a transpose: this fits only when "
                "the sizes happen to be equal.",
            ),
            Mistake(
                "reshaped for transposed",
                lambda x, w, g: (
                    g @ w.T,
                    x.reshape(x.shape[-1], -1) @ g.reshape(-1, g.shape[-1]),
                ),
                "A reshape is not a transpose: your gradient of w has the right shape and "
                "mixed-up entries.",
            ),
            Mistake(
                "transpose of the gradient of w",
                lambda x, w, g: (g @ w.T, matmul_backward(x, w, g)[1].T),
                "Your gradient of w is the transpose of the right one: "
                "g came first in the product.",
            ),
            Mistake(
                "the other order",
                lambda x, w, g: matmul_backward(x, w, g)[::-1],
                "You return the gradient of w first; wanted that of x, then that of w.",
            ),
            Mistake(
                "only the first example",
                lambda x, w, g: (g @ w.T, x[0].T @ g[0]),
                "The gradient of w comes from the first example of the batch alone.",
            ),
        ),
    ),
    Implement(
        "autograd.softmax_cross_entropy",
        points=3,
        reference=softmax_cross_entropy,
        forbid=(
            "autograd.cross_entropy",
            "autograd.log_softmax",
            "autograd.softmax",
            "autograd.Tensor.backward",
        ),
        cases=scores,
        mistakes=(
            Mistake(
                "no maximum taken off",
                naive,
                "Right for small logits, but exp(1000) overflows: first subtract a row's maximum.",
            ),
            Mistake(
                "log of a probability",
                log_of_p,
                "Your loss is infinite where a probability rounds to 0: take log p as the shifted "
                "logit less the log of the sum.",
            ),
            Mistake(
                "gradient of the sum",
                with_gradient(lambda gradient, targets: gradient * len(targets)),
                "Your gradient belongs to the sum of the losses; the loss is their mean.",
            ),
            Mistake(
                "sign",
                with_gradient(lambda gradient, targets: -gradient),
                "The sign of your gradient is flipped: it is predicted minus true.",
            ),
            Mistake(
                "target forgotten",
                with_gradient(no_target),
                "Your gradient is the probabilities alone; the logit of the true class is also "
                "subtracted in the loss.",
            ),
            Mistake(
                "whole columns",
                with_gradient(whole_columns),
                "You subtract 1 in whole columns: `[:, targets]` takes every row, where each row "
                "has one target of its own.",
            ),
            Mistake(
                "wrong axis",
                wrong_axis,
                "Your softmax runs over the examples; the probabilities of one example, a row, "
                "sum to 1.",
            ),
            Mistake(
                "bits",
                lambda logits, targets: tuple(
                    part / np.log(2) for part in softmax_cross_entropy(logits, targets)
                ),
                "Your loss is in bits; cross-entropy here is in nats.",
            ),
        ),
    ),
    Debug(
        "autograd.backward",
        points=3,
        reference=walk,
        cases=lambda rng: ((graph,) for graph in graphs(rng)),
        run=run_backward,
        forbid=("autograd.topological_order", "autograd.Tensor.backward"),
        probes=(works_on_a_long_chain, visits_each_node_once),
        mistakes=(
            Mistake(
                "assigned",
                lambda root: walk(root, order=breadth_first, share=lambda old, slope, g: slope * g),
                "A node that is used twice keeps only one of its contributions; and that is not "
                "all that is wrong here.",
            ),
            Mistake(
                "assigned, order mended",
                lambda root: walk(root, share=lambda old, slope, g: slope * g),
                "The order is right now, but a node that is used twice still keeps only the last "
                "of its contributions.",
            ),
            Mistake(
                "breadth first",
                lambda root: walk(root, order=breadth_first),
                "Contributions add up now, but a node hands its gradient on before all of them "
                "have arrived: see a node that is reached by a short path and a long one.",
            ),
            Mistake(
                "two uses counted once",
                lambda root: walk(root, order=consumers_once),
                "You count a node that uses another twice as one use, so that one hands on its "
                "gradient too early.",
            ),
            Mistake(
                "inputs first",
                lambda root: walk(root, order=inputs_first),
                "You visit inputs before results, so nodes hand on a gradient that has not come.",
            ),
            Mistake(
                "a visit for each use",
                lambda root: walk(root, order=each_use),
                "A node is visited once for each use, and each time it hands on all that it has: "
                "contributions are counted twice.",
            ),
            Mistake(
                "slope forgotten",
                lambda root: walk(root, share=lambda old, slope, g: old + g),
                "The gradient is handed on without the slope of the edge.",
            ),
            Mistake(
                "gradient forgotten",
                lambda root: walk(root, share=lambda old, slope, g: old + slope),
                "The slopes are added up without the gradient that arrived: the chain rule "
                "multiplies the two.",
            ),
            Mistake(
                "no start",
                lambda root: walk(root, seed=0.0),
                "Every gradient is 0: the walk starts at the loss, "
                "whose derivative by itself is 1.",
            ),
            Mistake("recursive", lambda root: walk(root, order=recursive), DEEP),
        ),
    ),
    Measure(
        "autograd.relu_gain",
        points=2,
        reference=RELU_GAIN,
        rtol=0.05,
        note="ReLU throws half of the mean square away, so the gain is √2 (He and others 2015).",
        mistakes=(
            Mistake(
                "one",
                1.0,
                "With gain 1 half of the mean square is lost in every layer: nothing is left "
                "after 30.",
            ),
            Mistake(
                "variance",
                2.0,
                "2 is the factor of the variance; the gain multiplies the standard deviation.",
            ),
            Mistake(
                "tanh",
                5 / 3,
                "5/3 is a gain for tanh; measure with ReLU, and with 30 layers.",
            ),
            Mistake(
                "inverse",
                2**-0.5,
                "That is the factor by which a layer shrinks its input at gain 1; what undoes it?",
            ),
        ),
    ),
    Choose(
        "autograd.symptom",
        points=1,
        right="c",
        because="Gradients of all past steps are added up: momentum that never forgets.",
        wrong={
            "a": "Momentum would make the swings worse; what already acts here like a momentum "
            "that never forgets?",
            "b": "Clipping would bound the steps and hide the symptom; the norm grows although "
            "the loss falls, which no single gradient explains.",
            "d": "A larger batch makes a gradient less noisy; it would not make its norm grow "
            "step by step.",
        },
    ),
)
