"""How good is a model, and how sure may one be of it (chapter 11).

Perplexity by strided windows; questions with options, answered by likelihood, and their accuracy
with an interval; questions made from the plays; few-shot prompts; calibration; the overlap metrics
of generated text; memorization; and an adapter for EleutherAI's lm-eval.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from minilm.corpus import Play
from minilm.errors import ConfigError, DataError
from minilm.measure import LanguageModel, Score, Tokenizer

if TYPE_CHECKING:
    from minilm.model import Transformer

__all__ = [
    "TASKS",
    "Answers",
    "Bins",
    "Item",
    "Match",
    "accuracy",
    "answer",
    "bleu",
    "calibration",
    "calibration_error",
    "chrf",
    "cloze_items",
    "confusion_matrix",
    "continuation_log_probs",
    "distinct_n",
    "encode_pair",
    "few_shot",
    "genre_items",
    "lm_eval_model",
    "lm_eval_task",
    "longest_common_substring",
    "perplexity",
    "precision_recall_f1",
    "repetition",
    "speaker_items",
    "strided_log_probs",
]


# Perplexity


def strided_log_probs(
    model: LanguageModel,
    ids: Int[np.ndarray, " seq"],
    stride: int,
    window: int | None = None,
    batch_size: int = 16,
) -> Float[np.ndarray, " seq"]:
    """Log-probability of every id of one text, by windows that move on by `stride`.

    The first window counts whole, each later one only the ids that no earlier one has counted. With
    stride 1 every id is predicted from all that the window can hold: the exact value. With a stride
    of the whole window, the first id of each window is predicted from nothing.

    Args:
        model: What predicts.
        ids: The text.
        stride: From 1 to the window.
        window: Ids in a row; default: the model's `max_seq_len`.
        batch_size: Windows in one call of `log_probs`.

    Raises:
        ConfigError: If the stride is not between 1 and the window.
    """
    size = window or model.max_seq_len or max(len(ids), stride)
    if not 1 <= stride <= size or batch_size < 1:
        raise ConfigError(
            f"stride={stride}, batch_size={batch_size}; wanted a stride from 1 to the window of "
            f"{size} ids, and at least 1 window a call"
        )
    if len(ids) <= size:
        return np.asarray(model.log_probs(ids[None])[0], dtype=np.float64)
    starts = [*range(0, len(ids) - size, stride), len(ids) - size]
    known = [0, *(before + size for before in starts[:-1])]  # ids counted before each window
    result = np.empty(len(ids))
    for first in range(0, len(starts), batch_size):
        group = slice(first, first + batch_size)
        rows = model.log_probs(np.stack([ids[start : start + size] for start in starts[group]]))
        for start, done, row in zip(starts[group], known[group], rows, strict=True):
            result[done : start + size] = row[done - start :]
    return result


def perplexity(model: LanguageModel, text: str, stride: int, window: int | None = None) -> float:
    """Return e to the mean surprise of a text's tokens, in nats: equally likely choices a token.

    Compares only models with the same tokens; bits per byte compares all.

    Args:
        model: What predicts.
        text: At least one token.
        stride: As in `strided_log_probs`.
        window: As in `strided_log_probs`.

    Raises:
        ConfigError: If the text is empty, or as `strided_log_probs`.
    """
    ids = np.array(model.tokenizer.encode(text), dtype=np.int64)
    if not len(ids):
        raise ConfigError("the text is empty; perplexity is a mean over at least one token")
    return math.exp(-strided_log_probs(model, ids, stride, window).mean())


# Right or wrong


def accuracy(
    correct: Bool[np.ndarray, " items"] | Sequence[bool], clusters: Sequence[str]
) -> Score:
    """Give right and wrong answers the form of a `minilm.measure.Score`.

    An item is a scene of one byte, a right answer costs one bit: `bits_per_byte` is then the
    accuracy, and `interval` and `minilm.measure.compare` serve it as they serve bits.

    Args:
        correct: One for each item.
        clusters: What each item was made from, such as the slug of its play.

    Raises:
        ConfigError: If there are no items or the lengths differ.

    Example:
        >>> plays = ["othello", "othello", "macbeth", "macbeth"]
        >>> accuracy([True, False, True, True], plays).bits_per_byte
        0.75
    """
    if len(correct) != len(clusters) or not len(correct):
        raise ConfigError(
            f"{len(correct)} answers of {len(clusters)} clusters; wanted one cluster for each "
            "answer, and at least one"
        )
    values, names = np.asarray(correct, dtype=np.float64), sorted(set(clusters))
    parts = [values[np.array([cluster == name for cluster in clusters])] for name in names]
    return Score(tuple(names), tuple(parts), tuple(np.ones(len(part)) for part in parts))


def confusion_matrix(
    targets: Int[np.ndarray, " items"], predictions: Int[np.ndarray, " items"], n_classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Count the items of each true class (rows) that were given each class (columns).

    Raises:
        ConfigError: If a class is not between 0 and `n_classes - 1`.

    Example:
        >>> confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), 3)
        array([[1, 1, 0],
               [0, 1, 0],
               [0, 1, 0]])
    """
    both = np.stack([targets, predictions])
    if both.size and not 0 <= both.min() <= both.max() < n_classes:
        raise ConfigError(
            f"classes run from {both.min()} to {both.max()}; wanted 0 to {n_classes - 1}"
        )
    return np.bincount(both[0] * n_classes + both[1], minlength=n_classes**2).reshape(
        n_classes, n_classes
    )


def precision_recall_f1(
    confusion: Int[np.ndarray, "classes classes"],
) -> Float[np.ndarray, "3 classes"]:
    """Return for each class its precision, its recall, and their harmonic mean, F1.

    Precision: of the items given this class, the part that belongs to it. Recall: of the items
    that belong to it, the part that was given it. Where nothing can be said, 0.

    Example:
        >>> precision_recall_f1(np.array([[3, 1], [2, 2]])).round(3)
        array([[0.6  , 0.667],
               [0.75 , 0.5  ],
               [0.667, 0.571]])
    """
    hits, given, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    parts = [hits, hits, 2 * hits], [given, true, given + true]
    return np.stack([a / np.maximum(b, 1) for a, b in zip(*parts, strict=True)])


# Questions with options


@dataclass(frozen=True)
class Item:
    """A text, the ways in which it may go on, and which of them is right.

    Attributes:
        context: What the model reads first.
        options: Continuations, each with the space that belongs before it.
        answer: Index of the right option.
        cluster: What the item was made from; items of one cluster resemble each other.

    Raises:
        ConfigError: If there are fewer than two different options, or the answer is none of them.
    """

    context: str
    options: tuple[str, ...]
    answer: int
    cluster: str = ""

    def __post_init__(self) -> None:
        n = len(self.options)
        if n < 2 or len(set(self.options)) < n or "" in self.options:
            raise ConfigError(f"options {self.options}; wanted two or more, different, none empty")
        if not 0 <= self.answer < n:
            raise ConfigError(f"answer={self.answer}; wanted the index of one of {n} options")

    @property
    def solved(self) -> str:
        """The context with its right continuation."""
        return self.context + self.options[self.answer]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Encode a text and its continuation as one, and say how many ids belong to the text.

    Spaces at the end of the context go with the continuation, since the tokens of most models
    begin with a space. The rule is lm-eval's.

    Raises:
        DataError: If the continuation has no id of its own.
    """
    ids = tokenizer.encode(context + continuation)
    n_context = len(tokenizer.encode(context.rstrip()))
    if n_context >= len(ids):
        raise DataError(
            f"{continuation!r} has no token of its own after {context[-20:]!r}; "
            "begin it with a space, or end the context at another place"
        )
    return ids, n_context


def continuation_log_probs(
    model: LanguageModel, pairs: Sequence[tuple[str, str]], batch_size: int = 16
) -> Float[np.ndarray, " pairs"]:
    """Log-probability of each continuation, given its context: the sum over its tokens.

    A context that is too long loses its beginning. Rows of one batch are padded on the right,
    which a model that reads from left to right does not see.

    Args:
        model: What predicts.
        pairs: Contexts, which may be empty, and continuations.
        batch_size: Rows in one call of `log_probs`.

    Raises:
        ConfigError: If a continuation alone is longer than the model's `max_seq_len`.
        DataError: As `encode_pair`.
    """
    encoded = [encode_pair(model.tokenizer, *pair) for pair in pairs]
    lengths = [len(ids) - n_context for ids, n_context in encoded]  # of the continuations
    longest = model.max_seq_len or max((len(ids) for ids, _ in encoded), default=0)
    if max(lengths, default=0) > longest:
        raise ConfigError(
            f"a continuation of {max(lengths)} tokens does not fit max_seq_len={longest}; "
            "shorten the options"
        )
    rows = [ids[-longest:] for ids, _ in encoded]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike in length: little padding
    result = np.empty(len(rows))
    for first in range(0, len(rows), batch_size):
        group = order[first : first + batch_size]
        padded = np.zeros((len(group), len(rows[group[-1]])), dtype=np.int64)
        for row, i in zip(padded, group, strict=True):
            row[: len(rows[i])] = rows[i]
        log_probs = model.log_probs(padded)
        for row, i in zip(log_probs, group, strict=True):
            result[i] = row[len(rows[i]) - lengths[i] : len(rows[i])].sum()
    return result


LENGTHS: Mapping[str, Callable[[str], int]] = {
    "none": lambda option: 1,
    "characters": len,
    "bytes": lambda option: len(option.encode()),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model thinks of each option of each item.

    Attributes:
        items: The questions.
        log_probs: For each item, the log-probability of each option after the context.
    """

    items: tuple[Item, ...]
    log_probs: tuple[Float[np.ndarray, "_"], ...]

    def chosen(self, per: str = "none") -> Int[np.ndarray, " items"]:
        """Index of the option with the highest log-probability, whole or per unit of length."""
        if per not in LENGTHS:
            raise ConfigError(f"per={per!r}; use one of {', '.join(LENGTHS)}")
        lengths = ([LENGTHS[per](option) for option in item.options] for item in self.items)
        pairs = zip(self.log_probs, lengths, strict=True)
        return np.array([int(np.argmax(values / np.array(n))) for values, n in pairs])

    def targets(self) -> Int[np.ndarray, " items"]:
        """Index of the right option."""
        return np.array([item.answer for item in self.items])

    def score(self, per: str = "none") -> Score:
        """The accuracy, with an interval that is clustered as the items are."""
        right = self.chosen(per) == self.targets()
        return accuracy(right, [item.cluster for item in self.items])

    def confidence(self) -> Float[np.ndarray, " items"]:
        """How sure the model is of the most probable option, if one of them must come."""
        return np.array([1 / np.exp(each - each.max()).sum() for each in self.log_probs])


def answer(model: LanguageModel, items: Sequence[Item], batch_size: int = 16) -> Answers:
    """Let a model read each item with each option.

    Raises:
        ConfigError: If there are no items, or as `continuation_log_probs`.
    """
    if not items:
        raise ConfigError("no items to answer; make some, for example by cloze_items(plays)")
    pairs = [(item.context, option) for item in items for option in item.options]
    ends = np.cumsum([len(item.options) for item in items])
    log_probs = continuation_log_probs(model, pairs, batch_size)
    return Answers(tuple(items), tuple(np.split(log_probs, ends[:-1])))


# Questions made from the plays


LINE_END = re.compile(r"(?<=[a-z,;] )[a-z]{3,}(?=[^\w\n]*\n)")  # a line's last word


def shuffled(
    context: str, right: str, wrong: Sequence[str], cluster: str, rng: np.random.Generator
) -> Item:
    """Make an item whose options stand in a random order."""
    options = (right, *wrong)
    order = rng.permutation(len(options))
    return Item(context, tuple(options[i] for i in order), int(np.argmin(order)), cluster)


def shares(plays: Sequence[Play], n_items: int) -> list[tuple[Play, int]]:
    """Divide a number of items among plays as evenly as possible."""
    if not plays or n_items < len(plays):
        raise ConfigError(f"{n_items} items of {len(plays)} plays; ask for one of each, or more")
    return [(play, n_items * (i + 1) // len(plays) - n_items * i // len(plays))
            for i, play in enumerate(plays)]  # fmt: skip


def cloze_items(
    plays: Sequence[Play], n_items: int = 150, seed: int = 0, n_options: int = 4, size: int = 400
) -> tuple[Item, ...]:
    """Take the last word off lines: which word was it?

    The wrong options are last words of other lines of the play, so that a model which only knows
    how frequent words are gains nothing.

    Args:
        plays: Sources, each with its share of the items.
        n_items: How many.
        seed: Equal seeds give equal items.
        n_options: Words to choose from.
        size: Characters of the context, about.
    """
    rng, items = np.random.default_rng(seed), []
    for play, n in shares(plays, n_items):
        ends = list(LINE_END.finditer(play.text))
        for i in rng.choice(len(ends), size=n, replace=False):
            wrong: list[str] = []
            while len(wrong) < n_options - 1:
                word = ends[rng.integers(len(ends))].group()
                wrong += [word] * (word not in (ends[i].group(), *wrong))
            before = play.text[max(0, ends[i].start() - size) : ends[i].start() - 1]
            context = before[before.find("\n") + 1 :] if len(before) == size - 1 else before
            options = [f" {word}" for word in (ends[i].group(), *wrong)]
            items.append(shuffled(context, options[0], options[1:], play.slug, rng))
    return tuple(items)


def speaker_items(
    plays: Sequence[Play], n_items: int = 150, seed: int = 0, n_before: int = 6, size: int = 600
) -> tuple[Item, ...]:
    """Who speaks next: who does, who has just spoken, or a third person of the conversation?

    Args:
        plays: Sources, each with its share of the items.
        n_items: How many.
        seed: Equal seeds give equal items.
        n_before: Speeches in the context.
        size: Characters of the context, at most.

    Raises:
        ConfigError: If the plays have too few such places.
    """
    rng, items = np.random.default_rng(seed), []
    for play, n in shares(plays, n_items):
        speeches, found = play.text.strip().split("\n\n"), []
        names = [speech.partition("\n")[0] for speech in speeches]
        for i in range(n_before, len(speeches)):
            context = "\n\n".join([*speeches[i - n_before : i], ""])
            others = sorted(set(names[i - n_before : i]) - {names[i], names[i - 1]})
            known = names[i] in names[i - n_before : i - 1] and names[i] != names[i - 1]
            if known and others and len(context) <= size:
                found.append((context, names[i], names[i - 1], others))
        if len(found) < n:
            raise ConfigError(f"{play.slug} has {len(found)} such places; ask for fewer than {n}")
        for i in rng.choice(len(found), size=n, replace=False):
            context, right, last, others = found[i]
            third = others[rng.integers(len(others))]
            items.append(shuffled(context, right, (last, third), play.slug, rng))
    return tuple(items)


def genre_items(
    plays: Sequence[Play], n_items: int = 150, seed: int = 0, size: int = 600
) -> tuple[Item, ...]:
    """Is this passage from a comedy, a history or a tragedy? The options stand in that order.

    Args:
        plays: Sources, each with its share of the items.
        n_items: How many.
        seed: Equal seeds give equal items.
        size: Characters of the passage, at most.
    """
    genres = ("comedy", "history", "tragedy")
    rng, items = np.random.default_rng(seed), []
    for play, n in shares(plays, n_items):
        for start in rng.integers(len(play.text) - size, size=n):
            begin = play.text.find("\n\n", start) + 2  # of the next speech
            passage = play.text[begin : begin + size].rpartition("\n")[0].strip()
            context = f"{passage}\n\nThis passage is from a"
            options = tuple(f" {genre}" for genre in genres)
            items.append(Item(context, options, genres.index(play.genre), play.slug))
    return tuple(items)


TASKS: Mapping[str, Callable[..., tuple[Item, ...]]] = {
    "cloze": cloze_items,
    "speaker": speaker_items,
    "genre": genre_items,
}


def few_shot(
    items: Sequence[Item],
    pool: Sequence[Item],
    shots: int,
    seed: int = 0,
    separator: str = "\n",
) -> tuple[Item, ...]:
    """Put solved items of a pool before each item.

    The shots of one seed are nested: with four, an item has the two that it had with two, and two
    more before them. No item is among its own shots.

    Raises:
        ConfigError: If the pool is too small.
    """
    rng, result = np.random.default_rng(seed), []
    for item in items:
        others = [one for one in pool if one.context != item.context]
        if shots > len(others):
            raise ConfigError(f"{shots} shots of a pool of {len(others)}; give a larger pool")
        order = rng.permutation(len(others))[:shots][::-1]
        solved = [others[i].solved for i in order]
        result.append(replace(item, context=separator.join([*solved, item.context])))
    return tuple(result)


# Calibration


class Bins(NamedTuple):
    """Predictions sorted by confidence into bins of equal width; empty ones are left out."""

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    size: Int[np.ndarray, " bins"]


def calibration(
    confidence: Float[np.ndarray, " items"], correct: Bool[np.ndarray, " items"], n_bins: int = 10
) -> Bins:
    """For each bin of confidence: its mean, the part that was right, and how many.

    Raises:
        ConfigError: If a confidence is not between 0 and 1.
    """
    if n_bins < 1 or not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ConfigError(
            f"n_bins={n_bins}, {len(confidence)} confidences; wanted at least one of each, "
            "and probabilities between 0 and 1"
        )
    edges = np.linspace(0, 1, n_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence)
    sums = [np.bincount(bins, each, n_bins) for each in (confidence, correct, np.ones(len(bins)))]
    filled = sums[2] > 0
    means = [each[filled] / sums[2][filled] for each in sums[:2]]
    return Bins(means[0], means[1], sums[2][filled].astype(np.int64))


def calibration_error(bins: Bins) -> float:
    """Return the expected calibration error: the mean over items of how far their bin's accuracy is
    from its confidence.

    Source:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    gaps = np.abs(bins.accuracy - bins.confidence)
    return float((bins.size * gaps).sum() / bins.size.sum())


# Generated text


def count_grams(sequence: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    """Count each run of `n` elements."""
    return Counter(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse lists that do not belong together."""
    texts_for_references = any(isinstance(each, str) for each in references)
    if len(hypotheses) != len(references) or texts_for_references or not all(references):
        raise ConfigError(
            f"{len(hypotheses)} hypotheses and {len(references)} references; wanted for each "
            "hypothesis a list of one reference or more"
        )


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], max_n: int = 4) -> float:
    """Return BLEU, from 0 to 100: the n-grams that hypotheses share with references.

    The geometric mean, over n, of the part of the hypotheses' n-grams that a reference has too, and
    no oftener than one reference has it; less if the hypotheses are shorter than the references.
    Words are what spaces separate. Orders without a match are smoothed as in NIST's mteval.

    Args:
        hypotheses: Generated texts.
        references: For each, one right text or more.
        max_n: Longest n-gram.

    Raises:
        ConfigError: If the lists do not belong together.

    Source:
        Papineni et al. 2002, https://aclanthology.org/P02-1040
    """
    check_references(hypotheses, references)
    matched, total, n_words, wanted_words = np.zeros(max_n), np.zeros(max_n), 0, 0
    for hypothesis, rights in zip(hypotheses, references, strict=True):
        words, right_words = hypothesis.split(), [right.split() for right in rights]
        n_words += len(words)
        lengths = (len(right) for right in right_words)
        wanted_words += min(lengths, key=lambda length: (abs(length - len(words)), length))
        for n in range(1, max_n + 1):
            allowed: Counter[tuple[Hashable, ...]] = Counter()
            for right in right_words:
                allowed |= count_grams(right, n)  # the larger count of each
            grams = count_grams(words, n)
            matched[n - 1] += (grams & allowed).total()  # the smaller
            total[n - 1] += grams.total()
    if not matched[0] or not total[-1]:
        return 0.0
    smoothed = np.where(matched > 0, matched, 0.5 ** np.cumsum(matched == 0))
    brevity = min(0.0, 1 - wanted_words / n_words)
    return 100 * math.exp(brevity + np.log(smoothed / total).mean())


def chrf(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    max_n: int = 6,
    beta: float = 2.0,
) -> float:
    """Return chrF, from 0 to 100: an F score of character n-grams, spaces left out.

    Precision and recall are means over n; recall weighs `beta` times as much. Of several references
    the one that fits best counts.

    Args:
        hypotheses: Generated texts.
        references: For each, one right text or more.
        max_n: Longest n-gram.
        beta: Weight of recall.

    Raises:
        ConfigError: If the lists do not belong together.

    Source:
        Popović 2015, https://aclanthology.org/W15-3049
    """
    check_references(hypotheses, references)

    def f_score(counts: Float[np.ndarray, "3 orders"]) -> float:
        found = counts[:, (counts[:2] > 0).all(axis=0)]  # orders that both sides have
        if not found[2].sum():
            return 0.0
        precision, recall = (found[2] / found[:2]).mean(axis=1)
        return float((1 + beta**2) * precision * recall / (beta**2 * precision + recall))

    total = np.zeros((3, max_n))
    for hypothesis, rights in zip(hypotheses, references, strict=True):
        best = -1.0
        for right in rights:
            counts = np.zeros((3, max_n))
            for n in range(1, max_n + 1):
                sides = [count_grams("".join(text.split()), n) for text in (hypothesis, right)]
                shared = sides[0] & sides[1]
                given = sides[0] if sides[1] else shared  # a reference too short for n asks nothing
                counts[:, n - 1] = [each.total() for each in (given, sides[1], shared)]
            if f_score(counts) > best:
                best, kept = f_score(counts), counts
        total += kept
    return 100 * f_score(total)


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return the part of all n-grams of some texts that are different ones: variety.

    Raises:
        ConfigError: If no text is long enough.

    Example:
        >>> distinct_n(["to be or not to be".split()], 1)
        0.6666666666666666

    Source:
        Li et al. 2016, https://arxiv.org/abs/1510.03055
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for text in texts:
        counts.update(count_grams(text, n))
    if not counts:
        raise ConfigError(f"no text has n={n} elements; use longer texts or a smaller n")
    return len(counts) / counts.total()


def repetition(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return the part of a text's n-grams that the same text already had; the mean over texts.

    Source:
        Welleck et al. 2019, https://arxiv.org/abs/1908.04319
    """
    return float(np.mean([1 - distinct_n([text], n) for text in texts]))


# Memorization


class Match(NamedTuple):
    """Where two byte strings agree."""

    start: int
    source_start: int
    length: int


def window_hashes(data: bytes) -> Callable[[int], UInt64[np.ndarray, " windows"]]:
    """Prepare a function that gives each run of so many bytes a number; equal runs, equal numbers.

    The run b0 b1 b2 ... has b0 + b1 p + b2 p**2 + ..., modulo 2**64, for an odd p. It is a
    difference of two running sums, divided by a power of p.
    """
    p = 0x9E3779B97F4A7C15
    powers, inverse = np.ones((2, len(data) + 1), dtype=np.uint64)
    powers[1:], inverse[1:] = p, pow(p, -1, 2**64)
    np.multiply.accumulate(powers, out=powers)
    np.multiply.accumulate(inverse, out=inverse)
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(np.frombuffer(data, np.uint8) * powers[:-1], out=sums[1:])
    return lambda length: (sums[length:] - sums[:-length]) * inverse[:-length]


def longest_common_substring(text: bytes, source: bytes) -> Match:
    """Find a longest run of bytes of a text that also stands in a source.

    If a run of some length is shared, shorter ones are too, so the length is found by halving: each
    step hashes all windows of both sides and compares bytes only where hashes agree.

    Args:
        text: Such as generated text.
        source: Such as the training text; megabytes take a second or two.

    Returns:
        The first such run in the source, where it first stands in the text, and its length.

    Example:
        >>> longest_common_substring(b"to be or not", b"nothing will come of nothing")
        Match(start=8, source_start=20, length=4)
    """
    ours_of, theirs_of = window_hashes(text), window_hashes(source)

    def shared(length: int) -> Match | None:
        ours, theirs = ours_of(length), theirs_of(length)
        seen = np.zeros(2**16, dtype=bool)
        seen[ours >> np.uint64(48)] = True
        places = np.flatnonzero(seen[theirs >> np.uint64(48)])  # few: a look at 16 bits of each
        for place in places[np.isin(theirs[places], ours)].tolist():
            start = text.find(source[place : place + length])
            if start >= 0:
                return Match(start, place, length)
        return None

    best, too_long = Match(0, 0, 0), min(len(text), len(source)) + 1
    while best.length + 1 < too_long:
        middle = (best.length + too_long) // 2
        found = shared(middle)
        best, too_long = (found, too_long) if found else (best, middle)
    return best


# lm-eval


def lm_eval_model(model: "Transformer", batch_size: int = 16) -> Any:
    """Give a model the interface of EleutherAI's lm-eval, for `simple_evaluate(model=...)`.

    Args:
        model: With a tokenizer.
        batch_size: Rows in one call of the model.

    Raises:
        ConfigError: If lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError("lm_eval_model needs lm-eval; install it: pip install lm-eval") from error
    from minilm.model import generate

    def write(contexts: Sequence[str], n_tokens: int) -> list[list[int]]:
        encoded = (model.tokenizer.encode(context) for context in contexts)
        prompts = [[model.begin_id, *ids][-model.config.max_seq_len :] for ids in encoded]
        written = []
        for first in range(0, len(prompts), batch_size):
            part = prompts[first : first + batch_size]
            written += generate(model, part, n_tokens, temperature=0.0)
        return written

    class Adapter(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            log_probs = continuation_log_probs(model, pairs, batch_size)
            ends = [ids[n:] for ids, n in (encode_pair(model.tokenizer, *pair) for pair in pairs)]
            contexts = list(dict.fromkeys(context.rstrip() for context, _ in pairs))
            greedy = dict(zip(contexts, write(contexts, max(map(len, ends))), strict=True))
            same = [
                greedy[context.rstrip()][: len(end)] == end
                for (context, _), end in zip(pairs, ends, strict=True)
            ]
            return list(zip(log_probs.tolist(), same, strict=True))

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [np.array(model.tokenizer.encode(request.args[0])) for request in requests]
            stride = model.config.max_seq_len // 2
            return [float(strided_log_probs(model, ids, stride).sum()) for ids in texts]

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts = []
            for context, settings in (request.args for request in requests):
                ids = write([context], settings.get("max_gen_toks", 64))[0]
                text = model.tokenizer.decode(ids)
                for stop in settings.get("until", []):
                    text = text.partition(stop)[0]
                texts.append(text)
            return texts

    return Adapter()


def lm_eval_task(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Describe items as a task of lm-eval, without a file and without the network.

    Its metrics `acc`, `acc_norm` and `acc_bytes` are `Answers.score` by "none", "characters" and
    "bytes".

    Args:
        name: Of the task.
        items: All with the same number of options.
    """
    documents = [
        {"context": item.context, "options": list(item.options), "answer": item.answer}
        for item in items
    ]

    def dataset(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": lambda document: document["context"],
        "doc_to_choice": lambda document: document["options"],
        "doc_to_target": lambda document: document["answer"],
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm", "acc_bytes")
        ],
    }
