"""Evaluation against its peers: scikit-learn, sacrebleu, lm-eval, and values found one by one."""

import difflib
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from minilm.corpus import load_shakespeare
from minilm.errors import ConfigError, DataError
from minilm.evaluation import (
    TASKS,
    Answers,
    Item,
    accuracy,
    answer,
    bleu,
    calibration,
    calibration_error,
    chrf,
    cloze_items,
    confusion_matrix,
    continuation_log_probs,
    distinct_n,
    encode_pair,
    few_shot,
    genre_items,
    lm_eval_model,
    lm_eval_task,
    longest_common_substring,
    perplexity,
    precision_recall_f1,
    repetition,
    speaker_items,
    strided_log_probs,
    window_hashes,
)
from minilm.measure import ByteTokenizer, compare, score, windowed_log_probs
from minilm.model import Transformer, generate, llama_config
from minilm.ngram import count_ngrams, kneser_ney
from minilm.tokenizer import train_bpe

VALIDATION = load_shakespeare("validation")


def transformer(max_seq_len: int = 32, tokenizer=None, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    tokenizer = tokenizer or ByteTokenizer()
    n = max(tokenizer.vocab_size, getattr(tokenizer, "begin_id", 256) + 1)
    config = llama_config(n, max_seq_len, d_model=16, n_layers=1, n_heads=2, init_std=0.3)
    return Transformer(config, tokenizer)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([VALIDATION[0].text[:50_000]], 320)


@pytest.fixture(scope="module")
def items():
    return cloze_items(VALIDATION, 12, size=60)


# Perplexity


def one_by_one(model, ids, size):
    """Each id after the `size - 1` ids before it, by a call of its own."""
    return np.array([model.log_probs(ids[None, max(0, t + 1 - size) : t + 1])[0, -1]
                     for t in range(len(ids))])  # fmt: skip


@pytest.mark.parametrize("n", [1, 5, 8, 9, 40])
def test_stride_1_is_the_exact_value(n):
    model, ids = transformer(8), np.random.default_rng(n).integers(256, size=n)
    exact = one_by_one(model, ids, 8)
    np.testing.assert_allclose(strided_log_probs(model, ids, 1), exact, rtol=1e-5, atol=1e-6)
    wide = transformer(64)  # a window may be shorter than the model's
    exact = one_by_one(wide, ids, 8)
    np.testing.assert_allclose(strided_log_probs(wide, ids, 1, window=8), exact, atol=1e-5)


@given(n=st.integers(1, 60), stride=st.integers(1, 8), batch=st.integers(1, 9), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_each_id_is_counted_once_with_what_its_window_holds(n, stride, batch, seed):
    model = MODEL_8
    ids = np.random.default_rng(seed).integers(256, size=n)
    got = strided_log_probs(model, ids, stride, batch_size=batch)
    starts = [0] if n <= 8 else [*range(0, n - 8, stride), n - 8]
    for t in range(n):
        start = next(s for s in starts if s + 8 > t)  # the first window that holds it
        want = model.log_probs(ids[None, start : t + 1])[0, -1]
        assert math.isclose(got[t], want, abs_tol=1e-5)


MODEL_8 = transformer(8)


def test_half_a_window_is_the_measure_of_chapter_01():
    model, ids = transformer(16), np.random.default_rng(0).integers(256, size=16 + 8 * 5)
    want = windowed_log_probs(model, ids, 3)
    np.testing.assert_allclose(strided_log_probs(model, ids, 8), want, atol=1e-6)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    model = transformer(8)
    with torch.no_grad():
        model.norm.weight.zero_()
    assert math.isclose(perplexity(model, "Nothing will come of nothing.", 4), 257, rel_tol=1e-5)


def test_a_model_without_a_window_reads_all_at_once():
    model = kneser_ney(count_ngrams([b"abracadabra" * 3], 3))
    ids = np.frombuffer(b"cadabra", np.uint8).astype(np.int64)
    np.testing.assert_array_equal(strided_log_probs(model, ids, 2), model.log_probs(ids[None])[0])


def test_strides_that_make_no_sense_are_refused():
    for stride in (0, 9):
        with pytest.raises(ConfigError, match="from 1 to the window of 8"):
            strided_log_probs(MODEL_8, np.arange(20), stride)
    with pytest.raises(ConfigError, match="the text is empty"):
        perplexity(MODEL_8, "", 4)


# Right or wrong: scikit-learn

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(labels)
@settings(deadline=None)
def test_confusion_precision_recall_f1_are_those_of_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    targets, predictions = np.array(pairs).T
    got = confusion_matrix(targets, predictions, 4)
    np.testing.assert_array_equal(
        got, metrics.confusion_matrix(targets, predictions, labels=range(4))
    )
    want = metrics.precision_recall_fscore_support(
        targets, predictions, labels=range(4), zero_division=0
    )
    np.testing.assert_allclose(precision_recall_f1(got), want[:3])
    ours = accuracy(targets == predictions, ["play"] * len(targets)).bits_per_byte
    assert math.isclose(ours, metrics.accuracy_score(targets, predictions))
    assert math.isclose(
        precision_recall_f1(got)[2].mean(),
        metrics.f1_score(targets, predictions, labels=range(4), average="macro", zero_division=0),
    )


def test_a_class_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="classes run from 0 to 3; wanted 0 to 2"):
        confusion_matrix(np.array([0]), np.array([3]), 3)


def test_accuracy_has_an_interval_and_a_paired_difference():
    rng = np.random.default_rng(0)
    clusters = [f"play {i % 5}" for i in range(200)]
    right = rng.random(200) < 0.7
    better = right | (rng.random(200) < 0.3)
    a, b = accuracy(better, clusters), accuracy(right, clusters)
    low, high = a.interval()
    assert low < a.bits_per_byte == better.mean() < high
    assert compare(a, b).clear and math.isclose(compare(a, b).mean, better.mean() - right.mean())
    with pytest.raises(ConfigError, match="0 answers"):
        accuracy([], [])
    with pytest.raises(ConfigError, match="one cluster for each"):
        accuracy([True], ["a", "b"])


@given(labels, st.integers(1, 15))
@settings(deadline=None)
def test_calibration_is_that_of_scikit_learn(pairs, n_bins):
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    confidence = np.array([a / 3 for a, _ in pairs])
    correct = np.array([b > 1 for _, b in pairs])
    bins = calibration(confidence, correct, n_bins)
    true, predicted = curve(correct, confidence, n_bins=n_bins)
    np.testing.assert_allclose(bins.accuracy, true)
    np.testing.assert_allclose(bins.confidence, predicted)
    assert bins.size.sum() == len(pairs) and (bins.size > 0).all()


def test_calibration_error_by_hand():
    bins = calibration(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, False, True, True]), 2)
    assert bins.size.tolist() == [4]  # one bin from 0.5 to 1: 0.75 sure, 0.75 right
    assert calibration_error(bins) == pytest.approx(0.0)
    bins = calibration(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, False, True, True]), 10)
    assert calibration_error(bins) == pytest.approx((0.4 * 2 + 0.4 * 2) / 4)
    bins = calibration(np.array([0.0, 0.5, 1.0]), np.array([False, True, True]), 2)
    assert bins.size.tolist() == [2, 1]  # what lies on an edge belongs to the bin below it
    with pytest.raises(ConfigError, match="between 0 and 1"):
        calibration(np.array([1.2]), np.array([True]))


# Items and their answers


def test_items_are_validated():
    for options, right, said in (
        (("a",), 0, "two or more"),
        (("a", "a"), 0, "different"),
        (("a", ""), 0, "none empty"),
        (("a", "b"), 2, "index of one of 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            Item("context", options, right)
    assert Item("to be or", (" not", " now"), 1).solved == "to be or now"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "n-gram"])
def test_log_probs_of_continuations_are_sums_of_those_of_the_whole(kind, batch_size, bpe):
    if kind == "n-gram":
        model = kneser_ney(count_ngrams([VALIDATION[0].data[:20_000]], 4))
    else:
        model = transformer(64, bpe if kind == "bpe" else None)
    pairs = [
        ("My lord, my", " lord"),
        ("My lord, my", " noble lord"),
        ("", "Enter"),
        ("A horse! a horse! ", "my kingdom for a horse!"),
        ("One", " two"),
    ]
    got = continuation_log_probs(model, pairs, batch_size)
    for (context, continuation), value in zip(pairs, got, strict=True):
        ids = np.array(model.tokenizer.encode(context + continuation))
        n = len(model.tokenizer.encode(context.rstrip()))
        want = model.log_probs(ids[None])[0, n:].sum()
        assert math.isclose(value, want, rel_tol=1e-4)


def test_a_long_context_loses_its_beginning():
    model = transformer(8)
    got = continuation_log_probs(model, [("x" * 100 + "abcdef", "gh"), ("abcdef", "gh")])
    assert got[0] == pytest.approx(got[1], rel=1e-5)
    with pytest.raises(ConfigError, match="does not fit max_seq_len=8"):
        continuation_log_probs(model, [("a", "b" * 9)])


def test_pairs_are_encoded_as_lm_eval_does(bpe):
    model = pytest.importorskip("lm_eval.api.model")

    class Theirs(model.TemplateLM):
        eot_token_id = 0
        tok_encode = staticmethod(bpe.encode)
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

    Theirs.__abstractmethods__ = frozenset()
    for pair in [("My lord", " and lady"), ("My lord ", "and"), ("A\n\n", "B"), ("One.", " Two")]:
        ids, n = encode_pair(bpe, *pair)
        assert (ids[:n], ids[n:]) == Theirs()._encode_pair(*pair)


def test_a_continuation_inside_a_token_is_refused(bpe):
    merged = next(text for text in (" the", " you", " and") if len(bpe.encode(text)) == 1)
    with pytest.raises(DataError, match="has no token of its own"):
        encode_pair(bpe, merged[:-1], merged[-1])


def test_normalization_by_length():
    made = Item("", (" a", " longer", " ab", " éé"), 2)
    values = (np.array([-2.0, -7.2, -3.1, -4.0]),)
    one = Answers((made,), values)
    assert one.chosen().tolist() == [0]
    assert one.chosen("characters").tolist() == [0]  # -1.00, -1.03, -1.03, -1.33
    assert one.chosen("bytes").tolist() == [3]  # ... and -0.80 for the four bytes and a space
    assert one.targets().tolist() == [2]
    p = np.exp(values[0])
    assert one.confidence()[0] == pytest.approx(p.max() / p.sum())
    with pytest.raises(ConfigError, match="use one of none, characters, bytes"):
        one.chosen("tokens")


def test_answers_are_the_options_in_order(items):
    model = transformer(64)
    answers = answer(model, items, batch_size=5)
    for item, values in zip(items, answers.log_probs, strict=True):
        pairs = [(item.context, option) for option in item.options]
        np.testing.assert_allclose(values, continuation_log_probs(model, pairs), rtol=1e-4)
    assert answers.score().plays == tuple(sorted(play.slug for play in VALIDATION))
    with pytest.raises(ConfigError, match="no items"):
        answer(model, [])


# Questions from the plays


@pytest.mark.parametrize("name", TASKS)
def test_items_of_the_plays(name):
    made = TASKS[name](VALIDATION, 30, seed=3)
    assert made == TASKS[name](VALIDATION, 30, seed=3) != TASKS[name](VALIDATION, 30, seed=4)
    assert [sum(item.cluster == play.slug for item in made) for play in VALIDATION] == [10] * 3
    assert len({item.context for item in made}) == 30
    assert all(len(item.context) < 650 for item in made)
    with pytest.raises(ConfigError, match="of 3 plays"):
        TASKS[name](VALIDATION, 2)


def test_the_right_option_is_what_the_play_says():
    text = {play.slug: play.text for play in VALIDATION}
    for item in cloze_items(VALIDATION, 60):
        assert item.solved in text[item.cluster] and len(item.options) == 4
        assert item.context[-1] != " " and all(option[0] == " " for option in item.options)
    for item in speaker_items(VALIDATION, 60):
        assert item.solved in text[item.cluster] and len(item.options) == 3
        assert all(f"{option}\n" in item.context for option in item.options)
    genre = {play.slug: play.genre for play in VALIDATION}
    for item in genre_items(VALIDATION, 60):
        assert item.options[item.answer] == f" {genre[item.cluster]}"


def test_answers_stand_at_every_place():
    for make in (cloze_items, speaker_items):
        made = make(VALIDATION, 300)
        n = len(made[0].options)
        counts = np.bincount([item.answer for item in made], minlength=n)
        assert abs(counts - 300 / n).max() < 4 * math.sqrt(300 / n)  # 4 deviations: 1 in 5,000


def test_shots_are_solved_nested_and_never_the_item_itself():
    pool = [Item(f"{i}:", (" odd", " even"), (i + 1) % 2) for i in range(10)]
    four, two = few_shot(pool, pool, 4), few_shot(pool, pool, 2)
    for item, more, fewer in zip(pool, four, two, strict=True):
        assert more.context.endswith(fewer.context) and fewer.context.endswith("\n" + item.context)
        shots = more.context.split("\n")[:-1]
        assert len(set(shots)) == 4 and item.solved not in shots
        assert all(f"{shot.split(':')[0]}: {['even', 'odd'][int(shot[0]) % 2]}" == shot
                   for shot in shots)  # fmt: skip
        assert more.options == item.options and more.answer == item.answer
    assert few_shot(pool, pool, 0) == tuple(pool)
    with pytest.raises(ConfigError, match="10 shots of a pool of 9"):
        few_shot(pool, pool, 10)


# Generated text: sacrebleu

words = st.lists(st.sampled_from(["to", "be", "or", "not", "that", "is", "é"]), max_size=9)
texts = words.map(" ".join)


@st.composite
def translations(draw):
    n, n_references = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    hypotheses = [draw(texts) for _ in range(n)]
    return hypotheses, [[draw(texts) for _ in range(n_references)] for _ in range(n)]


@given(translations())
@settings(deadline=None, max_examples=200)
def test_bleu_and_chrf_are_those_of_sacrebleu(drawn):
    sacrebleu = pytest.importorskip("sacrebleu")
    hypotheses, references = drawn
    streams = [list(stream) for stream in zip(*references, strict=True)]
    want = sacrebleu.corpus_bleu(hypotheses, streams, tokenize="none").score
    assert bleu(hypotheses, references) == pytest.approx(want, abs=1e-9)
    want = sacrebleu.corpus_chrf(hypotheses, streams).score
    assert chrf(hypotheses, references) == pytest.approx(want, abs=1e-9)


def test_bleu_and_chrf_on_long_texts():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = np.random.default_rng(0)
    lines = [line for line in VALIDATION[0].text.split("\n") if len(line.split()) > 5][:40]
    cut = [" ".join(np.array(line.split())[rng.random(len(line.split())) < 0.9]) for line in lines]
    for hypotheses in (lines, cut, cut[::-1]):
        references = [[line, line.lower()] for line in lines]
        streams = [lines, [line.lower() for line in lines]]
        want = sacrebleu.corpus_bleu(hypotheses, streams, tokenize="none").score
        assert bleu(hypotheses, references) == pytest.approx(want)
        want = sacrebleu.corpus_chrf(hypotheses, streams).score
        assert chrf(hypotheses, references) == pytest.approx(want)
    assert bleu(lines, [[line] for line in lines]) == pytest.approx(100)


def test_references_that_are_no_lists_are_refused():
    for references in (["to be"], [], [[]]):
        with pytest.raises(ConfigError, match="for each hypothesis a list"):
            bleu(["to be"], references)
        with pytest.raises(ConfigError, match="for each hypothesis a list"):
            chrf(["to be"], references)


def test_distinct_and_repetition():
    assert distinct_n(["abab", "abab"], 2) == 2 / 6  # ab and ba, of six
    assert repetition(["abab", "abcd"], 2) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition([["no", "no", "no"]], 1) == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match="n=3"):
        distinct_n(["ab"], 3)


# Memorization


@given(st.text("ab", max_size=30), st.text("abc", max_size=60))
@settings(deadline=None)
def test_longest_common_substring_is_that_of_difflib(a, b):
    text, source = a.encode(), b.encode()
    found = longest_common_substring(text, source)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    assert found.length == matcher.find_longest_match().size
    run = text[found.start : found.start + found.length]
    assert run == source[found.source_start : found.source_start + found.length]


def test_a_planted_passage_is_found():
    train = b"".join(play.data for play in load_shakespeare("train")[:4])
    planted = train[300_000:300_137]
    found = longest_common_substring(b"#" * 500 + planted + b"@" * 700, train)
    assert found == (500, 300_000, 137)


def test_thue_and_morse_do_not_deceive_the_hash():
    """Their words have equal polynomial hashes modulo 2**64, and are not equal."""
    word = np.zeros(1, dtype=np.uint8)
    while len(word) < 2048:
        word = np.concatenate([word, 1 - word])
    a, b = (word + 97).tobytes(), (98 - word).tobytes()
    assert window_hashes(a)(2048) == window_hashes(b)(2048) and a != b
    text, source = a + b"x" * 2047, b + b"y" * 2047  # 2048 is the first length to be tried
    found = longest_common_substring(text, source)
    matched = text[found.start : found.start + found.length]
    assert 1024 <= found.length < 2048 and matched in source


# lm-eval


def run_lm_eval(model, task):
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.tasks import TaskManager

    return evaluator.simple_evaluate(
        lm_eval_model(model, batch_size=5), tasks=[task], bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_lm_eval_agrees(kind, items, bpe):
    model = transformer(64, bpe if kind == "bpe" else None)
    results = run_lm_eval(model, lm_eval_task("cloze", items))
    ours = answer(model, items)
    for metric, per in (("acc", "none"), ("acc_norm", "characters"), ("acc_bytes", "bytes")):
        assert results["results"]["cloze"][f"{metric},none"] == ours.score(per).bits_per_byte
    for sample in results["samples"]["cloze"]:
        theirs = [float(value) for value, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(theirs, ours.log_probs[sample["doc_id"]], rtol=1e-5)


class Request:
    def __init__(self, *args):
        self.args = args


def test_lm_eval_other_requests(bpe):
    pytest.importorskip("lm_eval")
    model = transformer(32, bpe)
    adapter = lm_eval_model(model)
    play = VALIDATION[0].text[:2000]
    rolling = adapter.loglikelihood_rolling([Request(play), Request("Enter")])
    ids = np.array(bpe.encode(play))
    assert rolling[0] == pytest.approx(strided_log_probs(model, ids, 16).sum())
    context = "My lord"
    greedy = generate(model, [[model.begin_id, *bpe.encode(context)]], 4, temperature=0.0)[0]
    text = bpe.decode(greedy)
    [written] = adapter.generate_until([Request(context, {"max_gen_toks": 4, "until": []})])
    assert written == text
    stop = text[2]
    settings = {"max_gen_toks": 4, "until": [stop]}
    assert adapter.generate_until([Request(context, settings)]) == [text.partition(stop)[0]]


def test_lm_eval_knows_what_greedy_decoding_writes():
    pytest.importorskip("lm_eval")
    model = transformer(32)
    greedy = generate(model, [[256, *b"My lord"]], 3, temperature=0.0)[0]
    assert max(greedy) < 127  # text, by luck of the seed
    text = bytes(greedy).decode()
    other = text[:-1] + chr((ord(text[-1]) + 1) % 127)
    got = lm_eval_model(model).loglikelihood([Request("My lord", text), Request("My lord", other)])
    assert [same for _, same in got] == [True, False]


def test_without_lm_eval_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        lm_eval_model(transformer())


# The command


def test_evaluate_prints_and_writes(tmp_path, capsys, monkeypatch):
    command = importlib.import_module("minilm.cli.evaluate")  # the name is also the function's
    model = transformer(64)
    monkeypatch.setattr(command, "load_model", lambda name, device: model)
    path = tmp_path / "out.json"
    play = VALIDATION[2]
    monkeypatch.setattr("minilm.corpus.load_shakespeare", lambda split: (play,))
    code = command.evaluate("some", tasks=("cloze",), json_file=path, n_items=6)
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    assert code == 0 and "bits per byte" in printed and "cloze" in printed
    want = score(model, [play])
    assert found["bits_per_byte"]["value"] == pytest.approx(want.bits_per_byte)
    assert found["bits_per_byte"]["low"] <= found["bits_per_byte"]["value"]
    assert found["tasks"]["cloze"]["items"] == 6 and found["split"] == "validation"
    with pytest.raises(ConfigError, match="did you mean 'cloze'"):
        command.evaluate("some", tasks=("close",))
