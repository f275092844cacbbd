"""Bits per byte: exact where it can be, paired where it is compared, and hard to fool."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.corpus import Play, Scene, load_shakespeare
from minilm.errors import ConfigError, DataError
from minilm.measure import (
    ByteTokenizer,
    Score,
    Tokenizer,
    bits_per_byte,
    compare,
    score,
    token_pieces,
    windowed_log_probs,
)
from minilm.ngram import NGramModel, count_ngrams, kneser_ney

TEST = load_shakespeare("test")


class Fake:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(
        self, tokenizer: Tokenizer | None = None, max_seq_len: int | None = None, value=-1.0
    ):
        self.tokenizer = tokenizer or ByteTokenizer()
        self.max_seq_len = max_seq_len
        self.value = value
        self.calls: list[np.ndarray] = []

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(ids)
        return np.full(ids.shape, self.value)


class HowMuchContext(Fake):
    """Each id costs as many nats as it has ids before it in its row."""

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(ids)
        return np.broadcast_to(-np.arange(ids.shape[1], dtype=float), ids.shape)


class Windowed:
    """An n-gram model that takes short rows only, as a Transformer does."""

    def __init__(self, model: NGramModel, max_seq_len: int):
        self.tokenizer, self.model, self.max_seq_len = model.tokenizer, model, max_seq_len

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        assert ids.shape[1] <= self.max_seq_len
        return self.model.log_probs(ids)


class Words:
    """A tokenizer of uneven width: one id per word with its space, single bytes are words too."""

    def __init__(self, text: str):
        self.words = sorted({piece for line in [text] for piece in self.split(line)})
        self.vocab_size = len(self.words)
        self.ids = {word: index for index, word in enumerate(self.words)}

    @staticmethod
    def split(text: str) -> list[str]:
        pieces = text.split(" ")
        return [piece + " " for piece in pieces[:-1]] + [pieces[-1]] * bool(pieces[-1])

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for piece in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return self.words[token].encode()


class LowerCase(ByteTokenizer):
    """Loses capitals, keeps the length."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.lower())


class DropsAccents(ByteTokenizer):
    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii", errors="ignore"))


def a_play(*scenes: str, slug: str = "a-play") -> Play:
    ends = np.cumsum([len(scene.encode()) for scene in scenes]).tolist()
    cuts = zip([0, *ends], ends, strict=False)
    return Play(
        slug,
        "A Play",
        "comedy",
        "test",
        "".join(scenes),
        tuple(Scene("I", "", a, b) for a, b in cuts),
    )


# The window


@pytest.mark.parametrize("max_seq_len", [16, 33, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_a_window_changes_nothing_for_a_model_of_short_memory(max_seq_len, batch_size):
    model = kneser_ney(count_ngrams([TEST[0].data[:20000]], 5))
    play = a_play(TEST[1].text[:1500], TEST[1].text[1500:3000])
    exact = score(model, [play])
    got = score(Windowed(model, max_seq_len), [play], batch_size)
    np.testing.assert_allclose(got.bits[0], exact.bits[0], rtol=1e-12)


def test_a_window_shorter_than_the_memory_costs_something():
    model = kneser_ney(count_ngrams([TEST[0].data], 8))
    play = a_play(TEST[1].text[:3000])
    assert bits_per_byte(Windowed(model, 4), [play]) > bits_per_byte(model, [play]) + 0.1


@settings(deadline=None, max_examples=200)
@given(length=st.integers(1, 200), size=st.integers(2, 60), batch_size=st.integers(1, 5))
def test_every_id_counts_once_with_at_least_half_a_window_before_it(length, size, batch_size):
    model = HowMuchContext(max_seq_len=size)
    ids = np.arange(length) % 256
    context = -windowed_log_probs(model, ids, batch_size)
    assert np.isfinite(context).all()
    begun = min(length, size)
    np.testing.assert_array_equal(
        context[:begun][: size - size // 2], np.arange(begun)[: size - size // 2]
    )
    assert (context[size - size // 2 :] >= size - size // 2).all()
    assert (context < size).all()
    assert all(rows.shape[0] <= batch_size and rows.shape[1] <= size for rows in model.calls)
    windows = sum(rows.shape[0] for rows in model.calls)
    assert windows == 1 + math.ceil(max(0, length - size) / (size // 2))


def test_an_unbounded_model_sees_the_whole_play_in_one_row():
    model = Fake()
    score(model, TEST[:2])
    assert [call.shape for call in model.calls] == [(1, len(play.data)) for play in TEST[:2]]


def test_a_window_of_one_is_refused():
    with pytest.raises(ConfigError, match="max_seq_len=1"):
        score(Fake(max_seq_len=1), [a_play("abc")])


# The measure


def test_a_play_costs_the_ratio_of_sums():
    bits, n_bytes = (
        (np.array([10.0, 2.0]), np.array([30.0])),
        (np.array([5.0, 5.0]), np.array([40.0])),
    )
    assert Score(("a", "b"), bits, n_bytes).bits_per_byte == (10 + 2 + 30) / (5 + 5 + 40)


def test_bytes_fall_on_their_own_scenes():
    for play in TEST:
        result = score(Fake(), [play])
        np.testing.assert_array_equal(result.n_bytes[0], [s.end - s.start for s in play.scenes])
        np.testing.assert_allclose(result.bits[0], result.n_bytes[0] / math.log(2))


def test_a_tokens_price_falls_on_the_scene_in_which_it_begins():
    play = a_play("one two th", "ree four")
    tokenizer = Words(play.text)
    result = score(Fake(tokenizer, value=-math.log(2)), [play])
    np.testing.assert_allclose(result.bits[0], [3, 1])  # "one " "two " "three " | "four"
    np.testing.assert_array_equal(result.n_bytes[0], [14, 4])
    assert result.bits_per_byte == pytest.approx(4 / 18)


def test_the_tokenizer_does_not_change_the_measure_of_one_distribution():
    """A model of words that charges a word what the byte model charges for its bytes."""
    byte_model = kneser_ney(count_ngrams([TEST[0].data], 3))
    play = TEST[1]
    words = Words(play.text)
    byte_log_probs = byte_model.log_probs(np.frombuffer(play.data, np.uint8).astype(int)[None])[0]
    widths = [len(words.token_bytes(token)) for token in words.encode(play.text)]
    ends = np.cumsum(widths)

    class WordModel(Fake):
        def log_probs(self, ids: np.ndarray) -> np.ndarray:
            return np.add.reduceat(byte_log_probs, ends - widths)[None]

    assert bits_per_byte(WordModel(words), [play]) == pytest.approx(
        bits_per_byte(byte_model, [play])
    )


def test_bits_per_byte_is_that_of_the_score():
    model = kneser_ney(count_ngrams([TEST[0].data], 2))
    assert bits_per_byte(model, TEST) == score(model, TEST).bits_per_byte


@pytest.mark.parametrize("tokenizer", [LowerCase(), DropsAccents()])
def test_a_tokenizer_that_loses_bytes_is_refused(tokenizer):
    with pytest.raises(DataError, match="needs a tokenizer that loses nothing"):
        score(Fake(tokenizer), [a_play("Né à Rome")])


def test_pieces_are_the_bytes_of_the_text():
    play = a_play("né à Rome")
    tokenizer = ByteTokenizer()
    pieces = token_pieces(tokenizer, tokenizer.encode(play.text), play)
    assert b"".join(pieces) == play.data and set(map(len, pieces)) == {1}
    assert tokenizer.decode(tokenizer.encode(play.text)) == play.text
    assert tokenizer.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("value", [math.nan, 0.1])
def test_a_number_that_is_no_log_probability_is_refused(value):
    with pytest.raises(DataError, match=f"a-play: log-probability {value} at token 0"):
        score(Fake(value=value), [a_play("abc")])


def test_impossible_text_costs_infinitely_much():
    assert bits_per_byte(Fake(value=-math.inf), [a_play("abc")]) == math.inf


def test_nothing_to_score_is_refused():
    with pytest.raises(ConfigError, match="no plays to score"):
        score(Fake(), [])
    with pytest.raises(ConfigError, match="batch_size=0"):
        score(Fake(), [a_play("abc")], batch_size=0)


# The interval


def a_score(shift: float = 0.0, seed: int = 0) -> Score:
    rng = np.random.default_rng(seed)
    n_bytes = [rng.integers(1000, 9000, scenes).astype(float) for scenes in (9, 28, 25)]
    rates = [2.2 + 0.1 * rng.standard_normal(len(n)) + shift for n in n_bytes]
    bits = tuple(n * rate for n, rate in zip(n_bytes, rates, strict=True))
    return Score(("a", "b", "c"), bits, tuple(n_bytes))


def test_the_interval_holds_the_figure_and_repeats():
    result = a_score()
    low, high = result.interval()
    assert low < result.bits_per_byte < high
    assert (low, high) == result.interval(seed=0) != result.interval(seed=1)
    narrow = result.interval(level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_pairs_are_drawn_alike():
    """The same draws for both: a constant shift comes out exactly, whatever the spread."""
    better, worse = a_score(), a_score(shift=0.01)
    difference = compare(worse, better)
    assert difference.mean == pytest.approx(0.01)
    assert difference.low == pytest.approx(0.01) and difference.high == pytest.approx(0.01)
    assert difference.clear
    low, high = better.interval()
    assert high - low > 0.02  # unpaired, the two intervals overlap
    assert not compare(better, better).clear


def test_plays_are_drawn_again_then_scenes():
    """One play with one scene: the draws are whole plays, 0 to 3 times each."""
    result = Score(
        ("a", "b", "c"),
        (np.array([1.0]), np.array([2.0]), np.array([6.0])),
        (np.array([1.0]), np.array([1.0]), np.array([1.0])),
    )
    possible = {(i * 1 + j * 2 + (3 - i - j) * 6) / 3 for i in range(4) for j in range(4 - i)}
    drawn = set(result.resampled(5000).tolist())
    assert drawn == possible


def test_the_spread_is_that_of_the_bootstrap_by_hand():
    result = a_score(seed=3)
    rng = np.random.default_rng(7)
    by_hand = []
    for _ in range(3000):
        bits = n_bytes = 0.0
        for play in rng.integers(0, 3, 3):
            scenes = rng.integers(0, len(result.bits[play]), len(result.bits[play]))
            bits += result.bits[play][scenes].sum()
            n_bytes += result.n_bytes[play][scenes].sum()
        by_hand.append(bits / n_bytes)
    want = np.quantile(by_hand, [0.025, 0.975])
    np.testing.assert_allclose(result.interval(samples=3000), want, atol=0.005)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="samples=0"):
        a_score().resampled(samples=0)
    with pytest.raises(ConfigError, match=r"level=1\.5"):
        a_score().interval(level=1.5)
    other = Score(("d",), (np.array([1.0]),), (np.array([1.0]),))
    with pytest.raises(ConfigError, match="scores of different plays"):
        compare(a_score(), other)
