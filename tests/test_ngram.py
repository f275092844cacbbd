"""N-gram models: nltk first, then what must hold for any text, then wrong input."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.lm import MLE, KneserNeyInterpolated, Lidstone

from minilm.corpus import load_shakespeare
from minilm.errors import ConfigError, DataError
from minilm.measure import LanguageModel, bits_per_byte, score
from minilm.ngram import (
    BEGIN,
    Level,
    NGramCounts,
    NGramModel,
    add_k,
    count_ngrams,
    estimate_discounts,
    jelinek_mercer,
    kneser_ney,
    maximum_likelihood,
    pack_ngrams,
    sample,
)

MACBETH = load_shakespeare("test")[1].data
TEXT, OTHER = MACBETH[:3000], MACBETH[-3000:]
METHODS = {
    "maximum likelihood": maximum_likelihood,
    "add-k": lambda counts: add_k(counts, 0.1),
    "Jelinek-Mercer": lambda counts: jelinek_mercer(counts, 0.7),
    "Kneser-Ney": kneser_ney,
    "Kneser-Ney, fixed": lambda counts: kneser_ney(counts, discount=0.75),
    "Kneser-Ney, no base": lambda counts: kneser_ney(counts, discount=0.75, uniform_base=False),
}
SMOOTH = [name for name in METHODS if name not in ("maximum likelihood", "Kneser-Ney, no base")]

texts = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4)
few_letters = st.lists(  # so small an alphabet that n-grams do repeat
    st.text("ab\n", min_size=1, max_size=60).map(str.encode), min_size=1, max_size=3
)
orders = st.integers(1, 8)


def as_ids(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


def padded_ngrams(text: bytes, order: int) -> list[tuple[str, ...]]:
    """Every n-gram of each length up to `order` that ends at a byte of the text, for nltk.

    nltk's symbols are strings: latin-1 has one character for each byte.
    """
    full = "\n" * (order - 1) + text.decode("latin-1")
    ends = range(order, len(full) + 1)
    return [tuple(full[end - n : end]) for end in ends for n in range(1, order + 1)]


def fit_nltk(model, text: bytes):
    """Fit with a vocabulary of 256: nltk adds <UNK>, so one byte that no text has is left out."""
    model.fit([padded_ngrams(text, model.order)], vocabulary_text=map(chr, range(255)))
    assert len(model.vocab) == 256
    return model


def nltk_probs(model, text: bytes) -> np.ndarray:
    full = "\n" * (model.order - 1) + text.decode("latin-1")
    start = model.order - 1
    return np.array(
        [model.score(full[t], tuple(full[t - start : t])) for t in range(start, len(full))]
    )


# Parity


@pytest.mark.parametrize("order", [2, 3, 5])  # nltk counts a unigram by its continuations too
@pytest.mark.parametrize("discount", [0.1, 0.75])
def test_kneser_ney_is_nltks(order, discount):
    ours = kneser_ney(count_ngrams([TEXT], order), discount=discount, uniform_base=False)
    theirs = fit_nltk(KneserNeyInterpolated(order, discount), TEXT)
    for text in (TEXT[:300], OTHER[:300]):
        got = np.exp(ours.log_probs(as_ids(text)[None])[0])
        np.testing.assert_allclose(got, nltk_probs(theirs, text), rtol=1e-12, atol=0)


def test_nltk_gives_an_unseen_byte_zero_and_the_uniform_base_does_not():
    theirs = fit_nltk(KneserNeyInterpolated(3, 0.75), TEXT)
    assert theirs.score("~", ("t", "h")) == 0
    counts = count_ngrams([TEXT], 3)
    without = kneser_ney(counts, 0.75, uniform_base=False).next_log_probs(as_ids(b"th")[None])
    assert without[0, ord("~")] == -np.inf
    assert np.isfinite(kneser_ney(counts, 0.75).next_log_probs(as_ids(b"th")[None])).all()


@pytest.mark.parametrize("order", [1, 2, 4])
def test_add_k_is_nltks_lidstone(order):
    theirs = fit_nltk(Lidstone(0.3, order), TEXT)
    got = np.exp(add_k(count_ngrams([TEXT], order), 0.3).log_probs(as_ids(OTHER[:300])[None])[0])
    np.testing.assert_allclose(got, nltk_probs(theirs, OTHER[:300]), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_maximum_likelihood_is_nltks(order):
    theirs = fit_nltk(MLE(order), TEXT)
    ours = maximum_likelihood(count_ngrams([TEXT], order))
    got = np.exp(ours.log_probs(as_ids(OTHER[:300])[None])[0])
    np.testing.assert_allclose(got, nltk_probs(theirs, OTHER[:300]), rtol=1e-12)


def test_jelinek_mercer_is_its_recursion():
    rng = random.Random(0)
    counts = {n: {} for n in (1, 2, 3)}
    full = bytes([BEGIN]) * 2 + TEXT
    for end in range(3, len(full) + 1):
        for n in counts:
            gram = full[end - n : end]
            counts[n][gram] = counts[n].get(gram, 0) + 1
    totals = {n: {} for n in counts}
    for n, table in counts.items():
        for gram, count in table.items():
            totals[n][gram[:-1]] = totals[n].get(gram[:-1], 0) + count

    def probability(gram: bytes) -> float:
        if not gram:
            return 1 / 256
        below = probability(gram[1:])
        total = totals[len(gram)].get(gram[:-1])
        return below if not total else 0.6 * counts[len(gram)].get(gram, 0) / total + 0.4 * below

    model = jelinek_mercer(count_ngrams([TEXT], 3), 0.6)
    for _ in range(200):
        gram = bytes(rng.choice(TEXT) for _ in range(3))
        got = model.next_log_probs(as_ids(gram[:2])[None])[0, gram[2]]
        assert math.exp(got) == pytest.approx(probability(gram), rel=1e-12)


def test_modified_kneser_ney_by_hand():
    """In "ababac" an a is followed by b, b and c."""
    counts = count_ngrams([b"ababac"], 2)
    table = dict(zip((int(g) for g in counts.grams), counts.counts.tolist(), strict=True))
    assert table == {0x0A61: 1, 0x6162: 2, 0x6261: 2, 0x6163: 1}
    model = kneser_ney(counts, discount=0.5)
    # continuation counts: a after newline and b: 2; b after a: 1; c after a: 1
    uniform = 3 * 0.5 / 4 / 256
    p_b = (1 - 0.5) / 4 + uniform
    want = (2 - 0.5) / 3 + 2 * 0.5 / 3 * p_b
    got = model.next_log_probs(as_ids(b"a")[None])[0, ord("b")]
    assert math.exp(got) == pytest.approx(want, rel=1e-14)


def test_discounts_are_chen_and_goodmans():
    repeats = {1: 10, 2: 5, 3: 3, 4: 2, 7: 1}  # times seen: how many n-grams
    counts = np.repeat(list(repeats), list(repeats.values()))
    grams = np.arange(len(counts), dtype=np.uint64)
    y = 10 / (10 + 2 * 5)
    want = [0, 1 - 2 * y * 5 / 10, 2 - 3 * y * 3 / 5, 3 - 4 * y * 2 / 3]
    np.testing.assert_allclose(estimate_discounts(NGramCounts(1, grams, counts)), want)


def test_modified_is_better_than_one_discount_on_held_out_plays():
    counts = count_ngrams([play.data for play in load_shakespeare("train")[:8]], 6)
    held_out = load_shakespeare("validation")[:1]
    modified = bits_per_byte(kneser_ney(counts), held_out)
    assert modified < bits_per_byte(kneser_ney(counts, 0.75), held_out)
    assert modified < bits_per_byte(jelinek_mercer(counts, 0.6), held_out)


# What must hold for any text


@settings(deadline=None, max_examples=60)
@given(texts=st.one_of(texts, few_letters), order=orders, context=st.binary(max_size=10))
@pytest.mark.parametrize("name", SMOOTH)
def test_a_distribution_sums_to_one_and_nothing_is_impossible(name, texts, order, context):
    model = METHODS[name](count_ngrams(texts, order))
    log_probs = model.next_log_probs(as_ids(context)[None])
    assert log_probs.shape == (1, 256)
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-12)
    assert (log_probs > -np.inf).all()


@settings(deadline=None, max_examples=60)
@given(texts=few_letters, order=orders)
def test_without_a_base_a_seen_context_sums_to_one(texts, order):
    counts = count_ngrams(texts, order)
    for name in ("maximum likelihood", "Kneser-Ney, no base"):
        log_probs = METHODS[name](counts).next_log_probs(as_ids(texts[0][:-1])[None])
        assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(texts=few_letters, order=orders, row=st.binary(min_size=1, max_size=20))
@pytest.mark.parametrize("name", METHODS)
def test_log_probs_are_next_log_probs_gathered(name, texts, order, row):
    model = METHODS[name](count_ngrams(texts, order))
    ids = as_ids(row)[None]
    one_by_one = [model.next_log_probs(ids[:, :t])[0, row[t]] for t in range(len(row))]
    np.testing.assert_array_equal(model.log_probs(ids)[0], one_by_one)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_rows_alone(name):
    model = METHODS[name](count_ngrams([TEXT], 4))
    ids = as_ids(OTHER[:600]).reshape(3, 200)
    alone = np.concatenate([model.log_probs(row[None]) for row in ids])
    np.testing.assert_array_equal(model.log_probs(ids), alone)
    alone = np.concatenate([model.next_log_probs(row[None]) for row in ids])
    np.testing.assert_array_equal(model.next_log_probs(ids), alone)


@settings(deadline=None)
@given(texts=texts, order=orders)
def test_counts_are_a_dictionarys(texts, order):
    counted = {}
    for text in texts:
        full = bytes([BEGIN]) * (order - 1) + text
        for end in range(order, len(full) + 1):
            gram = int.from_bytes(full[end - order : end], "big")
            counted[gram] = counted.get(gram, 0) + 1
    counts = count_ngrams(texts, order)
    assert dict(zip(counts.grams.tolist(), counts.counts.tolist(), strict=True)) == counted
    assert counts.grams.tolist() == sorted(counted)
    assert len(counts) == len(counted)


@settings(deadline=None)
@given(texts=texts, order=st.integers(2, 8))
def test_shortened_counts_are_those_of_the_text(texts, order):
    counts, shorter = count_ngrams(texts, order), count_ngrams(texts, order - 1)
    got = counts.shorten()
    np.testing.assert_array_equal(got.grams, shorter.grams)
    np.testing.assert_array_equal(got.counts, shorter.counts)
    different = counts.shorten(distinct=True)
    predecessors = {}
    for gram in counts.grams.tolist():
        predecessors.setdefault(gram & ((1 << 8 * (order - 1)) - 1), set()).add(gram)
    np.testing.assert_array_equal(different.grams, shorter.grams)
    assert different.counts.tolist() == [len(predecessors[g]) for g in different.grams.tolist()]


def test_totals_are_the_counts_of_the_context():
    counts = count_ngrams([b"ababac"], 2)
    want = {0x0A61: 1, 0x6162: 3, 0x6163: 3, 0x6261: 2}
    assert dict(zip(counts.grams.tolist(), counts.totals().tolist(), strict=True)) == want


def test_a_batch_of_texts_is_packed_as_each_alone():
    ids = as_ids(TEXT[:60]).reshape(3, 20)
    np.testing.assert_array_equal(pack_ngrams(ids, 8), [pack_ngrams(row, 8) for row in ids])


def test_three_newlines_stand_nowhere_inside_a_play():
    assert not any(b"\n\n\n" in play.data for play in load_shakespeare())


def test_uniform_costs_eight_bits():
    assert bits_per_byte(NGramModel(), load_shakespeare("test")[:1]) == pytest.approx(8)


def test_maximum_likelihood_finds_a_held_out_play_impossible():
    model = maximum_likelihood(count_ngrams([TEXT], 3))
    assert bits_per_byte(model, load_shakespeare("validation")[:1]) == math.inf


def test_it_is_a_language_model():
    assert isinstance(NGramModel(), LanguageModel)


def test_sizes():
    counts = count_ngrams([TEXT], 3)
    model = kneser_ney(counts)
    tables = [counts, counts.shorten(), counts.shorten().shorten()]
    assert model.n_entries == sum(len(table) for table in tables)
    contexts = sum(len(level.contexts) for level in model.levels)
    assert model.n_bytes == 16 * (model.n_entries + contexts)


# Sampling


def test_sampling_repeats_with_its_seed_and_not_with_another():
    model = kneser_ney(count_ngrams([TEXT], 4))
    assert sample(model, "MACBETH:\n", 50, seed=3) == sample(model, "MACBETH:\n", 50, seed=3)
    assert sample(model, "MACBETH:\n", 50, seed=3) != sample(model, "MACBETH:\n", 50, seed=4)
    assert sample(model, "MACBETH:\n", 0) == ""


def test_sampled_frequencies_follow_temperature():
    """1,000 draws of a Bernoulli: 5 standard deviations, a false alarm in 1.7 million runs."""
    model = maximum_likelihood(count_ngrams([b"ab" * 3 + b"ac"], 1))  # a: 4/8, b: 3/8, c: 1/8
    for temperature in (0.5, 1.0, 2.0):
        weights = np.array([4, 3, 1]) ** (1 / temperature)
        want = weights[0] / weights.sum()
        drawn = sample(model, "", 1000, temperature=temperature)
        sigma = math.sqrt(want * (1 - want) / 1000)
        assert abs(drawn.count("a") / 1000 - want) < 5 * sigma
    assert sample(model, "", 20, temperature=0.0) == "a" * 20


def test_a_prompt_longer_than_the_context_changes_nothing():
    model = kneser_ney(count_ngrams([TEXT], 4))
    assert sample(model, "anything at all, the", 30) == sample(model, " the", 30)


def test_an_empty_prompt_begins_a_play():
    model = maximum_likelihood(count_ngrams([TEXT], 5))
    assert sample(model, "", 13) == "First Witch:\n"


# Files


def test_saved_counts_come_back(tmp_path):
    counts = count_ngrams([TEXT], 8)
    size = counts.save(tmp_path / "counts.npz")
    assert size == (tmp_path / "counts.npz").stat().st_size
    again = NGramCounts.load(tmp_path / "counts.npz")
    assert again.order == 8 and again.counts.dtype == np.int64
    np.testing.assert_array_equal(again.grams, counts.grams)
    np.testing.assert_array_equal(again.counts, counts.counts)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    count_ngrams([b"ab"], 2).save(tmp_path / "counts.npz")
    before = (tmp_path / "counts.npz").read_bytes()

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(DataError, match=r"counts\.npz cannot be written: no space"):
        count_ngrams([TEXT], 2).save(tmp_path / "counts.npz")
    assert (tmp_path / "counts.npz").read_bytes() == before


def test_a_file_that_is_not_counts_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", order=np.array([{"a": 1}]), gaps=[1], counts=[1])
    np.savez(tmp_path / "uneven.npz", order=2, gaps=np.ones(3, np.uint64), counts=np.ones(2, int))
    for name in ("text", "other", "pickle", "uneven", "missing"):
        with pytest.raises(DataError, match=rf"{name}\.npz does not hold n-gram counts"):
            NGramCounts.load(tmp_path / f"{name}.npz")


# Wrong input


def unchecked(function):
    """The function without the tests' own shape checks: what a user calls."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("order", [0, -1, 9])
def test_an_order_that_does_not_fit_is_refused(order):
    with pytest.raises(ConfigError, match=f"order={order}; use 1 to 8"):
        count_ngrams([b"abc"], order)


def test_nothing_to_count_is_refused():
    for nothing in ([], [b""]):
        with pytest.raises(DataError, match="no text to count"):
            count_ngrams(nothing, 3)


def test_an_empty_text_among_others_changes_nothing():
    np.testing.assert_array_equal(
        count_ngrams([b"", b"abc"], 2).grams, count_ngrams([b"abc"], 2).grams
    )


@pytest.mark.parametrize("ids", [[-1, 3], [3, 256]])
def test_ids_that_are_not_bytes_are_refused(ids):
    with pytest.raises(DataError, match="wanted bytes, 0 to 255"):
        pack_ngrams(np.array(ids), 2)


def test_ids_that_are_not_integers_are_refused():
    with pytest.raises(DataError, match="dtype float64"):
        unchecked(pack_ngrams)(np.array([1.0]), 2)


def test_ids_without_a_batch_are_refused():
    for method in (NGramModel.log_probs, NGramModel.next_log_probs):
        with pytest.raises(DataError, match=r"wanted \[batch, seq\]"):
            unchecked(method)(NGramModel(), np.array([1, 2]))


@pytest.mark.parametrize("k", [0.0, -1.0, math.nan])
def test_a_k_that_is_not_positive_is_refused(k):
    with pytest.raises(ConfigError, match=f"k={k}"):
        add_k(count_ngrams([b"abc"], 2), k)


@pytest.mark.parametrize("keep", [0.0, 1.0, 1.5])
def test_a_share_outside_0_and_1_is_refused(keep):
    with pytest.raises(ConfigError, match=f"keep={keep}"):
        jelinek_mercer(count_ngrams([b"abc"], 2), keep)


@pytest.mark.parametrize("discount", [0.0, 1.0, -0.5])
def test_a_discount_outside_0_and_1_is_refused(discount):
    with pytest.raises(ConfigError, match=f"discount={discount}"):
        kneser_ney(count_ngrams([b"abc"], 2), discount)


def test_a_unigram_cannot_be_shortened():
    with pytest.raises(ConfigError, match="order=1"):
        count_ngrams([b"abc"], 1).shorten()


@pytest.mark.parametrize("taken", [-0.1, 1.1])
def test_taking_what_is_not_there_is_refused(taken):
    counts = count_ngrams([b"abc"], 2)
    with pytest.raises(ConfigError, match="take from 0 to the whole count"):
        Level.from_counts(counts, np.full(len(counts), taken))


def test_levels_out_of_order_are_refused():
    level = Level.from_counts(count_ngrams([b"abc"], 2), np.zeros(3))
    with pytest.raises(ConfigError, match=r"orders \[2, 2\]"):
        NGramModel([level, level])


def test_sampling_refuses_what_it_cannot_do():
    model = maximum_likelihood(count_ngrams([b"abc"], 2))
    with pytest.raises(ConfigError, match="temperature=-1"):
        sample(model, "", 1, temperature=-1.0)
    with pytest.raises(ConfigError, match="n_bytes=-1"):
        sample(model, "", -1)
    with pytest.raises(ConfigError, match="every next byte has probability 0"):
        sample(model, "z", 1)


# Cost


def test_an_8_gram_of_all_training_plays_stays_in_its_limits():
    """Memory by the arrays, not by the clock: 16 bytes an entry and a context."""
    counts = count_ngrams([play.data for play in load_shakespeare("train")], 8)
    model = kneser_ney(counts)
    assert len(counts) == 1_653_331
    assert model.n_bytes < 100e6
    result = score(model, load_shakespeare("validation"))
    assert 2.14 < result.bits_per_byte < 2.16
