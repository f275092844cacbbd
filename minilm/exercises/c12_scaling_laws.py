"""Questions of chapter 12: hours, operations, the best split of a budget, the fit, a prediction."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict
from minilm.results import load_result
from minilm.scaling import Run, ScalingLaw, fit_law

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Counter: TypeAlias = Callable[[int, int, int, int, int, int, int, int], float]


# predict: days of a cluster


def days(parameters: float, tokens: float, chips: int, peak: float, utilization: float) -> float:
    return 6 * parameters * tokens / (chips * peak * utilization) / 86_400


def clusters(rng: np.random.Generator) -> Iterator[tuple[float, float, int, float, float]]:
    yield 174.6e9, 300e9, 10_000, 125e12, 0.197  # GPT-3
    for _ in range(4):
        parameters, chips = 1e9 * int(rng.integers(1, 90)), 8 * int(rng.integers(2, 500))
        utilization = float(rng.uniform(0.25, 0.55))
        yield parameters, 20.0 * parameters, chips, 989e12, utilization


# implement: one token's way forward


def forward(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, seq: int
) -> int:
    weights = 2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + 3 * d * d_ff
    return 2 * (layers * weights + vocab * d) + 4 * layers * seq * heads * head_dim


def counted(**change: float) -> Counter:
    """`forward`, with one of its terms taken a number of times."""
    terms = {"q": 1.0, "k": 1.0, "v": 1.0, "o": 1.0, "feed_forward": 3.0, "head": 1.0}
    terms |= {"embedding": 0.0, "scores": 1.0, "mix": 1.0, "all": 1.0} | change

    def wrong(
        vocab: int,
        d: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        d_ff: int,
        seq: int,
    ) -> float:
        q, kv = heads * head_dim, kv_heads * head_dim
        weights = (terms["q"] + terms["o"]) * d * q + (terms["k"] + terms["v"]) * d * kv
        weights += terms["feed_forward"] * d * d_ff
        matrices = layers * weights + (terms["head"] + terms["embedding"]) * vocab * d
        return terms["all"] * (
            2 * matrices + 2 * (terms["scores"] + terms["mix"]) * layers * seq * q
        )

    return wrong


def as_many_kv_heads(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, seq: int
) -> int:
    return forward(vocab, d, layers, heads, heads, head_dim, d_ff, seq)


def fewer_heads_score(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, seq: int
) -> int:
    whole = forward(vocab, d, layers, heads, kv_heads, head_dim, d_ff, seq)
    return whole - 4 * layers * seq * (heads - kv_heads) * head_dim


def width_for_heads(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, seq: int
) -> int:
    whole = forward(vocab, d, layers, heads, kv_heads, head_dim, d_ff, seq)
    return whole + 4 * layers * seq * (d - heads * head_dim)


def one_layer(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, seq: int
) -> int:
    return forward(vocab, d, 1, heads, kv_heads, head_dim, d_ff, seq)


def shapes(rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    yield 49_152, 576, 30, 9, 3, 64, 1536, 2048  # SmolLM2-135M
    for _ in range(4):
        kv_heads, group = (int(n) for n in rng.integers(2, 5, size=2))
        d, layers, seq = 64 * int(rng.integers(4, 9)), int(rng.integers(4, 9)), 1000
        yield 3000, d, layers, kv_heads * group, kv_heads, 48, 500 + d, seq


# implement: the best split of a budget


def split(a: float, b: float, alpha: float, beta: float, flops: float) -> tuple[float, float]:
    parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (
        beta / (alpha + beta)
    )
    return parameters, flops / 6 / parameters


def budgets(rng: np.random.Generator) -> Iterator[tuple[float, ...]]:
    yield 406.401018, 410.722827, 0.33917084, 0.2849083, 5.76e23  # Chinchilla
    yield 482.01, 2085.43, 0.3478, 0.3658, 5.76e23  # corrected
    for _ in range(3):
        alpha, beta = (float(x) for x in rng.uniform(0.25, 0.6, size=2))
        yield float(rng.uniform(10, 90)), float(rng.uniform(200, 900)), alpha, beta, 1e15


def other_split(
    exponent: Callable[[float, float], float],
    balance: Callable[[float, float, float, float], float],
    per_token: float = 6.0,
) -> Callable[..., tuple[float, float]]:
    """A split by another exponent, another balance, or another price of a token."""

    def wrong(a: float, b: float, alpha: float, beta: float, flops: float) -> tuple[float, float]:
        parameters = balance(a, b, alpha, beta) * (flops / per_token) ** exponent(alpha, beta)
        return parameters, flops / per_token / parameters

    return wrong


def good_exponent(alpha: float, beta: float) -> float:
    return beta / (alpha + beta)


def good_balance(a: float, b: float, alpha: float, beta: float) -> float:
    return float((alpha * a / (beta * b)) ** (1 / (alpha + beta)))


def equal_losses(a: float, b: float, alpha: float, beta: float) -> float:
    return float((a / b) ** (1 / (alpha + beta)))


def turned(a: float, b: float, alpha: float, beta: float) -> float:
    return 1 / good_balance(a, b, alpha, beta)


def twenty(a: float, b: float, alpha: float, beta: float, flops: float) -> tuple[float, float]:
    parameters = (flops / 120) ** 0.5
    return parameters, 20 * parameters


# debug: a robust objective


def objective(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    e, a, b, alpha, beta = theta
    law = np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta
    size = np.abs(np.log(law) - np.log(loss))
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def grids(rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array, Array, float]]:
    for delta, noise in ((1e-3, 1e-3), (0.05, 0.05), (0.01, 0.02)):
        theta = np.array([0.1, 3.0, 6.0, 0.3, 0.4]) + 0.05 * rng.standard_normal(5)
        n, d = 10 ** rng.uniform(4, 6, size=9), 10 ** rng.uniform(5, 7, size=9)
        e, a, b, alpha, beta = theta
        loss = np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta
        loss = loss * np.exp(noise * rng.standard_normal(9))
        loss[:2] = loss[:2] * np.exp(np.array([0.3, 3.0]) * delta)
        yield theta, n, d, loss, delta


def residuals(theta: Array, n: Array, d: Array, loss: Array) -> Array:
    e, a, b, alpha, beta = theta
    law = np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta
    out: Array = np.abs(np.log(law) - np.log(loss))
    return out


def jumping(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    size = residuals(theta, n, d, loss)
    return float(np.where(size <= delta, size**2 / 2, delta * size).sum())


def jumping_down(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    size = residuals(theta, n, d, loss)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta)).sum())


def averaged(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    return objective(theta, n, d, loss, delta) / len(n)


def squares(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    return float((residuals(theta, n, d, loss) ** 2 / 2).sum())


def lengths(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    return float((delta * (residuals(theta, n, d, loss) - delta / 2)).sum())


def turned_round(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    size = residuals(theta, n, d, loss)
    return float(np.where(size > delta, size**2 / 2, delta * (size - delta / 2)).sum())


def of_losses(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    e, a, b, alpha, beta = theta
    size = np.abs(np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta - loss)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def not_halved(theta: Array, n: Array, d: Array, loss: Array, delta: float) -> float:
    size = residuals(theta, n, d, loss)
    return float(np.where(size <= delta, size**2, delta * (size - delta / 2)).sum())


# measure: a forecast without the largest model of the grid


def told(keep: Callable[[dict[str, Any]], bool]) -> float:
    """What the law of some of the committed runs predicts for the held-out run."""
    result = load_result("scaling_grid")["result"]
    runs = [
        Run(float(one["parameters"]), float(one["tokens"]), one["loss"])
        for one in result["runs"]
        if keep(one)
    ]
    seen = result["held_out"]
    law = ScalingLaw(**result["prediction"]["law"])  # one near start: all lead to the same end
    return float(fit_law(runs, starts=[law]).loss(seen["parameters"], seen["tokens"]))


def once(one: dict[str, Any]) -> bool:
    return bool(one["tokens"] == one["unique_tokens"] and one["seed"] == 0)


@cache
def forecast() -> float:
    return told(lambda one: once(one) and one["d_model"] < 80)


@cache
def forecast_of_all() -> float:
    return told(once)


@cache
def forecast_with_repeats() -> float:
    return told(lambda one: one["d_model"] < 80)


@cache
def forecast_with_all_runs() -> float:
    return told(lambda one: True)


QUESTIONS = (
    Predict(
        "scaling.days",
        points=1,
        reference=days,
        forbid=("scaling.training_flops", "scaling.Hardware.hours"),
        cases=clusters,
        factor=1.05,
        note="GPT-3 on 10,000 V100 at a fifth of their peak: two weeks.",
        mistakes=(
            Mistake(
                "forward only",
                lambda n, d, chips, peak, part: days(n, d, chips, peak, part) / 3,
                "You count the way forward only; the way back costs twice as much again.",
            ),
            Mistake(
                "one forward too few",
                lambda n, d, chips, peak, part: days(n, d, chips, peak, part) * 2 / 3,
                "You count the way back only, 4 for each parameter and token.",
            ),
            Mistake(
                "multiplications only",
                lambda n, d, chips, peak, part: days(n, d, chips, peak, part) / 2,
                "A multiplication and an addition are two operations.",
            ),
            Mistake(
                "full peak",
                lambda n, d, chips, peak, part: days(n, d, chips, peak, 1.0),
                "No chip reaches its peak: the utilization is missing.",
            ),
            Mistake(
                "utilization multiplies",
                lambda n, d, chips, peak, part: days(n, d, chips, peak, 1 / part),
                "A lower utilization makes it longer, yours makes it shorter.",
            ),
            Mistake(
                "one chip",
                lambda n, d, chips, peak, part: days(n, d, 1, peak, part),
                "That is one chip; there are `chips`.",
            ),
            Mistake(
                "hours",
                lambda n, d, chips, peak, part: 24 * days(n, d, chips, peak, part),
                "That is hours; wanted days.",
            ),
            Mistake(
                "seconds",
                lambda n, d, chips, peak, part: 86_400 * days(n, d, chips, peak, part),
                "That is seconds; wanted days.",
            ),
        ),
    ),
    Implement(
        "scaling.forward_flops",
        points=2,
        reference=forward,
        forbid=("scaling.forward_flops", "scaling.matmul_parameters"),
        cases=shapes,
        mistakes=(
            Mistake(
                "no attention",
                counted(scores=0.0, mix=0.0),
                "The matrices are right; what queries do with keys and values is missing.",
            ),
            Mistake(
                "scores only",
                counted(mix=0.0),
                "You count half of attention: beside the scores there is the weighted mean of the "
                "values, and the kernel also works through what the mask hides.",
            ),
            Mistake(
                "multiplications only",
                counted(all=0.5),
                "A multiplication and an addition are two operations.",
            ),
            Mistake(
                "the table counts",
                counted(embedding=1.0),
                "You count the table of embeddings: looking up a row multiplies nothing.",
            ),
            Mistake(
                "no output matrix",
                counted(head=0.0),
                "The output matrix, vocab · d, is missing.",
            ),
            Mistake(
                "as many KV heads",
                as_many_kv_heads,
                "Your keys and values are as wide as the queries; there are only `kv_heads` heads.",
            ),
            Mistake(
                "fewer heads score",
                fewer_heads_score,
                "Every *query* head takes its own scores, also where heads share keys.",
            ),
            Mistake(
                "width for heads",
                width_for_heads,
                "You take d for heads · head_dim in attention; they need not be equal.",
            ),
            Mistake(
                "two matrices",
                counted(feed_forward=2.0),
                "SwiGLU has three matrices: gate, up and down.",
            ),
            Mistake(
                "one layer",
                one_layer,
                "That is one layer; there are `layers`.",
            ),
            Mistake(
                "training",
                counted(all=3.0),
                "That is forward and back; wanted the way forward.",
            ),
            Mistake(
                "no output projection",
                counted(o=0.0),
                "What the heads found goes through `o_proj`, as large as `q_proj`.",
            ),
        ),
    ),
    Implement(
        "scaling.allocate",
        points=3,
        reference=split,
        forbid=("scaling.ScalingLaw.allocate",),
        cases=budgets,
        rtol=2e-3,
        note="With these constants E plays no part: it is the same whatever you buy.",
        mistakes=(
            Mistake(
                "exponents exchanged",
                other_split(lambda alpha, beta: alpha / (alpha + beta), good_balance),
                "Your exponents are exchanged: the faster data help, the fewer you need of them.",
            ),
            Mistake(
                "equal losses",
                other_split(good_exponent, equal_losses),
                "You make the two terms equal; at the best split their *slopes* are.",
            ),
            Mistake(
                "balance turned",
                other_split(good_exponent, turned),
                "The factor before the power is upside down: a larger A asks for more parameters.",
            ),
            Mistake(
                "no balance",
                other_split(good_exponent, lambda a, b, alpha, beta: 1.0),
                "The power is right; the factor before it, from A, B and the exponents, is "
                "missing.",
            ),
            Mistake(
                "square root",
                other_split(lambda alpha, beta: 0.5, good_balance),
                "You take the square root of the budget; that is right only if alpha = beta.",
            ),
            Mistake(
                "no six",
                other_split(good_exponent, good_balance, per_token=1.0),
                "Your model and data cost six times the budget: C = 6 N D.",
            ),
            Mistake(
                "forward only",
                other_split(good_exponent, good_balance, per_token=2.0),
                "Your model and data cost three times the budget: C = 6 N D, the way back too.",
            ),
            Mistake(
                "twenty tokens",
                twenty,
                "That is the rule of 20 tokens for each parameter, whatever the law says.",
            ),
            Mistake(
                "data first",
                lambda a, b, alpha, beta, flops: split(a, b, alpha, beta, flops)[::-1],
                "You return tokens, parameters; wanted parameters, tokens.",
            ),
        ),
    ),
    Debug(
        "scaling.objective",
        points=3,
        reference=objective,
        forbid=("scaling.fit_law",),
        cases=grids,
        mistakes=(
            Mistake(
                "jumps at delta",
                jumping,
                "Where a residual passes delta, your objective jumps: parabola and line do not "
                "meet.",
            ),
            Mistake(
                "jumps down at delta",
                jumping_down,
                "The line now starts too low: it must meet the parabola at delta, at half of "
                "delta squared.",
            ),
            Mistake(
                "averaged",
                averaged,
                "You average. The minimum stays, but the numbers become so small that an optimizer "
                "stops before it: that happened to Chinchilla's fit.",
            ),
            Mistake(
                "squares",
                squares,
                "All residuals are squared now: one bad run pulls the whole law.",
            ),
            Mistake(
                "lines only",
                lengths,
                "There is no parabola left: small residuals count by their size, too.",
            ),
            Mistake(
                "branches exchanged",
                turned_round,
                "Large residuals are squared and small ones are not: the branches are exchanged.",
            ),
            Mistake(
                "residuals of the loss",
                of_losses,
                "You compare losses; wanted their logarithms, so that 1% counts alike everywhere.",
            ),
            Mistake(
                "not halved",
                not_halved,
                "The parabola is twice too high: it meets the line at half of delta squared.",
            ),
        ),
    ),
    Measure(
        "scaling.forecast",
        points=2,
        reference=forecast,
        rtol=3e-4,
        note="The farther away the run, the wider the interval must be.",
        mistakes=(
            Mistake(
                "all sizes",
                forecast_of_all,
                "That is the forecast of the whole grid; leave the models of width 80 out.",
            ),
            Mistake(
                "repeats and seeds, too",
                forecast_with_repeats,
                "You also fit runs that read their text several times, or other seeds.",
            ),
            Mistake(
                "everything",
                forecast_with_all_runs,
                "You fit all runs of the file; take width below 80, seed 0, each text read once.",
            ),
        ),
    ),
    Choose(
        "scaling.double",
        points=1,
        right="c",
        because="With equal exponents both grow as the square root of the budget: 1.4 times each.",
        wrong={
            "a": "With the data as they were, the larger model is trained too short: its slope is "
            "the smaller one now.",
            "b": "With the model as it was, the data run into what it can hold.",
            "d": "Twice both is four times the budget: C = 6 N D.",
        },
    ),
)
