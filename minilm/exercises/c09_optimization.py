"""Questions of chapter 09: decay, AdamW, Newton-Schulz, a step of small batches, a limit."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
State: TypeAlias = tuple[Array, Array, Array]


# predict: what decay leaves of a weight without gradient, under a rate that falls to zero


def left(lr: float, decay: float, steps: int) -> float:
    return float(np.prod(1 - lr * decay * (1 - np.arange(steps) / steps)))


def runs(rng: np.random.Generator) -> Iterator[tuple[float, float, int]]:
    yield 6e-4, 0.1, 100_000  # GPT-2 in nanoGPT
    for _ in range(4):
        steps = int(rng.integers(2_000, 9_000))
        yield float(rng.uniform(0.5, 2.0)) / steps, float(rng.uniform(1.5, 4.0)), steps


# implement: a step of AdamW


def adamw(
    p: Array,
    g: Array,
    mean: Array,
    square: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> State:
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g**2
    root = np.sqrt(square / (1 - beta2**t))
    new = p - lr * decay * p - lr * mean / (1 - beta1**t) / (root + eps)
    return new, mean, square


def moments(rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    for t, shape, decay in ((1, (3,), 0.1), (2, (2, 3), 0.5), (7, (4,), 2.0), (300, (2, 2), 0.3)):
        p, g = rng.normal(size=shape), rng.normal(size=shape)
        mean, square = 0.3 * rng.normal(size=shape), rng.uniform(0.1, 1.0, size=shape)
        if t == 1:
            mean, square = np.zeros(shape), np.zeros(shape)
        yield p, g, mean, square, t, 0.05, 0.8, 0.95, 0.01, decay
    p, g = rng.normal(size=3), np.array([0.0, 0.2, -0.1])  # one number without any gradient
    yield p, g, np.zeros(3), np.zeros(3), 1, 0.05, 0.8, 0.95, 1e-8, 0.2


def adamw_like(
    coupled: bool = False,
    correct: tuple[bool, bool] = (True, True),
    after: int = 0,
    eps_inside: bool = False,
    swapped: bool = False,
    raw_decay: bool = False,
    decayed: bool = True,
    linear: bool = False,
    rooted: bool = True,
    stale: bool = False,
    sign: float = 1.0,
    summed: bool = False,
    eps_on: bool = True,
) -> Callable[..., State]:
    """AdamW with something changed."""

    def wrong(
        p: Array,
        g: Array,
        mean: Array,
        square: Array,
        t: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
    ) -> State:
        if swapped:
            beta1, beta2 = beta2, beta1
        if coupled:
            g = g + decay * p
        old = mean, square
        mean = beta1 * mean + (1.0 if summed else 1 - beta1) * g
        square = beta2 * square + (1.0 if summed else 1 - beta2) * (np.abs(g) if linear else g**2)
        m, s = old if stale else (mean, square)
        m = m / (1 - beta1 ** (t + after)) if correct[0] else m
        s = s / (1 - beta2 ** (t + after)) if correct[1] else s
        if not eps_on:
            eps = 0.0
        root = np.sqrt(s + eps) if eps_inside else (np.sqrt(s) if rooted else s) + eps
        shrink = 0.0 if coupled or not decayed else (decay if raw_decay else lr * decay)
        return p - sign * shrink * p - lr * m / root, mean, square

    return wrong


# implement: Newton-Schulz


def even_out(matrix: Array, steps: int, a: float, b: float, c: float) -> Array:
    x: Array = matrix / max(float(np.linalg.norm(matrix)), 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def matrices(rng: np.random.Generator) -> Iterator[tuple[Array, int, float, float, float]]:
    for shape, steps in (((3, 5), 5), ((4, 2), 3), ((3, 3), 1), ((2, 6), 2)):
        yield 4.0 * rng.normal(size=shape), steps, 3.4445, -4.7750, 2.0315
    yield rng.normal(size=(3, 4)), 4, 1.875, -1.25, 0.375
    yield np.zeros((2, 3)), 5, 3.4445, -4.7750, 2.0315


def evened(
    scale: Callable[[Array], float] = lambda m: max(float(np.linalg.norm(m)), 1e-7),
    power: int = 0,
    extra: int = 0,
    each_step: bool = False,
    one_sided: bool = False,
) -> Callable[..., Array]:
    """Newton-Schulz with something changed."""

    def wrong(matrix: Array, steps: int, a: float, b: float, c: float) -> Array:
        x: Array = matrix / scale(matrix)
        for _ in range(steps + extra):
            if each_step:
                x = x / scale(x)
            gram = x @ x.T
            if one_sided:
                x = (b * gram + c * gram @ gram) @ x
            elif power == 0:
                x = a * x + (b * gram + c * gram @ gram) @ x
            elif power == 1:  # every number by itself
                x = a * x + b * x**3 + c * x**5
            elif power == 2:  # the square of the gram matrix, number by number
                x = a * x + (b * gram + c * gram**2) @ x
            else:  # one factor too few
                x = a * x + b * gram @ x + c * gram @ x
        return x

    return wrong


def shapes_kept(answer: Any, rng: np.random.Generator) -> str | None:
    """A big matrix becomes nearly orthogonal."""
    values = np.linalg.svd(answer(rng.normal(size=(20, 60)), 5, 3.4445, -4.7750, 2.0315))[1]
    if values.min() > 0.5 and values.max() < 1.3:
        return None
    return f"Your singular values run from {values.min():.2f} to {values.max():.2f}, wanted near 1."


# debug: accumulate, clip, step


def accumulated(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    mean = np.asarray(gradients).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    out: Array = weights - lr * mean * min(1.0, max_norm / norm if norm else 1.0)
    return out


def micro_batches(rng: np.random.Generator) -> Iterator[tuple[Array, Array, float, float]]:
    for n, max_norm in ((4, 0.5), (3, 100.0), (5, 1.0), (1, 0.3), (2, 0.7)):
        yield rng.normal(size=6), 2.0 * rng.normal(size=(n, 6)), max_norm, 0.1
    spike = 0.1 * rng.normal(size=(4, 3))
    spike[1] *= 1000
    yield rng.normal(size=3), spike, 1.0, 0.5
    yield rng.normal(size=3), 0.01 * rng.normal(size=(4, 3)), 1.0, 0.5


def clipped(g: Array, max_norm: float) -> Array:
    norm = float(np.linalg.norm(g))
    out: Array = g * min(1.0, max_norm / norm if norm else 1.0)
    return out


def clip_each_then_mean(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * np.mean([clipped(g, max_norm) for g in gradients], axis=0)
    return out


def clip_each_then_sum(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * np.sum([clipped(g, max_norm) for g in gradients], axis=0)
    return out


def clip_the_sum(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * clipped(gradients.sum(axis=0), max_norm)
    return out


def clip_while_adding(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    total = np.zeros_like(weights)
    for g in gradients:
        total = clipped(total + g / len(gradients), max_norm)
    out: Array = weights - lr * total
    return out


def clip_the_sum_then_divide(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * clipped(gradients.sum(axis=0), max_norm) / len(gradients)
    return out


def by_value(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * np.clip(gradients.mean(axis=0), -max_norm, max_norm)
    return out


def always_scaled(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    mean = gradients.mean(axis=0)
    out: Array = weights - lr * mean * max_norm / np.linalg.norm(mean)
    return out


def not_clipped(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * gradients.mean(axis=0)
    return out


def step_clipped(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - clipped(lr * gradients.mean(axis=0), max_norm)
    return out


def last_only(weights: Array, gradients: Array, max_norm: float, lr: float) -> Array:
    out: Array = weights - lr * clipped(gradients[-1], max_norm)
    return out


# measure: the largest rate that momentum takes on a bowl


CURVATURE, KEPT = 50.0, 0.9
LIMIT = 2 * (1 + KEPT) / CURVATURE


QUESTIONS = (
    Predict(
        "optim.decay",
        points=1,
        reference=left,
        cases=runs,
        factor=1.02,
        note="In nanoGPT's run of GPT-2 a weight without gradient would end at 5% of its size.",
        mistakes=(
            Mistake(
                "constant rate",
                lambda lr, decay, steps: (1 - lr * decay) ** steps,
                "You keep the rate where it began; it falls along a line to zero, so that half of "
                "the decay is left.",
            ),
            Mistake(
                "one minus the sum",
                lambda lr, decay, steps: 1 - lr * decay * steps / 2,
                "You subtract all decay from the weight as it was at first; each step takes its "
                "part of what is left.",
            ),
            Mistake(
                "no decay",
                lambda lr, decay, steps: np.exp(-lr * steps / 2),
                "Your answer does not depend on the weight decay.",
            ),
            Mistake(
                "no rate",
                lambda lr, decay, steps: (1 - decay / steps) ** steps,
                "A step takes away the rate times the decay, and the rate is not 1 / steps.",
            ),
            Mistake(
                "what is lost",
                lambda lr, decay, steps: 1 - left(lr, decay, steps),
                "That is what is lost; wanted what is left.",
            ),
            Mistake(
                "quarter",
                lambda lr, decay, steps: np.exp(-lr * decay * steps / 4),
                "The mean of a line from 1 to 0 is a half, and you count a quarter.",
            ),
        ),
    ),
    Implement(
        "optim.adamw_step",
        points=2,
        reference=adamw,
        forbid=("optim.AdamW", "optim.Adam", "autograd.Adam"),
        cases=moments,
        mistakes=(
            Mistake(
                "L2",
                adamw_like(coupled=True),
                "You add the decay to the gradient: that is Adam with L2. Here it stays out of "
                "both averages.",
            ),
            Mistake(
                "no correction",
                adamw_like(correct=(False, False)),
                "Both averages begin at zero and are too small at first: their correction is "
                "missing.",
            ),
            Mistake(
                "mean not corrected",
                adamw_like(correct=(False, True)),
                "The average of the gradient is not corrected for its beginning at zero.",
            ),
            Mistake(
                "square not corrected",
                adamw_like(correct=(True, False)),
                "The average of the square is not corrected for its beginning at zero.",
            ),
            Mistake(
                "t from zero",
                adamw_like(after=1),
                "Your correction is one step ahead: `t` counts from 1 and includes this step.",
            ),
            Mistake(
                "eps inside",
                adamw_like(eps_inside=True),
                "You add eps before taking the root; it is added to the root.",
            ),
            Mistake(
                "betas swapped",
                adamw_like(swapped=True),
                "Your betas are exchanged: the first belongs to the gradient, the second to its "
                "square.",
            ),
            Mistake(
                "decay without the rate",
                adamw_like(raw_decay=True),
                "You take away `decay` times the weight; it is the rate times `decay`.",
            ),
            Mistake(
                "no decay",
                adamw_like(decayed=False),
                "Nothing decays.",
            ),
            Mistake(
                "grows",
                adamw_like(sign=-1.0),
                "Your weights grow: decay takes away.",
            ),
            Mistake(
                "average of the size",
                adamw_like(linear=True),
                "Your second average is that of the gradient's size; wanted that of its square.",
            ),
            Mistake(
                "no root",
                adamw_like(rooted=False),
                "You divide by the average square; its root is missing.",
            ),
            Mistake(
                "old averages",
                adamw_like(stale=True),
                "You step along the averages as they were before this gradient.",
            ),
            Mistake(
                "sums",
                adamw_like(summed=True),
                "You add the whole gradient to what is kept; an average takes 1 - beta of it.",
            ),
            Mistake(
                "no eps",
                adamw_like(eps_on=False),
                "eps is missing: a number whose gradient is always zero would be divided by zero.",
            ),
        ),
    ),
    Implement(
        "optim.newton_schulz",
        points=2,
        reference=even_out,
        forbid=("optim.newton_schulz", "optim.Muon"),
        cases=matrices,
        probes=(shapes_kept,),
        rtol=1e-5,
        atol=1e-8,
        mistakes=(
            Mistake(
                "not divided",
                evened(scale=lambda m: 1.0),
                "You leave the matrix as large as it is. The polynomial is made for singular "
                "values up to 1.",
            ),
            Mistake(
                "by the largest number",
                evened(scale=lambda m: max(float(np.abs(m).max()), 1e-7)),
                "You divide by the largest number; singular values can still be above 1.",
            ),
            Mistake(
                "by the spectral norm",
                evened(scale=lambda m: max(float(np.linalg.norm(m, 2)), 1e-7)),
                "You divide by the largest singular value; wanted the root of the sum of all "
                "squares, which needs no decomposition.",
            ),
            Mistake(
                "by the sum of squares",
                evened(scale=lambda m: max(float((m**2).sum()), 1e-7)),
                "You divide by the sum of the squares; its root is missing.",
            ),
            Mistake(
                "number by number",
                evened(power=1),
                "You take powers of single numbers; wanted products of matrices, which act on "
                "singular values.",
            ),
            Mistake(
                "gram squared number by number",
                evened(power=2),
                "`**2` squares each number of the gram matrix; wanted its product with itself.",
            ),
            Mistake(
                "third power twice",
                evened(power=3),
                "Your last term is of the third power; c belongs to the fifth.",
            ),
            Mistake(
                "no first term",
                evened(one_sided=True),
                "The term with a is missing.",
            ),
            Mistake(
                "one step more",
                evened(extra=1),
                "You apply the polynomial once too often.",
            ),
            Mistake(
                "one step less",
                evened(extra=-1),
                "You apply the polynomial once too seldom.",
            ),
            Mistake(
                "divided each time",
                evened(each_step=True),
                "You divide by the norm in every step; once, before the first, is enough.",
            ),
            Mistake(
                "zero over zero",
                evened(scale=lambda m: float(np.linalg.norm(m))),
                "A matrix of zeros is divided by zero: keep the norm at 1e-7 or above.",
            ),
        ),
    ),
    Debug(
        "optim.accumulated_step",
        points=3,
        reference=accumulated,
        forbid=("optim.clip_gradients", "autograd.clip_gradients"),
        cases=micro_batches,
        mistakes=(
            Mistake(
                "each clipped, then the sum",
                clip_each_then_sum,
                "Each small batch is clipped by itself, and then they are added, not averaged: "
                "the step depends on how the batch was cut.",
            ),
            Mistake(
                "each clipped, then the mean",
                clip_each_then_mean,
                "Each small batch is still clipped by itself; only the gradient of the whole "
                "batch should be.",
            ),
            Mistake(
                "the sum clipped",
                clip_the_sum,
                "You clip the sum of the gradients; that of the whole batch is their mean.",
            ),
            Mistake(
                "clipped while adding",
                clip_while_adding,
                "You clip what has been gathered so far, once for each small batch; wanted once, "
                "at the end.",
            ),
            Mistake(
                "divided after clipping",
                clip_the_sum_then_divide,
                "You clip the sum and divide afterwards: the norm ends below `max_norm`.",
            ),
            Mistake(
                "by value",
                by_value,
                "You clip every number by itself, which turns the gradient; wanted the norm of "
                "all.",
            ),
            Mistake(
                "small ones enlarged",
                always_scaled,
                "You bring every gradient to `max_norm`; one that is shorter should stay as it is.",
            ),
            Mistake(
                "no clipping",
                not_clipped,
                "Nothing is clipped any more.",
            ),
            Mistake(
                "the step clipped",
                step_clipped,
                "You clip the step, after the rate; the bound is for the gradient.",
            ),
            Mistake(
                "last one only",
                last_only,
                "Only the last small batch reaches the weights.",
            ),
        ),
    ),
    Measure(
        "optim.limit",
        points=2,
        reference=LIMIT,
        note="2 (1 + μ) / λ: with momentum the limit is nearly twice that of plain descent.",
        mistakes=(
            Mistake(
                "plain descent",
                2 / CURVATURE,
                "That is 2 / λ, the limit without momentum.",
            ),
            Mistake(
                "effective rate",
                2 * (1 - KEPT) / CURVATURE,
                "That takes the rate to be lr / (1 - μ) throughout; in a steep direction the "
                "velocity turns around at each step and does not add up.",
            ),
            Mistake(
                "inverse curvature",
                1 / CURVATURE,
                "At 1 / λ plain descent arrives in one step; momentum is far from its limit there.",
            ),
            Mistake(
                "twice",
                4 / CURVATURE,
                "That is the limit for a momentum of 1, which never comes to rest.",
            ),
        ),
    ),
    Choose(
        "optim.symptom",
        points=1,
        right="c",
        because="In one pass over the text no window comes twice: there is nothing to learn by "
        "heart, and dropout only makes the model smaller.",
        wrong={
            "a": "A seed moves the loss by hundredths in runs like these, and the sign would not "
            "be the same for each.",
            "b": "AdamW divides by the size of the gradient, so its steps are as long as without "
            "dropout.",
            "d": "More dropout takes away more of each layer; the loss would rise further.",
        },
    ),
)
