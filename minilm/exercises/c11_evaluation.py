"""Questions of chapter 11: items, bootstraps, windows, shots, calibration, and a table to read."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from minilm.evaluation import calibration, calibration_error
from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Window: TypeAlias = tuple[int, int, int]
Solved: TypeAlias = tuple[str, str]


# predict: how many items an accuracy needs


def items_needed(p: float, margin: float) -> float:
    return 1.96**2 * p * (1 - p) / margin**2


def claims(rng: np.random.Generator) -> Iterator[tuple[float, float]]:
    yield 0.9, 0.01
    for _ in range(4):
        yield round(float(rng.uniform(0.7, 0.97)), 3), round(float(rng.uniform(0.003, 0.04)), 4)


# implement: a bootstrap that draws clusters


def resampled_means(values: Sequence[Array], draws: Array) -> Array:
    sums = np.array([part.sum() for part in values])
    sizes = np.array([len(part) for part in values])
    means: Array = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return means


def clusters(rng: np.random.Generator) -> Iterator[tuple[list[Array], Array]]:
    yield [np.array([1.0, 0.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.0])], np.array([[0, 1], [0, 0]])
    for n in (3, 5):
        values = [rng.normal(i, 1, size=3 + 4 * i) for i in range(n)]
        yield values, rng.integers(n, size=(4, n))


def each_once(values: Sequence[Array], draws: Array) -> Array:
    return np.array([np.concatenate([values[i] for i in sorted(set(row))]).mean()
                     for row in draws.tolist()])  # fmt: skip


def all_together(values: Sequence[Array], draws: Array) -> Array:
    return np.full(len(draws), np.concatenate(values).mean())


def mean_of_means(values: Sequence[Array], draws: Array) -> Array:
    means: Array = np.array([part.mean() for part in values])[draws].mean(axis=1)
    return means


def draws_items(values: Sequence[Array], draws: Array) -> Array:
    means: Array = np.concatenate(values)[draws].mean(axis=1)
    return means


def sums_only(values: Sequence[Array], draws: Array) -> Array:
    sums: Array = np.array([part.sum() for part in values])[draws].sum(axis=1)
    return sums


def size_of_the_whole(values: Sequence[Array], draws: Array) -> Array:
    means: Array = sums_only(values, draws) / sum(len(part) for part in values)
    return means


def over_samples(values: Sequence[Array], draws: Array) -> Array:
    square = draws[: draws.shape[1]] if len(draws) >= draws.shape[1] else draws
    sums = np.array([part.sum() for part in values])
    sizes = np.array([len(part) for part in values])
    means: Array = sums[square].sum(axis=0) / sizes[square].sum(axis=0)
    return means


# implement: the windows of a stride


def plan(n: int, window: int, stride: int) -> list[Window]:
    if n <= window:
        return [(0, n, 0)]
    starts = [*range(0, n - window, stride), n - window]
    counted, windows = 0, []
    for start in starts:
        windows.append((start, start + window, counted))
        counted = start + window
    return windows


def lengths(rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    yield 10, 4, 2
    yield 11, 4, 2  # the last window moves by one
    yield 3, 4, 2
    yield 4, 4, 1
    yield 7, 4, 1
    yield 10, 4, 4
    for _ in range(3):
        window = int(rng.integers(5, 12))
        yield int(rng.integers(25, 60)), window, int(rng.integers(2, window))


def planned(
    last: str = "full", counted: str = "new", first: bool = True
) -> Callable[[int, int, int], list[Window]]:
    """`plan`, with one of its parts done otherwise."""

    def wrong(n: int, window: int, stride: int) -> list[Window]:
        if n <= window:
            return [(0, n, 0)]
        regular = list(range(0, n - window, stride))
        if last == "missing":
            starts = list(range(0, n - window + 1, stride))
        elif last == "short":
            starts = [*regular, regular[-1] + stride]
        else:
            starts = [*regular, n - window]
        windows, done = [], 0
        for start in starts:
            stop = min(start + window, n)
            begin = {"new": done, "all": start, "stride": max(stop - stride, 0)}[counted]
            windows.append((start, stop, 0 if start == 0 and first else begin))
            done = stop
        return windows

    return wrong


def every_start(n: int, window: int, stride: int) -> list[Window]:
    starts = range(0, n, stride)
    return [(s, min(s + window, n), 0 if s == 0 else min(s + window - stride, n)) for s in starts]


# debug: a prompt that leaks


def prompt(items: Sequence[Solved], asked: int, shots: int) -> str:
    others = [items[j] for j in range(len(items)) if j != asked]
    lines = [f"{question} {answer}" for question, answer in others[:shots]]
    return "\n".join([*lines, items[asked][0]])


def prompts(rng: np.random.Generator) -> Iterator[tuple[list[Solved], int, int]]:
    words = ["day: night", "love: hate", "true: false", "young: old", "hot: cold", "near: far"]
    items: list[Solved] = [(a, b) for a, b in (word.split(" ") for word in words)]
    yield items, 4, 2
    yield items, 0, 3
    yield items, 1, 2
    yield items, 2, 5
    yield items, 3, 0
    order = rng.permutation(len(items))
    yield [items[i] for i in order], 1, 4
    yield [items[0], items[1], items[0], items[2]], 0, 2  # the same question may stand twice


def prompted(
    take: Callable[[Sequence[Solved], int, int], Sequence[Solved]],
    ask: Callable[[Solved], str] = lambda item: item[0],
    separator: str = "\n",
) -> Callable[[Sequence[Solved], int, int], str]:
    """`prompt`, with other shots, another question or another separator."""

    def wrong(items: Sequence[Solved], asked: int, shots: int) -> str:
        lines = [f"{question} {answer}" for question, answer in take(items, asked, shots)]
        return separator.join([*lines, ask(items[asked])])

    return wrong


def first_others(items: Sequence[Solved], asked: int, shots: int) -> list[Solved]:
    return [items[j] for j in range(len(items)) if j != asked][:shots]


def last_asked(items: Sequence[Solved], asked: int, shots: int) -> str:
    lines = [f"{q} {a}" for q, a in first_others(items, asked, shots)]
    return "\n".join([items[asked][0], *lines])


def same_question_out(items: Sequence[Solved], asked: int, shots: int) -> list[Solved]:
    return [item for item in items if item[0] != items[asked][0]][:shots]


# measure: a temperature and calibration


def classifier() -> tuple[Array, Array]:
    """Logits of 4,000 predictions among five classes, and classes drawn from their softmax."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((4000, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = (p.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    return logits, classes


def sharpened_and_flattened(even: float = 0.5, odd: float = 3.0) -> tuple[Array, Array, Array]:
    """Probabilities with one temperature in even rows and another in odd ones; and what came."""
    logits, classes = classifier()
    temperatures = np.where(np.arange(len(logits)) % 2 == 0, even, odd)[:, None]
    p = np.exp(logits / temperatures)
    return p / p.sum(axis=1, keepdims=True), logits.argmax(axis=1) == classes, classes


def measured_error(even: float = 0.5, odd: float = 3.0, n_bins: int = 10) -> float:
    p, correct, _ = sharpened_and_flattened(even, odd)
    return calibration_error(calibration(p.max(axis=1), correct, n_bins))


def gap_without_bins() -> float:
    p, correct, _ = sharpened_and_flattened()
    return abs(float(correct.mean() - p.max(axis=1).mean()))


def mean_of_bins() -> float:
    p, correct, _ = sharpened_and_flattened()
    bins = calibration(p.max(axis=1), correct)
    return float(np.abs(bins.accuracy - bins.confidence).mean())


def class_of_truth() -> float:
    p, correct, classes = sharpened_and_flattened()
    return calibration_error(calibration(p[np.arange(len(p)), classes], correct))


QUESTIONS = (
    Predict(
        "evaluation.items_needed",
        points=1,
        reference=items_needed,
        cases=claims,
        factor=1.1,
        mistakes=(
            Mistake(
                "the whole width",
                lambda p, margin: items_needed(p, margin / 2),
                "You took the margin for the whole width of the interval; it is what stands after "
                "the ±.",
            ),
            Mistake(
                "deviation not squared",
                lambda p, margin: 1.96 * math.sqrt(p * (1 - p)) / margin,
                "That is the square root of the number: solve margin = 1.96 · sqrt(p(1-p)/n) for "
                "n, not for its root.",
            ),
            Mistake(
                "one deviation",
                lambda p, margin: p * (1 - p) / margin**2,
                "That makes the margin one standard error, which covers 68%; 95% takes 1.96.",
            ),
            Mistake(
                "worst case",
                lambda p, margin: items_needed(0.5, margin),
                "That is the number for p = 0.5, the worst case; p is known here.",
            ),
            Mistake(
                "unpaired difference",
                lambda p, margin: 2 * items_needed(p, margin),
                "That is for the difference of two models; here it is one.",
            ),
            Mistake(
                "margin not squared",
                lambda p, margin: 1.96**2 * p * (1 - p) / margin,
                "Half the margin takes four times the items: the margin is squared.",
            ),
        ),
    ),
    Implement(
        "evaluation.resampled_means",
        points=3,
        reference=resampled_means,
        cases=clusters,
        forbid=("evaluation.accuracy", "measure.Score", "measure.compare"),
        mistakes=(
            Mistake(
                "mean of means",
                mean_of_means,
                "You average the plays' means, so a scene of a short play weighs more; wanted the "
                "mean over all drawn scenes.",
            ),
            Mistake(
                "each once",
                each_once,
                "A play that was drawn twice counts twice; you count it once.",
            ),
            Mistake(
                "scenes drawn",
                draws_items,
                "You use the draws as places of scenes; they are numbers of plays, and each brings "
                "all its scenes.",
            ),
            Mistake(
                "not resampled",
                all_together,
                "Every sample has the same mean: the draws are not used.",
            ),
            Mistake(
                "size of the whole",
                size_of_the_whole,
                "You divide by the scenes of all plays; divide by the scenes that were drawn.",
            ),
            Mistake(
                "sums",
                sums_only,
                "Those are sums; wanted means over the drawn scenes.",
            ),
            Mistake(
                "over samples",
                over_samples,
                "You sum over the samples; each row of draws is one sample.",
            ),
        ),
    ),
    Implement(
        "evaluation.windows",
        points=3,
        reference=plan,
        cases=lengths,
        forbid=(
            "evaluation.strided_log_probs",
            "evaluation.perplexity",
            "measure.windowed_log_probs",
        ),
        mistakes=(
            Mistake(
                "everything counted",
                planned(counted="all"),
                "Ids that two windows share are counted twice: a later window counts only what is "
                "new.",
            ),
            Mistake(
                "rest forgotten",
                planned(last="missing"),
                "When the stride does not divide the rest, the last ids of the text are in no "
                "window.",
            ),
            Mistake(
                "short last window",
                planned(last="short"),
                "Your last window is not full, so its ids see less than they could: let it end at "
                "the text's end and reach back a whole window.",
            ),
            Mistake(
                "last counts a stride",
                planned(counted="stride"),
                "Your last window counts a whole stride, also ids that were counted before it.",
            ),
            Mistake(
                "beginning not counted",
                planned(counted="stride", first=False),
                "The first window counts whole: your first ids are never counted.",
            ),
            Mistake(
                "windows beyond the end",
                every_start,
                "You go on after the text's end is reached; the last window is the first that "
                "holds the last id.",
            ),
        ),
    ),
    Debug(
        "evaluation.prompt",
        points=2,
        reference=prompt,
        cases=prompts,
        forbid=("evaluation.few_shot",),
        mistakes=(
            Mistake(
                "leak",
                prompted(lambda items, asked, shots: items[:shots]),
                "When the question asked is among the first, its own answer stands in the prompt.",
            ),
            Mistake(
                "leak taken out, one shot short",
                prompted(
                    lambda items, asked, shots: [
                        item for j, item in enumerate(items[:shots]) if j != asked
                    ]
                ),
                "The leak is gone, but such prompts have one shot less than asked for.",
            ),
            Mistake(
                "answer given",
                prompted(first_others, lambda item: f"{item[0]} {item[1]}"),
                "The last line has its answer: nothing is left to ask.",
            ),
            Mistake(
                "answers missing",
                lambda items, asked, shots: "\n".join(
                    [*(q for q, _ in first_others(items, asked, shots)), items[asked][0]]
                ),
                "Shots are solved items: your lines before the question have no answers.",
            ),
            Mistake(
                "no question",
                lambda items, asked, shots: "\n".join(
                    f"{q} {a}" for q, a in first_others(items, asked, shots)
                ),
                "The prompt does not end with the question.",
            ),
            Mistake(
                "question first",
                last_asked,
                "The model goes on where the prompt ends: the question comes last.",
            ),
            Mistake(
                "a space at the end",
                prompted(first_others, lambda item: f"{item[0]} "),
                "The prompt ends with a space, which a tokenizer joins to the answer: end it with "
                "the question.",
            ),
            Mistake(
                "same question out",
                prompted(same_question_out),
                "You leave out every item with the same text; leave out the one at that place.",
            ),
            Mistake(
                "in one line",
                prompted(first_others, separator=" "),
                "Each shot has a line of its own.",
            ),
        ),
    ),
    Measure(
        "evaluation.mixed",
        points=2,
        reference=measured_error(),
        note="Over all rows, mean confidence and accuracy are 0.04 apart: too sure and too "
        "shy cancel. Bins see what the mean hides.",
        mistakes=(
            Mistake(
                "nothing changed",
                measured_error(1.0, 1.0),
                "That is the error at temperature 1, before anything was changed.",
            ),
            Mistake(
                "multiplied",
                measured_error(1 / 0.5, 1 / 3),
                "A temperature divides the logits; you have multiplied by it.",
            ),
            Mistake(
                "exchanged",
                measured_error(3.0, 0.5),
                "You have exchanged the rows: the even ones have 0.5, the odd ones 3.",
            ),
            Mistake(
                "five bins",
                measured_error(n_bins=5),
                "Wanted with ten bins.",
            ),
            Mistake(
                "all sharpened",
                measured_error(0.5, 0.5),
                "That is with temperature 0.5 in all rows; the odd ones have 3.",
            ),
            Mistake(
                "one gap",
                gap_without_bins(),
                "That is the distance of accuracy and mean confidence over all rows; the error "
                "takes it bin by bin.",
            ),
            Mistake(
                "bins alike",
                mean_of_bins(),
                "You average the bins as if they were equally full; weigh them by count.",
            ),
            Mistake(
                "probability of the truth",
                class_of_truth(),
                "Confidence is the probability of the class that was *predicted*, not of the one "
                "that came.",
            ),
        ),
    ),
    Choose(
        "evaluation.table",
        points=1,
        right="c",
        because="The paired interval answers the question that was asked; the two single ones "
        "answer another.",
        wrong={
            "a": "Single intervals hold what both models share, such as hard plays; overlap says "
            "nothing about a paired difference.",
            "b": "The size of a gap says nothing without its noise: 0.03 can be nothing, and 0.01 "
            "clear.",
            "d": "Perplexities of models with different tokens do not compare at all.",
        },
    ),
)
