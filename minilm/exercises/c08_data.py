"""Questions of chapter 08: recall, signatures, rows of a rank, a sampler, a leak, a symptom."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Row: TypeAlias = list[tuple[int, int]]


# predict: the recall of bands


def recall(similarity: float, bands: int, rows: int) -> float:
    return 1 - (1 - similarity**rows) ** bands


def bandings(rng: np.random.Generator) -> Iterator[tuple[float, int, int]]:
    yield 0.8, 14, 8
    for rows in (2, 3, 5, 6):
        yield float(rng.uniform(0.35, 0.75)), int(rng.integers(rows + 1, 9)), rows


# implement: MinHash signatures


def signature(shingles: Array, a: Array, b: Array, p: int) -> Array:
    hashed = (a[:, None] * shingles[None, :] + b[:, None]) % p
    smallest: Array = hashed.min(axis=1)
    return smallest


def texts(rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array, int]]:
    for n, size, p in ((7, 5, 101), (3, 4, 1009), (4, 4, 997), (1, 3, 97), (12, 6, 2_147_483_647)):
        shingles = rng.choice(np.arange(1, min(p, 10**6)), size=n, replace=False)
        a, b = rng.integers(1, p, size=(2, size))
        yield shingles, a, b, p


def one_function(shingles: Array, a: Array, b: Array, p: int) -> Array:
    kept: Array = np.sort((a[0] * shingles + b[0]) % p)[: len(a)]
    return kept


def smallest_first(shingles: Array, a: Array, b: Array, p: int) -> Array:
    hashed: Array = (a * shingles.min() + b) % p
    return hashed


def which_shingle(shingles: Array, a: Array, b: Array, p: int) -> Array:
    hashed = (a[:, None] * shingles[None, :] + b[:, None]) % p
    taken: Array = shingles[hashed.argmin(axis=1)]
    return taken


# implement: the rows of one process


def rank_rows(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    sequences = range(step * batch + rank, (step + 1) * batch, ranks)
    return [divmod(sequence, windows) for sequence in sequences]


def shares(rng: np.random.Generator) -> Iterator[tuple[int, int, int, int, int]]:
    yield 0, 6, 1, 2, 100
    yield 3, 7, 2, 3, 10  # uneven rows, and an epoch that ends within the batch
    yield 4, 10, 0, 4, 23
    yield 2, 5, 0, 1, 4  # a batch larger than an epoch
    for _ in range(4):
        ranks = int(rng.integers(2, 6))
        batch, rank = ranks + int(rng.integers(1, 9)), int(rng.integers(ranks))
        yield int(rng.integers(1, 9)), batch, rank, ranks, int(rng.integers(5, 40))


def blocks(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    first, last = rank * batch // ranks, (rank + 1) * batch // ranks
    return [divmod(step * batch + row, windows) for row in range(first, last)]


def even_blocks(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    share = batch // ranks
    first = step * batch + rank * share
    return [divmod(place, windows) for place in range(first, first + share)]


def batch_each(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    first = step * batch * ranks + rank
    return [divmod(first + ranks * row, windows) for row in range(batch)]


def remainder(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    sequences = range(step * batch, (step + 1) * batch)
    return [divmod(n, windows) for n in sequences if n % ranks == rank]


def even_rows(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return rank_rows(step, batch, rank, ranks, windows)[: batch // ranks]


def epoch_of_the_step(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    epoch = step * batch // windows
    return [(epoch, n % windows) for n in range(step * batch + rank, (step + 1) * batch, ranks)]


def whole_batches(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    epoch, place = divmod(step, max(windows // batch, 1))
    return [(epoch, n) for n in range(place * batch + rank, (place + 1) * batch, ranks)]


def no_step(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return rank_rows(0, batch, rank, ranks, windows)


def same_rows(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return rank_rows(step, batch, 0, 1, windows)


def rank_from_one(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return [divmod(n, windows) for n in range(step * batch + rank - 1, (step + 1) * batch, ranks)]


def place_first(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return [(place, epoch) for epoch, place in rank_rows(step, batch, rank, ranks, windows)]


def no_epochs(step: int, batch: int, rank: int, ranks: int, windows: int) -> Row:
    return [(0, n) for n in range(step * batch + rank, (step + 1) * batch, ranks)]


# debug: a sampler that loses and repeats


class Sampler:
    """The right one, and by its switches the wrong ones."""

    drops = False  # what does not fill a batch at the end of an epoch
    kept = "epoch place"  # what the state holds
    same_order = False  # in every epoch
    keeps_rest = True  # of a batch that an epoch does not fill, from the next epoch
    late = 0  # windows too many that the state counts
    restarts = False  # the epoch, when resumed
    forgets = False  # in a new epoch, what its first batch has taken already

    def __init__(self, n_windows: int, batch_size: int, seed: int) -> None:
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self.epoch = self.place = 0

    def order(self) -> Array:
        epoch = 0 if self.same_order else self.epoch
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)

    def next_batch(self) -> list[int]:
        rows: list[int] = []
        if self.drops:
            if self.place + self.batch_size > self.n_windows:
                self.epoch, self.place = self.epoch + 1, 0
            rows += self.order()[self.place : self.place + self.batch_size].tolist()
            self.place += self.batch_size
            return rows
        begun = self.epoch
        while len(rows) < self.batch_size:
            if self.place == self.n_windows:
                self.epoch, self.place = self.epoch + 1, 0
                if not self.keeps_rest and rows:
                    break
            rows.append(int(self.order()[self.place]))
            self.place += 1
        if self.forgets and self.epoch > begun:
            self.place = 0
        return rows

    def state_dict(self) -> dict[str, int]:
        state = {"epoch": self.epoch, "place": self.place + self.late}
        return {name: state[name] for name in self.kept.split()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state.get("epoch", 0)
        self.place = 0 if self.restarts else state.get("place", 0)


def switched(**switches: Any) -> type[Sampler]:
    """The sampler with some of its switches turned."""
    return type("Sampler", (Sampler,), switches)


def run_sampler(
    answer: Callable[[int, int, int], Any],
    n_windows: int,
    batch_size: int,
    seed: int,
    stop: int,
    steps: int,
) -> list[list[int]]:
    """Draw `stop` batches, resume from the state as a file would hold it, draw the others."""
    first = answer(n_windows, batch_size, seed)
    rows = [[int(row) for row in first.next_batch()] for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    second = answer(n_windows, batch_size, seed)
    second.load_state_dict(state)
    rows += [[int(row) for row in first.next_batch()] for _ in range(2)]  # the first goes on, too
    return rows + [[int(row) for row in second.next_batch()] for _ in range(steps - stop)]


def runs(rng: np.random.Generator) -> Iterator[tuple[int, int, int, int, int]]:
    yield 10, 4, 0, 1, 6
    yield 12, 3, 1, 5, 9  # batches fill the epoch
    yield 11, 4, 2, 4, 8  # stopped in the second epoch
    yield 9, 3, 3, 3, 7  # stopped between two epochs
    for _ in range(3):
        windows, batch = int(rng.integers(12, 20)), int(rng.integers(2, 6))
        yield windows, batch, int(rng.integers(99)), int(rng.integers(5, 9)), 12


# measure: which scenes have leaked


LEAKED = 7


QUESTIONS = (
    Predict(
        "data.recall",
        points=1,
        reference=recall,
        forbid=("documents.expected_recall",),
        cases=bandings,
        factor=1.01,
        note="With 14 bands of 8 rows, 92% of the pairs of similarity 0.8.",
        mistakes=(
            Mistake(
                "missed",
                lambda similarity, bands, rows: (1 - similarity**rows) ** bands,
                "That is the probability that no band agrees: the pair is missed.",
            ),
            Mistake(
                "one band",
                lambda similarity, bands, rows: similarity**rows,
                "That is one band; any of the bands will do.",
            ),
            Mistake(
                "all bands",
                lambda similarity, bands, rows: similarity ** (rows * bands),
                "You ask that all places agree; one band of `rows` places is enough.",
            ),
            Mistake(
                "bands for rows",
                lambda similarity, bands, rows: recall(similarity, rows, bands),
                "Bands and rows are exchanged: a band agrees when all its `rows` places do.",
            ),
            Mistake(
                "any place",
                lambda similarity, bands, rows: 1 - (1 - similarity) ** (rows * bands),
                "You ask that any one place agrees; a whole band has to.",
            ),
            Mistake(
                "any place in every band",
                lambda similarity, bands, rows: (1 - (1 - similarity) ** rows) ** bands,
                "That is: in every band some place agrees. Wanted: in some band every place.",
            ),
            Mistake(
                "expected bands",
                lambda similarity, bands, rows: bands * similarity**rows,
                "That is the expected number of bands that agree; it can be more than 1.",
            ),
        ),
    ),
    Implement(
        "data.signature",
        points=2,
        reference=signature,
        forbid=("documents.signature",),
        cases=texts,
        mistakes=(
            Mistake(
                "smallest over functions",
                lambda shingles, a, b, p: ((a[:, None] * shingles[None, :] + b[:, None]) % p).min(
                    axis=0
                ),
                "You take the smallest over the hash functions; wanted for each function the "
                "smallest over the shingles.",
            ),
            Mistake(
                "largest",
                lambda shingles, a, b, p: ((a[:, None] * shingles[None, :] + b[:, None]) % p).max(
                    axis=1
                ),
                "You take the largest value. It would serve as well, but two indexes must agree: "
                "wanted the smallest.",
            ),
            Mistake(
                "place of the smallest",
                lambda shingles, a, b, p: (
                    (a[:, None] * shingles[None, :] + b[:, None]) % p
                ).argmin(axis=1),
                "You return where the smallest value stands. The place differs between two texts "
                "even when the shingle is the same: return the value.",
            ),
            Mistake(
                "the shingle itself",
                which_shingle,
                "You return the shingle whose hash is smallest; wanted the hash.",
            ),
            Mistake(
                "one function",
                one_function,
                "You keep the smallest values of the first function; each place has a function "
                "of its own.",
            ),
            Mistake(
                "hash of the smallest",
                smallest_first,
                "You hash the smallest shingle. The order of the shingles says nothing: hash all "
                "of them, then take the smallest.",
            ),
            Mistake(
                "no modulus",
                lambda shingles, a, b, p: (a[:, None] * shingles[None, :] + b[:, None]).min(axis=1),
                "Without the remainder by p all functions rise with the shingle, so all have "
                "their smallest value at the same one.",
            ),
            Mistake(
                "no shift",
                lambda shingles, a, b, p: ((a[:, None] * shingles[None, :]) % p).min(axis=1),
                "b is missing.",
            ),
            Mistake(
                "modulus before the shift",
                lambda shingles, a, b, p: ((a[:, None] * shingles[None, :]) % p + b[:, None]).min(
                    axis=1
                ),
                "You add b after the remainder was taken; it belongs inside.",
            ),
            Mistake(
                "sorted",
                lambda shingles, a, b, p: np.sort(signature(shingles, a, b, p)),
                "You sort the signature; its places belong to the functions, and two texts are "
                "compared place by place.",
            ),
            Mistake(
                "first shingle",
                lambda shingles, a, b, p: (a * shingles[0] + b) % p,
                "You hash the first shingle only.",
            ),
        ),
    ),
    Implement(
        "data.rank_rows",
        points=3,
        reference=rank_rows,
        forbid=("data.BatchSampler",),
        cases=shares,
        mistakes=(
            Mistake(
                "blocks",
                blocks,
                "Your processes take neighbouring rows; wanted every `ranks`-th row, beginning "
                "with row `rank`.",
            ),
            Mistake(
                "equal blocks",
                even_blocks,
                "Your processes take neighbouring rows, and rows that do not divide evenly are "
                "lost; wanted every `ranks`-th row, beginning with row `rank`.",
            ),
            Mistake(
                "a batch each",
                batch_each,
                "You give each process `batch` rows; `batch` counts the rows of all together.",
            ),
            Mistake(
                "remainder of the sequence",
                remainder,
                "You take the sequences whose number leaves the remainder `rank`; count the rows "
                "of the batch, which begin with 0 in every step.",
            ),
            Mistake(
                "rows left over",
                even_rows,
                "The rows that do not divide evenly are lost: some processes have one row more.",
            ),
            Mistake(
                "epoch of the first row",
                epoch_of_the_step,
                "All your rows have the epoch of the batch's first; an epoch can end within a "
                "batch.",
            ),
            Mistake(
                "whole batches only",
                whole_batches,
                "You begin each epoch with a new batch, so the windows that do not fill the last "
                "batch are never read.",
            ),
            Mistake(
                "no step",
                no_step,
                "Your answer does not depend on `step`: every step reads the first batch.",
            ),
            Mistake(
                "all rows",
                same_rows,
                "Every process reads the whole batch; it should read its own rows.",
            ),
            Mistake(
                "ranks from one",
                rank_from_one,
                "Ranks begin with 0: process 0 reads row 0.",
            ),
            Mistake(
                "place first",
                place_first,
                "Your pairs are (place, epoch); wanted (epoch, place).",
            ),
            Mistake(
                "no epochs",
                no_epochs,
                "Your places go beyond the last window: after `windows` sequences the next epoch "
                "begins.",
            ),
        ),
    ),
    Debug(
        "data.sampler",
        points=3,
        reference=Sampler,
        cases=runs,
        run=run_sampler,
        forbid=("data.BatchSampler",),
        mistakes=(
            Mistake(
                "loses and repeats",
                switched(drops=True, kept="place"),
                "Two bugs are left: the windows that do not fill a last batch are never read, and "
                "a resumed sampler is back in the first epoch.",
            ),
            Mistake(
                "loses",
                switched(drops=True),
                "The resumed sampler is right now. But the windows that do not fill the last "
                "batch of an epoch are still never read.",
            ),
            Mistake(
                "repeats",
                switched(kept="place"),
                "No window is lost now. But a sampler that is resumed in a later epoch still "
                "reads the first epoch's order again.",
            ),
            Mistake(
                "a short last batch",
                switched(keeps_rest=False),
                "The last batch of an epoch is short; fill it from the next epoch, so that every "
                "batch has `batch_size` rows.",
            ),
            Mistake(
                "a short last batch, and repeats",
                switched(keeps_rest=False, kept="place"),
                "The last batch of an epoch is short, and a resumed sampler is back in the first "
                "epoch.",
            ),
            Mistake(
                "one order",
                switched(same_order=True),
                "Every epoch has the first one's order now: the epoch belongs in the seed.",
            ),
            Mistake(
                "back to the epoch's beginning",
                switched(restarts=True),
                "Your resumed sampler begins its epoch again: what was read of it comes twice.",
            ),
            Mistake(
                "the first rows again",
                switched(forgets=True),
                "What a batch takes from the next epoch is read there a second time: count it.",
            ),
            Mistake(
                "nothing kept",
                switched(kept=""),
                "Your resumed sampler begins from the first window.",
            ),
            Mistake(
                "one too far",
                switched(late=1),
                "Your resumed sampler begins one window too late.",
            ),
        ),
    ),
    Measure(
        "data.leaked",
        points=2,
        reference=LEAKED,
        rtol=1e-6,
        note="Two stand there as they are; the others in capitals, without commas, or with other "
        "line ends.",
        mistakes=(
            Mistake(
                "as they stand",
                2,
                "Two passages stand in the text letter by letter. The others are not written the "
                "same way: compare words, without case and punctuation.",
            ),
            Mistake(
                "all that share a word",
                12,
                "All scenes share single words with any English text: ask for 13 words in a row.",
            ),
        ),
    ),
    Choose(
        "data.symptom",
        points=1,
        right="b",
        because="A low loss on its own stream and a high one elsewhere: the stream repeats itself.",
        wrong={
            "a": "Too low a rate makes both losses worse; B's training loss is better.",
            "c": "A leak makes the held-out loss look better; B's is worse.",
            "d": "Both are measured in bits per byte, which no tokenizer changes.",
        },
    ),
)
