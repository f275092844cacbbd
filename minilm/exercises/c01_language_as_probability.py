"""The questions of chapter 01: bits per byte, smoothing, and what a count table costs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array = npt.NDArray[Any]
LN2 = float(np.log(2))


# 1. predict: perplexity per token


def perplexity(bits_per_byte: float, n_bytes: int, n_tokens: int) -> float:
    """The same bits, spread over fewer tokens."""
    return float(2 ** (bits_per_byte * n_bytes / n_tokens))


def perplexity_cases(rng: np.random.Generator) -> Iterator[tuple[float, int, int]]:
    """Texts whose tokens are 1 to 6 bytes long."""
    yield 2.0, 1000, 1000
    for bytes_per_token in (1.7, 4.2, 5.5):
        n_tokens = int(rng.integers(500, 5000))
        yield float(rng.uniform(0.8, 2.2)), int(bytes_per_token * n_tokens), n_tokens


PERPLEXITY = Predict(
    "ngram.perplexity",
    points=1,
    reference=perplexity,
    cases=perplexity_cases,
    factor=1.01,
    mistakes=(
        Mistake(
            "per byte",
            lambda bits_per_byte, n_bytes, n_tokens: 2**bits_per_byte,
            "That is the perplexity per byte: a token holds n_bytes / n_tokens bytes on average.",
        ),
        Mistake(
            "e for 2",
            lambda bits_per_byte, n_bytes, n_tokens: np.exp(bits_per_byte * n_bytes / n_tokens),
            "You raise e to a number of bits: e belongs to nats, 2 to bits.",
        ),
        Mistake(
            "ratio upside down",
            lambda bits_per_byte, n_bytes, n_tokens: 2 ** (bits_per_byte * n_tokens / n_bytes),
            "A token that holds more bytes costs more bits, not fewer: turn the ratio round.",
        ),
        Mistake(
            "multiplied outside",
            lambda bits_per_byte, n_bytes, n_tokens: 2**bits_per_byte * n_bytes / n_tokens,
            "Bits add up over the bytes of a token, so their number belongs into the exponent.",
        ),
    ),
)


# 2. implement: bits per byte


def bits_per_byte(log_probs: Sequence[Array], n_bytes: Sequence[int]) -> float:
    """All bits over all bytes."""
    return float(-sum(float(np.sum(row)) for row in log_probs) / LN2 / sum(n_bytes))


def texts_and_bytes(rng: np.random.Generator) -> Iterator[tuple[list[Array], list[int]]]:
    """One text, several of very different length and difficulty, tokens longer than a byte."""
    yield [np.log(np.full(4, 0.5))], [4]
    for n_texts in (2, 4):
        lengths = rng.integers(1, 60, size=n_texts) * np.arange(1, n_texts + 1)
        log_probs = [-rng.exponential(1 + k, size=n) for k, n in enumerate(lengths)]
        yield log_probs, [int(n * rng.integers(2, 5)) for n in lengths]
    yield [np.zeros(3), -np.ones(5)], [3, 10]
    yield [np.full(1000, -2.0)], [4000]  # a probability that no float can hold


def _totals(log_probs: Sequence[Array]) -> list[float]:
    return [float(np.sum(row)) for row in log_probs]


BITS_PER_BYTE = Implement(
    "ngram.bits_per_byte",
    points=2,
    reference=bits_per_byte,
    cases=texts_and_bytes,
    forbid=("measure.bits_per_byte", "measure.score", "measure.Score"),
    mistakes=(
        Mistake(
            "nats",
            lambda log_probs, n_bytes: -sum(_totals(log_probs)) / sum(n_bytes),
            "Your figure is in nats: natural logarithms become bits when divided by ln 2.",
        ),
        Mistake(
            "times ln 2",
            lambda log_probs, n_bytes: -sum(_totals(log_probs)) * LN2 / sum(n_bytes),
            "You multiply by ln 2 where you must divide: a bit is the smaller unit, so bits are "
            "more.",
        ),
        Mistake(
            "sign",
            lambda log_probs, n_bytes: sum(_totals(log_probs)) / LN2 / sum(n_bytes),
            "Your figure is negative: surprise is minus the logarithm.",
        ),
        Mistake(
            "mean of ratios",
            lambda log_probs, n_bytes: np.mean(
                [-t / LN2 / n for t, n in zip(_totals(log_probs), n_bytes, strict=True)]
            ),
            "You average the texts' own figures, so a short text weighs as much as a long one: "
            "divide the sum of all bits by the sum of all bytes.",
        ),
        Mistake(
            "per token",
            lambda log_probs, n_bytes: -sum(_totals(log_probs)) / LN2 / sum(map(len, log_probs)),
            "You divide by the number of tokens: that is bits per token, which depends on the "
            "tokenizer.",
        ),
        Mistake(
            "perplexity",
            lambda log_probs, n_bytes: np.exp(-sum(_totals(log_probs)) / sum(n_bytes)),
            "That is a perplexity: bits per byte is the exponent, before anything is raised to it.",
        ),
        Mistake(
            "back to probabilities",
            lambda log_probs, n_bytes: (
                -sum(np.log2(np.exp(t)) for t in _totals(log_probs)) / sum(n_bytes)
            ),
            "The probability of a long text is too small for a float: add up logarithms, and do "
            "not go back to probabilities.",
        ),
    ),
)


# 3. implement: Kneser-Ney for bigrams


def kneser_ney_bigram(counts: Array, discount: float) -> Array:
    """Interpolated Kneser-Ney from a matrix of bigram counts, without a uniform base."""
    total = counts.sum(axis=1, keepdims=True)
    seen = counts > 0
    continuation = seen.sum(axis=0) / seen.sum()
    kept = np.maximum(counts - discount, 0) / np.maximum(total, 1)
    passed = np.where(
        total > 0, discount * seen.sum(axis=1, keepdims=True) / np.maximum(total, 1), 1
    )
    return np.asarray(kept + passed * continuation)


def bigram_cases(rng: np.random.Generator) -> Iterator[tuple[Array, float]]:
    """Sparse matrices, with a context that was never seen and a byte that follows one context."""
    for size, discount in ((4, 0.75), (6, 0.5), (9, 0.1)):
        counts = rng.poisson(1.2, size=(size, size)) * rng.integers(1, 9, size=(size, size))
        counts[0, :2] = 7, 1
        counts[[2, *((4, -1) if size > 4 else ())]] = 0  # never contexts
        counts[:, 3] = 0
        counts[1, 3] = 40  # frequent, after one context only
        yield counts, discount


def _variant(
    lower: Callable[[Array], Array] | None = None,
    passed: Callable[[Array, float], Array] | None = None,
    clip: bool = True,
    unseen: float = 1.0,
) -> Callable[[Array, float], Array]:
    """Kneser-Ney with one part replaced."""

    def smoothed(counts: Array, discount: float) -> Array:
        total, seen = counts.sum(axis=1, keepdims=True), counts > 0
        below = seen.sum(axis=0) / seen.sum() if lower is None else lower(counts)
        kept = counts - discount
        kept = (np.maximum(kept, 0) if clip else kept) / np.maximum(total, 1)
        share = seen.sum(axis=1, keepdims=True) if passed is None else passed(counts, discount)
        given = discount * share / np.maximum(total, 1)
        return np.asarray(np.where(total > 0, kept, 0) + np.where(total > 0, given, unseen) * below)

    return smoothed


def _first_mended(counts: Array, discount: float) -> Array:
    """Only the first context that was never seen passes everything on."""
    rows, right = _variant(unseen=0.0)(counts, discount), kneser_ney_bigram(counts, discount)
    place = int((counts.sum(axis=1) == 0).argmax())
    rows[place] = right[place]
    return rows


def rows_sum_to_one(
    answer: Callable[[Array, float], Array], rng: np.random.Generator
) -> str | None:
    """Whatever the counts: each row is a distribution."""
    rows = answer(rng.integers(0, 4, size=(7, 7)) + np.eye(7, dtype=int), 0.6).sum(axis=1)
    worst = rows[np.abs(rows - 1).argmax()]
    return None if abs(worst - 1) < 1e-9 else f"One of your rows sums to {worst:.3f}, not to 1."


KNESER_NEY = Implement(
    "ngram.kneser_ney_bigram",
    points=3,
    reference=kneser_ney_bigram,
    cases=bigram_cases,
    forbid=("ngram.kneser_ney", "ngram.Level", "ngram.NGramModel", "ngram.NGramCounts"),
    probes=(rows_sum_to_one,),
    mistakes=(
        Mistake(
            "raw counts below",
            _variant(lower=lambda counts: counts.sum(axis=0) / counts.sum()),
            "Your lower order is the byte's frequency: Kneser-Ney counts in how many different "
            "contexts the byte was seen.",
        ),
        Mistake(
            "successors for predecessors",
            _variant(lower=lambda counts: (counts > 0).sum(axis=1) / (counts > 0).sum()),
            "Your lower order counts what follows a byte: count what stands before it.",
        ),
        Mistake(
            "one discount passed",
            _variant(passed=lambda counts, discount: np.ones((len(counts), 1))),
            "A context passes on one discount for each different byte that follows it; you pass "
            "on one in all, and mass is lost.",
        ),
        Mistake(
            "negative",
            _variant(clip=False),
            "What was never seen gets a negative share from you: nothing can be taken from a "
            "count of 0.",
        ),
        Mistake(
            "unseen context",
            _variant(unseen=0.0),
            "A context that was never seen gets a row of zeros from you: it passes everything on "
            "to the lower order.",
        ),
        Mistake(
            "one unseen context mended",
            _first_mended,
            "You mend one context that was never seen; there may be several.",
        ),
        Mistake(
            "nothing passed on",
            _variant(passed=lambda counts, discount: np.zeros((len(counts), 1))),
            "You take the discount and pass nothing on, so unseen bytes stay impossible.",
        ),
        Mistake(
            "uniform below",
            _variant(lower=lambda counts: np.full(len(counts), 1 / len(counts))),
            "Your lower order is uniform: give each byte its share of the different bigrams.",
        ),
    ),
)


# 4. debug: interpolation that loses mass


def interpolate(counts: Array, lower: Array, keep: float) -> Array:
    """Jelinek-Mercer for one order."""
    total = counts.sum(axis=1, keepdims=True)
    mixed = keep * counts / np.maximum(total, 1) + (1 - keep) * lower
    return np.asarray(np.where(total > 0, mixed, lower))


def mixing_cases(rng: np.random.Generator) -> Iterator[tuple[Array, Array, float]]:
    """Counts with rows of zeros, a lower order that is a distribution."""
    for contexts, size, keep in ((3, 4, 0.7), (6, 5, 0.4), (1, 3, 0.9)):
        counts = rng.integers(0, 6, size=(contexts, size))
        counts[[0, 2, -1] if contexts > 3 else [-1]] = 0  # contexts that were never seen
        lower = rng.uniform(0.1, 1, size=size)
        yield counts, lower / lower.sum(), keep
    yield np.array([[2, 0], [1, 1]]), np.array([0.9, 0.1]), 0.5


def _one_row_mended(last: bool) -> Callable[[Array, Array, float], Array]:
    """The bug mended for a single context that was never seen."""

    def mended(counts: Array, lower: Array, keep: float) -> Array:
        rows = np.asarray(keep * _rate(counts, 1) + (1 - keep) * lower)
        unseen = np.flatnonzero(counts.sum(axis=1) == 0)
        if len(unseen):
            rows[unseen[-1 if last else 0]] = lower
        return rows

    return mended


def _rate(counts: Array, axis: int | None) -> Array:
    return np.asarray(counts / np.maximum(counts.sum(axis=axis, keepdims=True), 1))


def _seen(counts: Array) -> Array:
    return np.asarray(counts.sum(axis=1, keepdims=True) > 0)


INTERPOLATE = Debug(
    "ngram.interpolate",
    points=2,
    reference=interpolate,
    cases=mixing_cases,
    forbid=("ngram.jelinek_mercer", "ngram.Level", "ngram.NGramModel"),
    mistakes=(
        Mistake(
            "unseen context loses mass",
            lambda counts, lower, keep: keep * _rate(counts, 1) + (1 - keep) * lower,
            "Look at the row of a context that was never seen: it does not sum to one.",
        ),
        Mistake(
            "first unseen context mended",
            _one_row_mended(last=False),
            "You mend the first context that was never seen; there may be several.",
        ),
        Mistake(
            "last unseen context mended",
            _one_row_mended(last=True),
            "You mend the last context that was never seen; there may be others before it.",
        ),
        Mistake(
            "unseen context uniform",
            lambda counts, lower, keep: np.where(
                _seen(counts),
                keep * _rate(counts, 1) + (1 - keep) * lower,
                1 / counts.shape[1],
            ),
            "A context that was never seen is uniform in yours: the lower order knows more.",
        ),
        Mistake(
            "rescaled to one",
            lambda counts, lower, keep: _rescaled(_rate(counts, 1) + lower),
            "You rescale the rows to sum to one, but `keep` no longer decides how the two mix.",
        ),
        Mistake(
            "shares swapped",
            lambda counts, lower, keep: np.where(
                _seen(counts), (1 - keep) * _rate(counts, 1) + keep * lower, lower
            ),
            "You give `keep` to the lower order: it is what the context's own frequency keeps.",
        ),
        Mistake(
            "lower only for zeros",
            lambda counts, lower, keep: np.where(
                _seen(counts),
                np.where(counts > 0, keep * _rate(counts, 1), (1 - keep) * lower),
                lower,
            ),
            "You add the lower order only where the count is 0: in a mixture every byte gets its "
            "part of it, and so the rows sum to one.",
        ),
        Mistake(
            "table divided",
            lambda counts, lower, keep: np.where(
                _seen(counts), keep * _rate(counts, None) + (1 - keep) * lower, lower
            ),
            "You divide by the sum of the whole table: each context has its own total.",
        ),
    ),
)


def _rescaled(rows: Array) -> Array:
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


# 5. measure: what word beginnings cost

FIRST_LETTERS = Measure(
    "ngram.word_beginnings",
    points=2,
    reference=0.3459,
    rtol=0.01,
    mistakes=(
        Mistake(
            "share of bytes",
            0.1908,
            "That is their share of the bytes: weigh each byte with its surprise.",
        ),
        Mistake("spaces only", 0.2784, "You leave out the bytes after a newline."),
        Mistake(
            "the space itself",
            0.0744,
            "You added up the spaces and newlines themselves: the byte after them is asked for.",
        ),
        Mistake(
            "mean surprise",
            4.079,
            "That is the mean surprise of those bytes: their share of all bits is asked for.",
        ),
    ),
    note="Inside a word the next byte is often forced; where it begins, the choice is made.",
)


# 6. choose: which order to report

CHOOSE = Choose(
    "ngram.which_order",
    points=1,
    right="b",
    because="What chooses must not be what is reported, and half the table is a reason too.",
    wrong={
        "a": "That chooses on the test plays: the figure then reports your luck among eight tries.",
        "c": "On counted text the longest context always wins: that is overfitting.",
        "d": "A wide interval of each does not make them equal: the paired difference is far "
        "narrower.",
    },
)


QUESTIONS = (PERPLEXITY, BITS_PER_BYTE, KNESER_NEY, INTERPOLATE, FIRST_LETTERS, CHOOSE)
