"""Count what follows what: n-gram models over bytes, up to order 8 (chapter 01).

An n-gram of bytes fits into one 64-bit integer, so counting is sorting (`pack_ngrams`,
`count_ngrams`). Every smoothing method here is one sentence: *each n-gram that was seen gives up
a part of its count, and its context passes that part on to the shorter context*. `Level` holds what
is kept and what is passed on, `NGramModel` adds the levels up, and the methods (`add_k`,
`jelinek_mercer`, `kneser_ney`) differ only in how much they take.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Int, Integer, UInt64

from minilm.errors import ConfigError, DataError
from minilm.files import write_atomically
from minilm.measure import ByteTokenizer, Tokenizer

__all__ = [
    "Level",
    "NGramCounts",
    "NGramModel",
    "add_k",
    "count_ngrams",
    "estimate_discounts",
    "jelinek_mercer",
    "kneser_ney",
    "maximum_likelihood",
    "pack_ngrams",
    "sample",
]

MAX_ORDER = 8  # bytes in a 64-bit integer
N_BYTES = 256
BEGIN = ord("\n")  # what stands before a text: as many newlines as a context needs


def pack_ngrams(
    ids: Integer[np.ndarray, "*batch seq"], order: int
) -> UInt64[np.ndarray, "*batch seq"]:
    """The n-gram that ends at each byte, as one integer with the oldest byte most significant.

    So `gram >> 8` is its context, `gram & 0xff` its last byte, and in ascending order the n-grams
    of one context stand side by side. Before a row stand `order - 1` newlines: a begin token
    spelled in bytes. Three newlines in a row occur nowhere inside a play.

    Args:
        ids: Bytes as integers from 0 to 255; each row is a text of its own.
        order: Bytes in an n-gram, from 1 to 8.

    Raises:
        ConfigError: If `order` is not from 1 to 8.
        DataError: If `ids` are not integers from 0 to 255.

    Example:
        >>> [hex(gram) for gram in pack_ngrams(np.array([0x61, 0x62, 0x63]), order=2)]
        ['0xa61', '0x6162', '0x6263']
    """
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"order={order}; use 1 to {MAX_ORDER}, the bytes of a 64-bit integer")
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.ndim == 0:
        raise DataError(
            f"ids of dtype {ids.dtype} and shape {ids.shape}; wanted integers in [..., seq]"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= N_BYTES):
        raise DataError(f"ids from {ids.min()} to {ids.max()}; wanted bytes, 0 to {N_BYTES - 1}")
    begin = np.full((*ids.shape[:-1], order - 1), BEGIN)
    padded = np.concatenate([begin, ids], axis=-1).astype(np.uint64)
    grams: UInt64[np.ndarray, "*batch seq"] = np.zeros(ids.shape, dtype=np.uint64)
    for place in range(order):
        grams = (grams << 8) | padded[..., place : place + ids.shape[-1]]
    return grams


def last_bytes(grams: UInt64[np.ndarray, " n"], order: int) -> UInt64[np.ndarray, " n"]:
    """Shorten packed n-grams to their `order` newest bytes."""
    return grams & np.uint64((1 << 8 * order) - 1)


def run_starts(ascending: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " runs"]:
    """Where each run of equal values begins.

    Example:
        >>> run_starts(np.array([3, 3, 3, 5, 9, 9], dtype=np.uint64))
        array([0, 3, 4])
    """
    return np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))


@dataclass(frozen=True, eq=False)
class NGramCounts:
    """The distinct n-grams of a text and how often each occurs.

    Attributes:
        order: Bytes in an n-gram.
        grams: Packed n-grams, ascending.
        counts: How often each occurs; at least 1.
    """

    order: int
    grams: UInt64[np.ndarray, " entries"]
    counts: Int[np.ndarray, " entries"]

    def __len__(self) -> int:
        return len(self.grams)

    def totals(self) -> Int[np.ndarray, " entries"]:
        """For each n-gram, how often its context occurs: the sum of the counts that share it."""
        starts = run_starts(self.grams >> 8)
        return np.repeat(np.add.reduceat(self.counts, starts), np.diff(starts, append=len(self)))

    def shorten(self, distinct: bool = False) -> "NGramCounts":
        """Count (n-1)-grams: the newest bytes of these n-grams.

        Args:
            distinct: False: how often each occurs. True: how many different bytes stand before it,
                the *continuation count* of Kneser-Ney.

        Raises:
            ConfigError: If the order is 1 already.
        """
        if self.order == 1:
            raise ConfigError("order=1 cannot be shortened; count with a higher order")
        shorter = last_bytes(self.grams, self.order - 1)
        if distinct:
            shorter.sort()
            starts = run_starts(shorter)
            counts = np.diff(starts, append=len(shorter))
        else:
            place = np.argsort(shorter)
            shorter = shorter[place]
            starts = run_starts(shorter)
            counts = np.add.reduceat(self.counts[place], starts)
        return NGramCounts(self.order - 1, shorter[starts], counts)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write a compressed .npz without pickle; nothing is left half written.

        The ascending n-grams are stored as gaps, which compress well.

        Returns:
            The size of the file in bytes.
        """
        target = Path(path)
        smallest = np.min_scalar_type(int(self.counts.max()))
        with write_atomically(target) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                order=np.array(self.order),
                gaps=np.diff(self.grams, prepend=np.uint64(0)),
                counts=self.counts.astype(smallest),
            )
        return target.stat().st_size

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NGramCounts":
        """Read what `save` wrote.

        Raises:
            DataError: If the file is missing, damaged, or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                order, gaps, counts = (arrays[name] for name in ("order", "gaps", "counts"))
            if len(gaps) != len(counts) or not 1 <= order <= MAX_ORDER:
                raise ValueError(f"{len(gaps)} n-grams, {len(counts)} counts, order {order}")
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(
                f"{path} does not hold n-gram counts ({error}); write it with NGramCounts.save"
            ) from error
        return cls(int(order), np.cumsum(gaps, dtype=np.uint64), counts.astype(np.int64))


def count_ngrams(texts: Iterable[bytes], order: int) -> NGramCounts:
    """Count the n-grams of some texts, each with its own begin.

    Sorting brings equal n-grams together; then a count is the length of a run.

    Args:
        texts: One or more texts, such as `play.data` of each play.
        order: Bytes in an n-gram, from 1 to 8.

    Raises:
        ConfigError: If `order` is not from 1 to 8.
        DataError: If there is no byte to count.

    Example:
        >>> bigrams = count_ngrams([b"banana"], order=2)
        >>> [hex(gram) for gram in bigrams.grams], bigrams.counts
        (['0xa62', '0x616e', '0x6261', '0x6e61'], array([1, 2, 1, 2]))
    """
    rows = [pack_ngrams(np.frombuffer(text, dtype=np.uint8), order) for text in texts]
    grams = np.concatenate(rows) if rows else np.zeros(0, dtype=np.uint64)
    if not len(grams):
        raise DataError("no text to count; pass [play.data for play in load_shakespeare('train')]")
    grams.sort()
    starts = run_starts(grams)
    return NGramCounts(order, grams[starts], np.diff(starts, append=len(grams)))


def look_up(
    queries: UInt64[np.ndarray, " n"],
    keys: UInt64[np.ndarray, " entries"],
    values: Float[np.ndarray, " entries"],
    missing: float,
) -> Float[np.ndarray, " n"]:
    """The value of each query in a table with ascending keys, or `missing`."""
    place = np.searchsorted(keys, queries)
    place[place == len(keys)] = 0
    return np.where(keys[place] == queries, values[place], missing)


@dataclass(frozen=True, eq=False)
class Level:
    """One order of a smoothed model, as two tables.

    For a byte after a context, p = kept(context byte) + passed(context) x p of the order below.
    An n-gram that is not in `grams` keeps 0; a context that is not in `contexts` passes on 1.

    Attributes:
        order: Bytes in an n-gram.
        grams: Packed n-grams, ascending.
        kept: The share of its context that each n-gram keeps.
        contexts: Packed contexts, ascending.
        passed: The share that each context passes on to the order below.
    """

    order: int
    grams: UInt64[np.ndarray, " entries"]
    kept: Float[np.ndarray, " entries"]
    contexts: UInt64[np.ndarray, " contexts"]
    passed: Float[np.ndarray, " contexts"]

    @classmethod
    def from_counts(cls, counts: NGramCounts, taken: Float[np.ndarray, " entries"]) -> "Level":
        """Take a part of every count; each context passes on what its n-grams gave up.

        Args:
            counts: N-grams and how often they occur.
            taken: What each n-gram gives up, from 0 to its count.

        Raises:
            ConfigError: If more is taken than is there, or less than nothing.
        """
        if np.any(taken < 0) or np.any(taken > counts.counts):
            raise ConfigError(
                f"taken from {taken.min()} to {taken.max()}; take from 0 to the whole count"
            )
        contexts, totals = counts.grams >> 8, counts.totals()
        starts = run_starts(contexts)
        kept = (counts.counts - taken) / totals
        passed = np.add.reduceat(taken, starts) / totals[starts]
        return cls(counts.order, counts.grams, kept, contexts[starts], passed)

    def mix(
        self, grams: UInt64[np.ndarray, " n"], below: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Probability of each n-gram's last byte after its context.

        Args:
            grams: Packed n-grams of this order or longer.
            below: The same bytes' probabilities at the order below.
        """
        grams = last_bytes(grams, self.order)
        place = np.argsort(grams)  # ascending queries walk through the tables, no cache misses
        ascending = grams[place]
        result = np.empty(len(grams))
        result[place] = look_up(ascending, self.grams, self.kept, missing=0.0)
        result[place] += below[place] * look_up(
            ascending >> 8, self.contexts, self.passed, missing=1.0
        )
        return result


class NGramModel:
    """A smoothed n-gram model over bytes: levels added up from the shortest context to the longest.

    Without a level it is the uniform guess, 8 bits per byte.

    Args:
        levels: Orders 1 to n, or any ascending part of them.
        base: What stands below the first level: the probability of a byte about which nothing is
            known. 0: nothing, as in nltk, where a byte that was never seen is impossible.

    Raises:
        ConfigError: If the orders do not ascend.
    """

    max_seq_len: int | None = None  # rows of any length

    def __init__(self, levels: Sequence[Level] = (), base: float = 1 / N_BYTES) -> None:
        orders = [level.order for level in levels]
        if orders != sorted(set(orders)):
            raise ConfigError(f"levels of orders {orders}; pass them ascending, one each")
        self.tokenizer: Tokenizer = ByteTokenizer()
        self.levels = tuple(levels)
        self.base = base
        self.order = orders[-1] if orders else 1

    @property
    def n_entries(self) -> int:
        """The n-grams of all orders that the tables hold."""
        return sum(len(level.grams) for level in self.levels)

    @property
    def n_bytes(self) -> int:
        """The memory of the tables: 16 bytes an n-gram and 16 bytes a context."""
        return sum(
            table.nbytes
            for level in self.levels
            for table in (level.grams, level.kept, level.contexts, level.passed)
        )

    def probs(self, grams: UInt64[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        """Probability of the last byte of each packed n-gram after the bytes before it."""
        flat = grams.ravel()
        result = np.full(flat.shape, self.base)
        for level in self.levels:
            result = level.mix(flat, result)
        return result.reshape(grams.shape)

    def log_probs(self, ids: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq"]:
        """Natural log of the probability of each byte given the bytes before it in its row.

        Raises:
            DataError: If `ids` are not bytes in [batch, seq].
        """
        return _log(self.probs(pack_ngrams(_rows(ids), self.order)))

    def next_log_probs(self, ids: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch byte"]:
        """Natural log of the probability of every byte that may follow each row.

        Args:
            ids: Bytes so far; `seq` may be 0, for the first byte of a text.

        Raises:
            DataError: If `ids` are not bytes in [batch, seq].
        """
        rows = np.pad(
            _rows(ids)[:, -self.order :], ((0, 0), (0, 1))
        )  # a zero byte in the next place
        zero = pack_ngrams(rows, self.order)[:, -1:]
        return _log(self.probs(zero + np.arange(N_BYTES, dtype=np.uint64)))


def _rows(ids: Integer[np.ndarray, "..."]) -> Int[np.ndarray, "batch seq"]:
    ids = np.asarray(ids)
    if ids.ndim != 2:
        raise DataError(f"ids of shape {ids.shape}; wanted [batch, seq], one text a row")
    return ids


def _log(probs: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    with np.errstate(divide="ignore"):  # without smoothing a probability may be 0
        return np.asarray(np.log(np.minimum(probs, 1.0)))  # a sum may round to 1 + 1e-16


def maximum_likelihood(counts: NGramCounts) -> NGramModel:
    """Probability = relative frequency. What was never seen is impossible."""
    return NGramModel([Level.from_counts(counts, np.zeros(len(counts)))], base=0.0)


def add_k(counts: NGramCounts, k: float) -> NGramModel:
    """Pretend that every byte was seen `k` times more after every context.

    (count + k) / (total + 256 k) is a tax too: each n-gram gives up the fraction
    256 k / (total + 256 k) of its count, and the context spreads it evenly over all bytes.

    Args:
        counts: N-grams and how often they occur.
        k: What is added to each count; 1 is Laplace's rule.

    Raises:
        ConfigError: If `k` is not positive.

    Source:
        Lidstone 1920; Jurafsky & Martin, Speech and Language Processing, chapter 3.
    """
    if not k > 0:
        raise ConfigError(f"k={k}; add something above 0, such as 1 or 0.01")
    rate = N_BYTES * k / (counts.totals() + N_BYTES * k)
    return NGramModel([Level.from_counts(counts, rate * counts.counts)])


def jelinek_mercer(counts: NGramCounts, keep: float) -> NGramModel:
    """At every order keep the same fraction of relative frequency; the rest goes one order down.

    Args:
        counts: N-grams of the highest order; the shorter ones follow from them.
        keep: The fraction, between 0 and 1.

    Raises:
        ConfigError: If `keep` is not between 0 and 1.

    Source:
        Jelinek & Mercer 1980; Chen & Goodman 1998, section 2.3.
    """
    if not 0 < keep < 1:
        raise ConfigError(f"keep={keep}; keep a fraction between 0 and 1, such as 0.7")
    levels = [Level.from_counts(counts, (1 - keep) * counts.counts)]
    while counts.order > 1:
        counts = counts.shorten()
        levels.append(Level.from_counts(counts, (1 - keep) * counts.counts))
    return NGramModel(levels[::-1])


def estimate_discounts(counts: NGramCounts) -> Float[np.ndarray, " 4"]:
    """How much a count of 0, 1, 2, and 3 or more promises too much, from the counts themselves.

    With n1 to n4 the number of n-grams seen once to four times and Y = n1 / (n1 + 2 n2), an n-gram
    seen r times is discounted by r - (r + 1) Y n(r+1) / n(r). Where a table is too small for that
    (some n is 0) half a count is taken. A discount is held between 0.1 and r.

    Source:
        Chen & Goodman 1998, modified Kneser-Ney, https://dash.harvard.edu/handle/1/25104739
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts.counts, 5), minlength=6)[1:5].tolist()
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.append(0.0, np.clip(discounts, 0.1, [1.0, 2.0, 3.0]))


def kneser_ney(
    counts: NGramCounts, discount: float | None = None, uniform_base: bool = True
) -> NGramModel:
    """Interpolated Kneser-Ney: discounted counts, and distinct predecessors at the shorter orders.

    The highest order counts how often an n-gram occurs. A shorter one is only asked when the
    longer context failed, so it counts in how many *different* contexts it was seen.

    Args:
        counts: N-grams of the highest order; the shorter ones follow from them.
        discount: One discount for all orders. None: `estimate_discounts` at each order, with
            three discounts each (modified Kneser-Ney).
        uniform_base: Whether the lowest order passes its discount on to a uniform guess. Without
            it, as in nltk, single bytes are not discounted and unseen ones are impossible.

    Raises:
        ConfigError: If `discount` is not between 0 and 1.

    Source:
        Kneser & Ney 1995; Chen & Goodman 1998, https://dash.harvard.edu/handle/1/25104739
    """
    if discount is not None and not 0 < discount < 1:
        raise ConfigError(f"discount={discount}; take a part of one count, between 0 and 1")
    levels = []
    while True:
        by_count = estimate_discounts(counts) if discount is None else np.array([0, discount])
        if counts.order == 1 and not uniform_base:
            by_count = np.zeros(1)
        levels.append(
            Level.from_counts(counts, by_count[np.minimum(counts.counts, len(by_count) - 1)])
        )
        if counts.order == 1:
            return NGramModel(levels[::-1], base=1 / N_BYTES if uniform_base else 0.0)
        counts = counts.shorten(distinct=True)


def sample(
    model: NGramModel, prompt: str, n_bytes: int, temperature: float = 1.0, seed: int = 0
) -> str:
    """Continue a prompt byte by byte, each drawn from the model's distribution.

    Args:
        model: What predicts the next byte.
        prompt: The text so far; may be empty.
        n_bytes: How many bytes to add.
        temperature: Below 1 prefers the probable, above 1 evens out; 0 always takes the most
            probable byte.
        seed: Equal seeds give equal texts.

    Returns:
        The continuation, without the prompt. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        ConfigError: If `temperature` or `n_bytes` is negative, or the model finds every next byte
            impossible.
    """
    if n_bytes < 0 or temperature < 0:
        raise ConfigError(f"n_bytes={n_bytes}, temperature={temperature}; neither may be below 0")
    rng = np.random.default_rng(seed)
    ids = model.tokenizer.encode(prompt)
    n_prompt = len(ids)
    for _ in range(n_bytes):
        recent = np.array(ids[-model.order :], dtype=np.int64)
        log_probs = model.next_log_probs(recent[None])[0]
        if not np.isfinite(log_probs).any():
            raise ConfigError("every next byte has probability 0; sample from a smoothed model")
        if temperature == 0:
            ids.append(int(log_probs.argmax()))
            continue
        weights = np.exp((log_probs - log_probs.max()) / temperature)
        ids.append(int(rng.choice(N_BYTES, p=weights / weights.sum())))
    return model.tokenizer.decode(ids[n_prompt:])
