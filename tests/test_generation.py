"""Decoding: parity with transformers, samplers by chi-square, stop texts, beams, bad input."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ALL, CONFIGS, build, copy_weights, random_ids, theirs
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minilm.cache import KVCache
from minilm.decoder import Decoder
from minilm.errors import ConfigError
from minilm.generation import (
    GREEDY,
    Sampling,
    TextStream,
    beam_search,
    decode,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token_probs,
    penalize_repetition,
    sample_ids,
    stream,
)
from minilm.measure import ByteTokenizer
from minilm.model import Transformer, llama_config
from minilm.model import generate as plain_generate
from minilm.pretrained import chat_ids, load_pretrained
from minilm.results import load_result
from minilm.tokenizer import SMOLLM2_PATTERN, train_bpe

KINDS = {"model": lambda model: model, "decoder": Decoder}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def random_logits(batch: int = 4, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed))


# Filters: those of transformers


@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers(seed):
    logits = random_logits(seed=seed)
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(seed))
    for k in (1, 7, 50, 99):
        assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits.clone()))
    for p in (0.001, 0.3, 0.9, 0.999):
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits.clone()))
        assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits.clone()))
    for penalty in (0.5, 1.3):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        got = penalize_repetition(logits, ids.tolist(), penalty)
        torch.testing.assert_close(got, wanted, atol=0, rtol=1e-6)
    assert torch.equal(logits, random_logits(seed=seed))  # never modified


def test_the_order_of_the_steps_is_that_of_transformers():
    logits, ids = random_logits(), torch.tensor([[1, 2], [3, 3], [4, 9], [0, 7]])
    scores = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()) / 0.7
    for step in (TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)):
        scores = step(ids, scores)
    sampling = Sampling(0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.7)
    got = next_token_probs(logits, sampling, ids.tolist())
    torch.testing.assert_close(got, scores.softmax(-1))


@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_what_filters_keep(seed, p, k):
    logits = random_logits(vocab=33, seed=seed)
    probs = logits.softmax(-1)
    for kept in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, p)):
        there = kept > -math.inf
        assert torch.equal(kept[there], logits[there])
        assert there.gather(1, logits.argmax(-1, keepdim=True)).all()  # the best always
        lowest = torch.where(there, logits, math.inf).amin(-1)
        assert (logits[~there] < lowest[:, None].expand_as(logits)[~there]).all()
    assert (keep_top_k(logits, k) > -math.inf).sum(-1).tolist() == [min(k, 33)] * 4
    there = keep_top_p(logits, p) > -math.inf
    mass = torch.where(there, probs, 0.0).sum(-1)
    least = torch.where(there, probs, 1.0).amin(-1)
    assert (mass > p - 1e-5).all() and (mass - least < p + 1e-5).all()  # and no id too many


def test_filters_that_let_everything_pass():
    logits = random_logits(vocab=5000)
    for kept in (keep_top_k(logits, 5000), keep_top_p(logits, 1.0)):
        assert torch.equal(kept, logits)
    assert torch.equal(next_token_probs(logits, Sampling()), logits.softmax(-1))


def test_temperature():
    logits = random_logits()
    cold = next_token_probs(logits, GREEDY)
    assert torch.equal(cold, torch.nn.functional.one_hot(logits.argmax(-1), 50).float())
    torch.testing.assert_close(next_token_probs(logits, Sampling(1e-3)), cold, atol=1e-6, rtol=0)
    hot = next_token_probs(logits, Sampling(1e6))
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 50), atol=1e-5, rtol=0)
    half = next_token_probs(logits.bfloat16(), Sampling())
    assert half.dtype == torch.float32


# Draws: chi-square

FALSE_ALARM = 1e-4  # how often each of the tests below would fail with new seeds, if all is right


def chi_square_is_fine(counts: torch.Tensor, probs: torch.Tensor) -> bool:
    """Pearson's test. Ids that are expected fewer than 5 times are counted together."""
    from scipy.stats import chi2

    n = int(counts.sum())
    assert (counts[probs == 0] == 0).all(), "an id came that must not"
    rare = probs * n < 5
    expected = torch.cat([probs[~rare] * n, (probs[rare] * n).sum()[None]]).double()
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return len(seen) < 2 or statistic < chi2.isf(FALSE_ALARM, len(seen) - 1)


SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=2.0),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.1),
    "penalty": Sampling(repetition_penalty=1.5),
    "all": Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_draws_follow_the_probabilities(sampling):
    """40,000 draws in rows of a batch; and two rows of one batch are independent."""
    logits = random_logits(batch=1, vocab=40).expand(20, 40)
    seen = [[3, 5, 5, 8]] * 20
    probs = next_token_probs(logits, sampling, seen)
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(20)]
    draws = torch.stack([sample_ids(probs, generators) for _ in range(2000)])
    assert chi_square_is_fine(draws.flatten().bincount(minlength=40), probs[0].double())
    pairs = draws[:, 0] * 40 + draws[:, 1]
    both = (probs[0, :, None].double() * probs[1, None, :]).flatten()
    assert chi_square_is_fine(pairs.bincount(minlength=1600), both)


def test_the_chi_square_sees_a_wrong_sampler():
    """Draws at temperature 1, judged as if at 1.1; and top-k that lets one id too many pass."""
    logits = random_logits(batch=1, vocab=40).expand(20, 40)
    generators = [torch.Generator().manual_seed(i) for i in range(20)]
    right = next_token_probs(logits, Sampling())
    draws = torch.cat([sample_ids(right, generators) for _ in range(2000)]).bincount(minlength=40)
    assert not chi_square_is_fine(draws, next_token_probs(logits, Sampling(1.1))[0].double())
    with pytest.raises(AssertionError, match="must not"):
        chi_square_is_fine(draws, next_token_probs(logits, Sampling(top_k=30))[0].double())


def test_sampled_texts_follow_the_model():
    """Two ids a row, 3,000 rows: the pairs have the probabilities that the model gives them."""
    model = build(llama_config(6, 8, d_model=12, n_layers=1, n_heads=2), seed=3)
    rows = generate(model, [[1, 2]] * 3000, 2, Sampling(temperature=0.8, seed=1))
    seen = torch.tensor(rows)
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2]]))[0, -1] / 0.8).softmax(-1)
        texts = torch.tensor([[1, 2, i] for i in range(6)])
        second = (model(texts)[:, -1] / 0.8).softmax(-1)
    both = (first[:, None] * second).flatten().double()
    assert chi_square_is_fine((seen[:, 0] * 6 + seen[:, 1]).bincount(minlength=36), both)


# Whole texts


@pytest.mark.parametrize("name", CONFIGS)
@each_kind
@torch.no_grad()
def test_greedy_is_that_of_transformers(name, kind):
    config = CONFIGS[name]
    ours, other = build(config), theirs(config)
    copy_weights(ours, other)
    other.generation_config.eos_token_id = None
    ids = random_ids(config, seq=5)
    wanted = other.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=19, do_sample=False, pad_token_id=0
    )
    assert generate(kind(ours), ids.tolist(), 19, GREEDY) == wanted[:, 5:].tolist()


@pytest.mark.parametrize("name", ALL)
@each_kind
def test_greedy_is_that_of_the_model_without_a_cache(name, kind):
    model, prompts = build(ALL[name]), [[1, 2, 3, 4, 5], [6], [7, 8]]
    wanted = plain_generate(model, prompts, 19, temperature=0.0)
    assert generate(kind(model), prompts, 19, GREEDY) == wanted


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("name", ["gpt2", "llama 2 KV heads", "alibi"])
def test_a_row_does_not_depend_on_its_neighbours(name, sampling):
    """Row i draws with seed + i; and where rows end early, the others go on as if alone."""
    model, prompts = Decoder(build(ALL[name])), [[1, 2, 3, 4, 5], [6], [7, 8]]
    free = generate(model, prompts, 15, replace(sampling, seed=10))
    stop = [row[n] for row, n in zip(free, (9, 2, 5), strict=True)]
    for stops in ([], stop[1:2], stop):
        together = generate(model, prompts, 15, replace(sampling, seed=10), stops)
        alone = [
            generate(model, [prompt], 15, replace(sampling, seed=10 + i), stops)[0]
            for i, prompt in enumerate(prompts)
        ]
        assert together == alone
        for row, whole in zip(together, free, strict=True):
            ends = [i for i, token in enumerate(whole) if token in stops]
            assert row == whole[: ends[0] + 1 if ends else None]


def test_seeds():
    model = build(ALL["llama"])
    prompts = [[1], [1], [1, 2]]
    once, again, other = (generate(model, prompts, 15, Sampling(seed=s)) for s in (0, 0, 7))
    assert once == again != other and once[0] != once[1]
    state = torch.get_rng_state()
    generate(model, prompts, 3, Sampling())
    assert torch.equal(state, torch.get_rng_state())
    assert generate(model, prompts, 0) == [[], [], []]
    cold = generate(model, prompts, 9, Sampling(temperature=0.0, top_k=3, seed=9))
    assert cold == generate(model, prompts, 9, GREEDY)


def test_the_penalty_counts_prompt_and_new_ids():
    """At a penalty without measure no id comes twice, nor one of the prompt."""
    model = build(ALL["llama"])
    with torch.no_grad():
        model.lm_head.weight.abs_()  # logits are sums of both signs all the same
    rows = generate(model, [[1, 2, 3], [4]], 15, Sampling(0.0, repetition_penalty=1e9))
    for row, prompt in zip(rows, ([1, 2, 3], [4]), strict=True):
        wanted, ids = [], list(prompt)
        for _ in range(15):
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[:, -1]
            ids.append(int(penalize_repetition(logits, [ids], 1e9).argmax()))
            wanted.append(ids[-1])
        assert row == wanted
    assert rows != generate(model, [[1, 2, 3], [4]], 15, GREEDY)


def test_a_cache_that_holds_a_prefix_is_not_read_again():
    model = build(ALL["llama"])
    prompts = [[5, 6, 7, 8, 1], [5, 6, 7, 9]]
    wanted = generate(model, prompts, 8, GREEDY)
    cache = KVCache(model.config, 1, 20)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), torch.arange(3)[None], cache)
    cache.select([0, 0])
    seen = []
    forward = model.embed_tokens.forward
    model.embed_tokens.forward = lambda ids: seen.append(ids.shape[1]) or forward(ids)
    assert generate(model, prompts, 8, GREEDY, cache=cache) == wanted
    assert seen == [2] + [1] * 7  # two new ids at most, then one at a time
    assert cache.lengths.tolist() == [5 + 7, 4 + 7]  # the last new id is not read


def test_each_step_reads_one_token():
    model, seen = build(ALL["llama"]), []
    forward = model.embed_tokens.forward
    model.embed_tokens.forward = lambda ids: seen.append(tuple(ids.shape)) or forward(ids)
    steps = list(decode(model, [[1, 2, 3, 4], [5]], 4, finished=lambda row, _: row == 1))
    assert seen == [(2, 4), (1, 1), (1, 1), (1, 1)]
    assert [[row for row, _ in step] for step in steps] == [[0, 1], [0], [0], [0]]


def test_the_logits_of_the_prompt_but_the_last_are_not_made():
    model, seen = build(ALL["llama"]), []
    logits = model.logits
    model.logits = lambda states: seen.append(tuple(states.shape)) or logits(states)
    generate(model, [[1, 2, 3, 4], [5]], 2)
    assert seen == [(2, 48), (2, 48)]


# Text


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


alphabet = st.text(st.sampled_from("ab\né…🙂"), max_size=20)


@given(alphabet, st.lists(st.text(st.sampled_from("ab\né🙂"), min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 100), max_size=12))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_text_does_not_depend_on_the_borders_of_tokens(text, stop, places):
    """The text up to the stop text that is complete first, however its bytes are cut."""
    reader, shown = TextStream(stop), ""
    for part in cut(text.encode(), places):
        shown += reader.feed(part)
        assert text.startswith(shown)
        assert not any(each in shown for each in stop)
    shown += reader.finish()
    wanted, stopped = text, False
    for end in range(len(text) + 1):  # character by character
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            wanted, stopped = text[: end - max(map(len, found))], True
            break
    assert (shown, reader.stopped) == (wanted, stopped)


def test_only_what_may_become_a_stop_text_is_held_back():
    reader = TextStream(["</end>", "\n\n"])
    said = [reader.feed(part) for part in (b"a < b", b" </", b"en", b"try>\n", b"x", b"\xf0\x9f")]
    assert said == ["a < b", " ", "", "</entry>", "\nx", ""]
    assert reader.finish() == "\ufffd" and not reader.stopped
    reader = TextStream(["END"])
    assert [reader.feed(b"the E"), reader.feed(b"N"), reader.finish()] == ["the ", "", "EN"]
    reader = TextStream(["END"])
    assert [reader.feed(b"the E"), reader.feed(b"ND!"), reader.finish()] == ["the ", "", ""]
    assert reader.stopped and reader.feed(b"more") == ""


@pytest.fixture(scope="module")
def speaking() -> Transformer:
    tokenizer = train_bpe(
        ["To be, or not to be: that is the question.\nuser assistant\n" * 3],
        300,
        SMOLLM2_PATTERN,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    )
    config = llama_config(tokenizer.vocab_size, 64, d_model=32, n_layers=2, n_heads=4)
    return build(config, tokenizer=tokenizer)


@each_kind
def test_the_stream_is_the_text_of_generate(speaking, kind):
    model = kind(speaking)
    special = sorted(model.tokenizer.special_tokens.values())
    for seed in range(3):
        sampling = Sampling(seed=seed)
        (row,) = generate(model, [[5, 6, 7]], 40, sampling, stop=special)
        if row[-1] in special:
            row = row[:-1]
        wanted = model.tokenizer.decode_bytes(row).decode("utf-8", "replace")
        pieces = list(stream(model, [5, 6, 7], 40, sampling))
        assert "".join(pieces) == wanted and len(pieces) > 2


@each_kind
def test_stop_texts_across_the_borders_of_tokens(speaking, kind):
    """Every stop text of two to four characters in a text: stream and generate end as they must."""
    model, special = kind(speaking), sorted(speaking.tokenizer.special_tokens.values())
    sampling = Sampling(temperature=0.7, seed=2)
    whole = generate(model, [[5, 6, 7]], 24, sampling, stop=special)[0]
    text = "".join(stream(model, [5, 6, 7], 24, sampling))
    across = 0
    for length, start in product((2, 4), range(0, len(text) - 4, 6)):
        stop = text[start : start + length]
        got = "".join(stream(model, [5, 6, 7], 24, sampling, [stop]))
        assert got == text[: text.index(stop)]
        (row,) = generate(model, [[5, 6, 7]], 24, sampling, [stop, *special])
        assert row == whole[: len(row)]
        n = len(row)
        data = [
            model.tokenizer.decode_bytes([t for t in whole[:m] if t not in special])
            for m in (n - 1, n)
        ]
        parts = [TextStream().feed(each) for each in data]  # whole characters
        assert stop not in parts[0] and stop in parts[1]
        across += not model.tokenizer.decode(row[-1:]).endswith(stop)
    assert across > 5


def test_the_stream_comes_piece_by_piece_and_stops_the_work(speaking):
    seen = []
    forward = speaking.embed_tokens.forward
    speaking.embed_tokens.forward = lambda ids: seen.append(ids.shape[1]) or forward(ids)
    try:
        pieces = stream(speaking, [5, 6, 7], 40, Sampling(seed=1))
        next(pieces)
        assert seen == [3]
        next(pieces)
        assert seen == [3, 1]
        pieces.close()
    finally:
        speaking.embed_tokens.forward = forward


def test_a_model_of_bytes_ends_at_its_begin_token():
    """Its tokenizer has no special tokens and no bytes for the begin token."""
    model = build(llama_config(257, 80, d_model=24, n_layers=1, n_heads=2), 0, ByteTokenizer())
    for seed in range(40):
        (row,) = generate(model, [[256, 65]], 60, Sampling(2.0, seed=seed), stop=[256, "zzz"])
        text = "".join(stream(model, [256, 65], 60, Sampling(2.0, seed=seed)))
        assert text == bytes(t for t in row if t < 256).decode("utf-8", "replace")
        if 256 in row:
            return
    raise AssertionError("no text had the begin token in it")


# Beams


def brute_force(model, prompt, n, power, stop_ids=()):
    """The score of every text of n ids, and of every shorter one that ends."""
    vocab, scores = model.config.vocab_size, {}
    for text in product(range(vocab), repeat=n):
        ends = [i for i, token in enumerate(text) if token in stop_ids]
        scores[text[: ends[0] + 1] if ends else text] = 0.0
    for text in scores:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text[:-1]]]))[0, len(prompt) - 1 :]
        chosen = logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(text)]
        scores[text] = float(chosen.sum()) / len(text) ** power
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("stop_ids", [(), (2,), (0, 3)])
@pytest.mark.parametrize("seed", [0, 1])
@each_kind
def test_with_beams_for_all_texts_the_best_is_found(power, stop_ids, seed, kind):
    model = build(llama_config(4, 12, d_model=12, n_layers=1, n_heads=2), seed)
    wanted = brute_force(model, [1, 3], 3, power, stop_ids)
    got = beam_search(kind(model), [1, 3], 3, 64, power, stop_ids)
    n = 5 if stop_ids == () else 1
    for (text, score), (want, want_score) in zip(got[:n], wanted[:n], strict=True):
        assert tuple(text) == want and abs(score - want_score) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama 2 KV heads"])
@pytest.mark.parametrize(("n_beams", "power"), [(2, 1.0), (4, 1.0), (3, 0.0), (5, 2.0)])
@pytest.mark.parametrize("stops", [False, True])
@torch.no_grad()
def test_beams_are_those_of_transformers(name, n_beams, power, stops):
    config = replace(CONFIGS[name], vocab_size=23)
    ours, other = build(config), theirs(config)
    copy_weights(ours, other)
    other.generation_config.eos_token_id = None
    for seed in range(4):
        prompt = random_ids(config, 1, 4, seed)
        free = beam_search(ours, prompt[0].tolist(), 8, n_beams, power)[0][0]
        stop = free[4] if stops else None
        wanted = other.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            num_beams=n_beams,
            do_sample=False,
            length_penalty=power,
            eos_token_id=stop,
            pad_token_id=0,
            num_return_sequences=n_beams,
            return_dict_in_generate=True,
            output_scores=True,
        )
        stop_ids = [stop] if stops else []
        got = beam_search(ours, prompt[0].tolist(), 8, n_beams, power, stop_ids)
        for (text, score), want, want_score in zip(
            got, wanted.sequences[:, 4:].tolist(), wanted.sequences_scores.tolist(), strict=True
        ):
            assert text == want[: len(text)] and set(want[len(text) :]) <= {0, stop}  # padding
            assert abs(score - want_score) < 1e-4


def test_one_beam_is_greedy():
    model = build(ALL["llama"])
    [(text, score)] = beam_search(model, [1, 2], 9, n_beams=1)
    assert text == generate(model, [[1, 2]], 9, GREEDY)[0] and score < 0
    assert beam_search(model, [1, 2], 0) == [([], 0.0)]


# Bad input


def test_bad_settings():
    for settings_, message in [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0; use at least 1"),
        ({"top_p": 0.0}, "top_p=0.0; wanted above 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.5}, "min_p=-0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Sampling(**settings_)


def test_bad_prompts_and_caches(speaking):
    model = build(ALL["llama"])  # max_seq_len = 24, no tokenizer
    small, full = KVCache(model.config, 1, 4), KVCache(model.config, 1, 20)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), torch.arange(2)[None], full)
    cases = [
        (lambda: generate(model, [], 3), r"lengths of prompts \[\]"),
        (lambda: generate(model, [[1], []], 3), r"lengths of prompts \[1, 0\].*at least one id"),
        (lambda: generate(model, [[1]], -1), "max_new_tokens=-1"),
        (lambda: generate(model, [[101]], 3), "ids run from 101 to 101, wanted 0 to 100"),
        (lambda: generate(model, [[5, -1]], 3), "from -1 to 5"),
        (
            lambda: generate(model, [[1] * 20, [1]], 5),
            "longest prompt has 20 ids, and 5 new ones are wanted, but there is room for 24",
        ),
        (lambda: generate(model, [[1] * 25], 0), "room for 24"),
        (lambda: generate(model, [[1, 2]], 3, cache=small), "room for 4"),
        (lambda: generate(model, [[1, 2]], 3, cache=full), r"holds \[2\] ids for prompts of \[2\]"),
        (lambda: generate(model, [[1], [2]], 3, cache=small), r"holds \[0\] ids for prompts"),
        (lambda: generate(model, [[1]], 3, stop=[""]), "a stop text is empty"),
        (lambda: generate(model, [[1]], 3, stop=["x"]), "no tokenizer"),
        (lambda: list(stream(model, [1], 3)), "no tokenizer"),
        (lambda: list(stream(speaking, [], 3)), "at least one id"),
        (lambda: next_token_probs(random_logits(), Sampling(repetition_penalty=2.0)), "pass seen"),
        (lambda: beam_search(model, [1], 3, n_beams=0), "n_beams=0"),
        (lambda: beam_search(model, [], 3), "at least one id"),
        (lambda: beam_search(model, [1] * 24, 3), "room for 24"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


# SmolLM2


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(load_pretrained())


def test_smollm2_writes_what_it_writes_in_transformers(decoder):
    """10 prompts, 64 tokens each, in one ragged batch; `benchmarks/decode.py --greedy` asked."""
    rows = load_result("decode_greedy")["result"]["rows"]
    for row in rows:
        assert decoder.tokenizer.encode(row["prompt"]) == row["ids"]
        assert len(row["written"]) == 64
    assert len(rows) == 10 and len({len(row["ids"]) for row in rows}) > 3
    got = generate(decoder, [row["ids"] for row in rows], 64, GREEDY)
    assert got == [row["written"] for row in rows]


def test_smollm2_ends_its_turn_and_stops_where_it_is_told(decoder):
    ids = chat_ids(decoder.tokenizer, [{"role": "user", "content": "What is 2 + 2?"}])
    text = "".join(stream(decoder, ids, 60))
    assert "<|im_end|>" not in text and len(text) > 5
    end = text[3:8]
    assert "".join(stream(decoder, ids, 60, stop=[end])) == text[: text.index(end)]
