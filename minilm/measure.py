"""The one measure of the book: bits per byte, with its interval (chapter 01).

Everything that predicts text implements `LanguageModel`; `score` turns any of them into bits
per byte on whole plays, whatever tokenizer it uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from minilm.corpus import Play
from minilm.errors import ConfigError, DataError

__all__ = [
    "ByteTokenizer",
    "Difference",
    "LanguageModel",
    "Score",
    "Tokenizer",
    "bits_per_byte",
    "compare",
    "score",
]


@runtime_checkable
class Tokenizer(Protocol):
    """What turns text into ids and back. Every id stands for a fixed string of bytes."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Turn text into ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for."""


class ByteTokenizer:
    """The tokenizer without a choice to make: one id per UTF-8 byte.

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
    """

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Turn text into its UTF-8 bytes, as integers."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn bytes into text; what is not UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """One byte."""
        return bytes([token])


@runtime_checkable
class LanguageModel(Protocol):
    """What every model of the book can do: say how probable each token of a text was."""

    tokenizer: Tokenizer
    max_seq_len: int | None  # the longest row that `log_probs` takes; None: any length

    def log_probs(self, ids: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq"]:
        """Natural log of the probability of each id, given the ids before it in its row.

        The first id of a row is conditioned on the begin of the text alone.
        """


def central_interval(values: Float[np.ndarray, " samples"], level: float) -> tuple[float, float]:
    """The interval that holds the central `level` of some values.

    Raises:
        ConfigError: If `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level={level}; use a fraction between 0 and 1, such as 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Score:
    """What a model paid for each scene of each play.

    Attributes:
        plays: The slugs, in order.
        bits: For each play, the bits spent on each of its scenes.
        n_bytes: For each play, the UTF-8 bytes of each of its scenes.
    """

    plays: tuple[str, ...]
    bits: tuple[Float[np.ndarray, "_"], ...]
    n_bytes: tuple[Float[np.ndarray, "_"], ...]

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes: the ratio of sums, not the mean of ratios."""
        return float(sum(b.sum() for b in self.bits) / sum(n.sum() for n in self.n_bytes))

    def resampled(self, samples: int = 2000, seed: int = 0) -> Float[np.ndarray, " samples"]:
        """Bits per byte of texts that might have been: plays drawn again, then their scenes.

        Equal `seed` and equal plays give equal draws, so two scores are compared on the same texts.

        Raises:
            ConfigError: If `samples` is not positive.
        """
        if samples < 1:
            raise ConfigError(f"samples={samples}; draw at least one")
        rng = np.random.default_rng(seed)
        n_plays = len(self.plays)
        times = rng.multinomial(n_plays, np.full(n_plays, 1 / n_plays), size=samples)
        total_bits, total_bytes = np.zeros(samples), np.zeros(samples)
        for play, (bits, n_bytes) in enumerate(zip(self.bits, self.n_bytes, strict=True)):
            uniform = np.full(len(bits), 1 / len(bits))
            draws = rng.multinomial(times[:, play] * len(bits), uniform)  # (samples, scenes)
            total_bits += draws @ bits
            total_bytes += draws @ n_bytes
        return total_bits / total_bytes

    def interval(
        self, samples: int = 2000, seed: int = 0, level: float = 0.95
    ) -> tuple[float, float]:
        """The central `level` of `resampled`."""
        return central_interval(self.resampled(samples, seed), level)


@dataclass(frozen=True)
class Difference:
    """How many bits per byte more the first model needs than the second, with its interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def windowed_log_probs(
    model: LanguageModel, ids: Int[np.ndarray, " seq"], batch_size: int
) -> Float[np.ndarray, " seq"]:
    """Log-probability of every id of one text, by windows that overlap by half.

    The first window counts whole. Each later one moves on by half its length, and only its new
    half counts, so that every id has at least half a window before it.

    Raises:
        ConfigError: If the model's window is shorter than 2.
    """
    size = model.max_seq_len
    if size is None or len(ids) <= size:
        return np.asarray(model.log_probs(ids[None])[0], dtype=np.float64)
    if size < 2:
        raise ConfigError(f"max_seq_len={size}; a sliding window needs at least 2")
    stride = size // 2
    starts = [*range(0, len(ids) - size, stride), len(ids) - size]  # the last one ends the text
    result = np.full(len(ids), np.nan)
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        rows = model.log_probs(np.stack([ids[start : start + size] for start in group]))
        for start, row in zip(group, rows, strict=True):
            known = 0 if start == 0 else size - stride  # ids that an earlier window has counted
            result[start + known : start + size] = row[known:]
    return result


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int], play: Play) -> list[bytes]:
    """The bytes of each token of a play.

    Raises:
        DataError: If the pieces do not join to the play's text.
    """
    bytes_of = {token: tokenizer.token_bytes(token) for token in set(ids)}
    pieces = [bytes_of[token] for token in ids]
    if b"".join(pieces) != play.data:
        raise DataError(
            f"{play.slug}: the tokens stand for {sum(map(len, pieces))} bytes that are not the "
            f"text's {len(play.data)}; bits per byte needs a tokenizer that loses nothing"
        )
    return pieces


def score(model: LanguageModel, plays: Sequence[Play], batch_size: int = 16) -> Score:
    """Measure a model on whole plays.

    A model with a bounded context sees the play through `windowed_log_probs`. A token belongs to
    the scene in which it begins.

    Args:
        model: Any `LanguageModel`.
        plays: Plays to measure, each from its beginning.
        batch_size: Windows in one call of `log_probs`.

    Raises:
        ConfigError: If there are no plays, or `batch_size` is below 1.
        DataError: If the tokens' bytes are not the play's, or a log-probability is NaN or > 0.
    """
    if not plays:
        raise ConfigError("no plays to score; pass load_shakespeare('validation') or ('test')")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; use at least 1 window a call")
    bits, n_bytes = [], []
    for play in plays:
        ids = model.tokenizer.encode(play.text)
        widths = np.array([len(piece) for piece in token_pieces(model.tokenizer, ids, play)])
        log_probs = windowed_log_probs(model, np.array(ids), batch_size)
        if not np.all(log_probs <= 1e-6):  # NaN fails the comparison too
            worst = int(np.flatnonzero(~(log_probs <= 1e-6))[0])
            raise DataError(
                f"{play.slug}: log-probability {log_probs[worst]} at token {worst}; "
                "wanted a number that is not above 0"
            )
        scene_ends = np.array([scene.end for scene in play.scenes])
        scene = np.searchsorted(scene_ends, np.cumsum(widths) - widths, side="right")
        bits.append(np.bincount(scene, -log_probs / math.log(2), minlength=len(scene_ends)))
        n_bytes.append(np.bincount(scene, widths, minlength=len(scene_ends)))
    return Score(tuple(play.slug for play in plays), tuple(bits), tuple(n_bytes))


def bits_per_byte(model: LanguageModel, plays: Sequence[Play]) -> float:
    """Bits per byte of a model on whole plays: `score(model, plays).bits_per_byte`."""
    return score(model, plays).bits_per_byte


def compare(a: Score, b: Score, samples: int = 2000, seed: int = 0) -> Difference:
    """Paired bootstrap: how many more bits per byte `a` needs than `b` on the same scenes.

    Raises:
        ConfigError: If the two scores are not of the same plays.
    """
    if a.plays != b.plays:
        raise ConfigError(f"scores of different plays: {a.plays} and {b.plays}; score both alike")
    low, high = central_interval(a.resampled(samples, seed) - b.resampled(samples, seed), 0.95)
    return Difference(a.bits_per_byte - b.bits_per_byte, low, high)
