"""Chapter 04: parity with torch and with Levy & Goldberg first, then properties, then bad input."""

import math
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilm import recurrent
from minilm.corpus import Play, Scene
from minilm.errors import ConfigError, DataError
from minilm.measure import LanguageModel, score
from minilm.recurrent import (
    AdditiveAttention,
    EncoderDecoder,
    LSTMCell,
    LSTMLanguageModel,
    RNNCell,
    SkipGram,
    keep_probability,
    nearest,
    noise_distribution,
    number_words,
    shifted_pmi,
    skip_gram_pairs,
    stream_chunks,
    train_language_model,
    train_skip_gram,
    unroll,
)

TEXT = b"To be, or not to be, that is the question. " * 40


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def copy_weights(cell: nn.Module, theirs: nn.Module, suffix: str = "") -> None:
    """Give one of torch's cells or layers the weights of ours; its two biases add up to our one."""
    with torch.no_grad():
        getattr(theirs, f"weight_ih{suffix}").copy_(cell.input_proj.weight)
        getattr(theirs, f"weight_hh{suffix}").copy_(cell.state_proj.weight)
        getattr(theirs, f"bias_ih{suffix}").copy_(cell.input_proj.bias)
        getattr(theirs, f"bias_hh{suffix}").zero_()


def pairs_of_gradients(cell: nn.Module, theirs: nn.Module, suffix: str = ""):
    yield cell.input_proj.weight.grad, getattr(theirs, f"weight_ih{suffix}").grad
    yield cell.state_proj.weight.grad, getattr(theirs, f"weight_hh{suffix}").grad
    yield cell.input_proj.bias.grad, getattr(theirs, f"bias_ih{suffix}").grad


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# Parity with torch


@pytest.mark.parametrize(("ours", "theirs"), [(RNNCell, nn.RNNCell), (LSTMCell, nn.LSTMCell)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cell_is_torchs_cell_in_values_and_gradients(ours, theirs, batch):
    cell, peer = ours(5, 7).double(), theirs(5, 7).double()
    copy_weights(cell, peer)
    x = torch.randn(batch, 5, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    state = tuple(torch.randn(batch, 7, dtype=torch.float64) for _ in range(cell.n_states))
    got = cell(cell.input_proj(x), state)
    want = peer(y, state if len(state) == 2 else state[0])
    want = want if isinstance(want, tuple) else (want,)
    ends = [torch.randn_like(s) for s in got]
    for one, other in zip(got, want, strict=True):
        close(one, other)
    sum((s * e).sum() for s, e in zip(got, ends, strict=True)).backward()
    sum((s * e).sum() for s, e in zip(want, ends, strict=True)).backward()
    close(x.grad, y.grad)
    for one, other in pairs_of_gradients(cell, peer):
        close(one, other)


@pytest.mark.parametrize(("ours", "theirs"), [(RNNCell, nn.RNN), (LSTMCell, nn.LSTM)])
@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 4), seq=st.integers(1, 9), d_in=st.integers(1, 5), d=st.integers(1, 6))
def test_unroll_is_torchs_layer_in_values_and_gradients(ours, theirs, batch, seq, d_in, d):
    cell, peer = ours(d_in, d).double(), theirs(d_in, d, batch_first=True).double()
    copy_weights(cell, peer, "_l0")
    x = torch.randn(batch, seq, d_in, dtype=torch.float64)
    got, state = unroll(cell, cell.input_proj(x), cell.start(batch))
    want, last = peer(x)
    close(got, want)
    for one, other in zip(state, last if isinstance(last, tuple) else (last,), strict=True):
        close(one, other[0])
    end = torch.randn_like(got)
    (got * end).sum().backward()
    (want * end).sum().backward()
    for one, other in pairs_of_gradients(cell, peer, "_l0"):
        close(one, other)


def test_the_language_model_is_our_cell_with_torchs_loop():
    model = LSTMLanguageModel(4, 6).double()
    cell = LSTMCell(4, 6).double()
    with torch.no_grad():
        cell.input_proj.weight.copy_(model.lstm.weight_ih_l0)
        cell.input_proj.bias.copy_(model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0)
        cell.state_proj.weight.copy_(model.lstm.weight_hh_l0)
    ids = torch.randint(256, (3, 11))
    outputs, _ = unroll(cell, cell.input_proj(model.embedding(ids)), cell.start(3))
    close(model(ids)[0], model.head(outputs))


def test_the_forget_gate_starts_open():
    assert torch.equal(
        LSTMCell(3, 2).input_proj.bias.detach(), torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0])
    )
    assert torch.all(LSTMLanguageModel(3, 2).lstm.bias_ih_l0[2:4] == 1)


# Skip-gram


def toy_counts() -> np.ndarray:
    """Pair counts of a random text over six words, each pair seen at least once."""
    rng = np.random.default_rng(3)
    chain = rng.dirichlet(np.ones(6), size=6)
    ids = [0]
    for _ in range(3000):
        ids.append(int(rng.choice(6, p=chain[ids[-1]])))
    counts = np.ones((6, 6))
    np.add.at(counts, tuple(skip_gram_pairs(np.array(ids), window=2).T), 1.0)
    return counts


def expected_loss(scores: torch.Tensor, counts: np.ndarray, noise: np.ndarray, n_noise: int):
    true, words = torch.tensor(counts), torch.tensor(counts.sum(1, keepdims=True))
    false = n_noise * words * torch.tensor(noise)
    return -(true * F.logsigmoid(scores) + false * F.logsigmoid(-scores)).sum()


def test_the_loss_of_skip_gram_factorizes_shifted_pmi():
    counts, n_noise = toy_counts(), 3
    noise = noise_distribution(counts.sum(0).astype(int), power=1.0)
    model = SkipGram(6, 6).double()
    nn.init.normal_(model.neighbours.weight)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=400,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        scores = model.words.weight @ model.neighbours.weight.T
        loss = expected_loss(scores, counts, noise, n_noise) / counts.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = (model.words.weight @ model.neighbours.weight.T).detach().numpy()
    np.testing.assert_allclose(learned, shifted_pmi(counts, noise, n_noise), atol=1e-4)


def test_with_noise_as_neighbours_occur_it_is_pmi_less_ln_k():
    counts = toy_counts()
    joint = counts / counts.sum()
    pmi = np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0)))
    got = shifted_pmi(counts, joint.sum(0), n_noise=5)
    np.testing.assert_allclose(got, pmi - math.log(5), atol=1e-12)
    counts[2, 4] = 0
    assert shifted_pmi(counts, joint.sum(0), 5)[2, 4] == -np.inf


def test_the_sampled_loss_is_the_expected_loss_on_average():
    counts = toy_counts().astype(int)
    noise = noise_distribution(counts.sum(0))
    model = SkipGram(6, 4).double()
    nn.init.normal_(model.words.weight)
    nn.init.normal_(model.neighbours.weight)
    pairs = torch.tensor([(w, c) for w in range(6) for c in range(6) for _ in range(counts[w, c])])
    pairs = pairs[: len(pairs) // 8 * 8][torch.randperm(len(pairs) // 8 * 8)]
    words, neighbours = pairs.view(-1, 8, 2).unbind(-1)
    draws = []
    with torch.no_grad():
        for _ in range(300):
            drawn = torch.multinomial(torch.tensor(noise), len(words) * 3, replacement=True)
            draws.append(model(words, neighbours, drawn.view(-1, 3)).item())
        scores = model.words.weight @ model.neighbours.weight.T
        full = np.zeros((6, 6))
        np.add.at(full, tuple(pairs.numpy().T), 1.0)
        want = expected_loss(scores, full, noise, 3).item()
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - want) < 5 * error  # a false alarm once in two million


def test_gradients_hold_the_rows_of_the_batch_only():
    model = SkipGram(50, 4)
    model(torch.tensor([[3, 4]]), torch.tensor([[5, 6]]), torch.tensor([[6, 7]])).backward()
    touched = {
        name: p.grad.coalesce().indices()[0].tolist() for name, p in model.named_parameters()
    }
    assert touched == {"words.weight": [3, 4], "neighbours.weight": [5, 6, 7]}


def test_pairs_are_what_two_loops_find():
    rng = np.random.default_rng(0)
    for window in (1, 2, 5):
        ids = rng.integers(-1, 4, size=30)
        want = Counter(
            (ids[i], ids[j]) for i in range(30) for j in range(30)
            if i != j and abs(i - j) <= window and ids[i] >= 0 and ids[j] >= 0
        )  # fmt: skip
        assert Counter(map(tuple, skip_gram_pairs(ids, window))) == want
    assert skip_gram_pairs(np.array([3]), window=2).shape == (0, 2)


def test_words_are_numbered_by_frequency_and_rare_ones_are_gaps():
    words, (a, b) = number_words([["x", "y", "y"], ["z", "y", "x"]], min_count=2)
    assert words == ["y", "x"]
    assert a.tolist() == [1, 0, 0] and b.tolist() == [-1, 0, 1]


def test_keep_and_noise_follow_their_formulas():
    counts = np.array([9_000, 900, 100])
    keep = keep_probability(counts, threshold=0.05)
    np.testing.assert_allclose(keep, [math.sqrt(0.05 / 0.9), math.sqrt(0.05 / 0.09), 1.0])
    noise = noise_distribution(counts)
    np.testing.assert_allclose(noise[0] / noise[1], 10**0.75)
    assert noise.sum() == pytest.approx(1)


def test_training_puts_words_with_equal_neighbours_side_by_side():
    rng = np.random.default_rng(1)
    ids = np.stack([rng.integers(0, 2, 6000), 2 + rng.integers(0, 2, 6000),
                    4 + rng.integers(0, 2, 6000)], 1).ravel()  # fmt: skip
    pairs, counts = skip_gram_pairs(ids, window=1), np.bincount(ids)
    model, losses = train_skip_gram(pairs, counts, d_model=8, epochs=8, learning_rate=0.002)
    vectors = model.words.weight.detach().numpy()
    for word in range(6):
        best, cosines = nearest(vectors, vectors[word], k=2)
        assert best[0] == word and best[1] == word ^ 1
        assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert losses[0] == pytest.approx(6 * math.log(2), rel=1e-3)
    again, _ = train_skip_gram(pairs, counts, d_model=8, epochs=8, learning_rate=0.002)
    assert torch.equal(model.words.weight, again.words.weight)


# Time


def test_a_carried_state_gives_what_one_long_row_gives():
    cell = LSTMCell(3, 5).double()
    projected = cell.input_proj(torch.randn(2, 9, 3, dtype=torch.float64))
    whole, last = unroll(cell, projected, cell.start(2))
    first, state = unroll(cell, projected[:, :4], cell.start(2))
    second, end = unroll(cell, projected[:, 4:], state)
    close(torch.cat([first, second], 1), whole)
    for one, other in zip(end, last, strict=True):
        close(one, other)


def test_chunks_continue_where_the_last_ones_stopped():
    ids = np.arange(100)
    chunks = list(islice(stream_chunks(ids, batch_size=3, seq_len=5), 7))
    for (inputs, targets, _), (later, _, anew) in pairwise(chunks):
        assert torch.equal(targets, inputs + 1)
        assert anew or torch.equal(later[:, 0], targets[:, -1])
    assert [anew for *_, anew in chunks] == [True] + [False] * 5 + [True]


def test_training_carries_the_state_and_stops_the_gradient(monkeypatch):
    seen = []

    class Spy(LSTMLanguageModel):
        def forward(self, input_ids, state=None):
            logits, new = super().forward(input_ids, state)
            seen.append((state, new))
            return logits, new

    train_language_model(Spy(3, 4), [TEXT], steps=4, batch_size=2, seq_len=8)
    assert seen[0][0] is None
    for (_, left), (taken, _) in pairwise(seen):
        for one, other in zip(left, taken, strict=True):
            assert torch.equal(one, other) and not other.requires_grad


def test_training_learns_to_start_from_nothing():
    """Every `carry` chunks: no state, and the begin token in place of the first byte."""
    seen = []

    class Spy(LSTMLanguageModel):
        def forward(self, input_ids, state=None):
            seen.append((input_ids, state))
            return super().forward(input_ids, state)

    train_language_model(Spy(3, 4), [TEXT], steps=7, batch_size=2, seq_len=8, carry=3)
    assert [state is None for _, state in seen] == [True, False, False] * 2 + [True]
    for ids, state in seen:
        assert bool((ids == 256).any()) == (state is None)
        assert state is not None or ids[:, 0].tolist() == [256, 256]


def test_training_learns_a_text_and_the_begin_token():
    model, text = LSTMLanguageModel(8, 32, max_seq_len=None), b"bcdefgha" * 3
    losses = train_language_model(model, [text] * 60, 150, 4, 16, learning_rate=0.02)
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    assert -model.log_probs(ids[None]).mean() < 0.2  # five seeds: 0.05 to 0.09
    assert model.sample("", 12, temperature=0.0) == "bcdefghabcde"
    assert model.sample("defghab", 4, temperature=0.0) == "cdef"


def test_training_stopped_early_is_the_beginning_of_the_whole_run():
    """The learning rate falls as in the whole run, not as in a shorter one."""
    losses = []
    for steps, stop_after in ((40, None), (40, 25), (40, 99), (25, None)):
        torch.manual_seed(0)
        model = LSTMLanguageModel(4, 8)
        losses.append(train_language_model(model, [TEXT], steps, 2, 8, stop_after=stop_after))
    whole, stopped, late, shorter = losses
    assert len(whole) == 40 and stopped == whole[:25] and late == whole and shorter != stopped


def test_log_probs_rows_are_singles_and_match_the_forward_pass():
    model = LSTMLanguageModel(4, 6)
    ids = np.random.default_rng(0).integers(0, 256, (3, 300))
    rows = model.log_probs(ids)
    assert isinstance(model, LanguageModel) and rows.dtype == np.float64 and rows.shape == (3, 300)
    for row, one in zip(rows, ids, strict=True):
        np.testing.assert_allclose(model.log_probs(one[None])[0], row, atol=1e-5)
    inputs = torch.tensor(np.hstack([np.full((3, 1), 256), ids[:, :-1]]))
    want = model(inputs)[0].log_softmax(-1).gather(-1, torch.tensor(ids)[..., None])[..., 0]
    np.testing.assert_allclose(rows, want.detach().numpy(), atol=1e-5)


def test_probabilities_of_the_next_byte_sum_to_one():
    model = LSTMLanguageModel(4, 6)
    rows = np.hstack([np.tile([[7, 9]], (256, 1)), np.arange(256)[:, None]])
    assert np.exp(model.log_probs(rows)[:, -1]).sum() == pytest.approx(1, abs=1e-5)


def test_no_byte_sees_a_later_one():
    model = LSTMLanguageModel(4, 6)
    ids = np.random.default_rng(0).integers(0, 256, (2, 20))
    changed = ids.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    np.testing.assert_array_equal(model.log_probs(ids)[:, :12], model.log_probs(changed)[:, :12])


def test_an_untrained_model_scores_eight_bits_and_windows_change_little():
    text = TEXT.decode()
    play = Play("p", "P", "comedy", "test", text, (Scene("1", "1", 0, len(TEXT)),))
    windowed = LSTMLanguageModel(4, 6, max_seq_len=64)
    assert score(windowed, [play]).bits_per_byte == pytest.approx(8, abs=0.3)
    whole = LSTMLanguageModel(4, 6, max_seq_len=None)
    whole.load_state_dict(windowed.state_dict())
    assert score(whole, [play]).bits_per_byte == pytest.approx(
        score(windowed, [play]).bits_per_byte, abs=1e-3
    )


def test_samples_follow_the_distribution():
    model = LSTMLanguageModel(4, 6)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-50.0)
        model.head.bias[65:68] = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    for temperature, weights in ((1.0, [0.5, 0.3, 0.2]), (0.5, [0.25, 0.09, 0.04])):
        text = model.sample("x", 1000, temperature=temperature, seed=1)
        got = np.array([text.count(c) for c in "ABC"])
        want = 1000 * np.array(weights) / sum(weights)
        assert ((got - want) ** 2 / want).sum() < 23  # chi-square, 2 degrees: once in 100,000
    assert model.sample("x", 5, temperature=0.0) == "AAAAA"
    assert model.sample("", 4, seed=2) == model.sample("", 4, seed=2)
    assert model.sample("", 0) == ""


# From sequence to sequence


def test_attention_weights_are_a_distribution_and_follow_their_formula():
    attention = AdditiveAttention(4).double()
    q, values = torch.randn(3, 4).double(), torch.randn(3, 5, 4).double()
    context, weights = attention(q, attention.k_proj(values), values)
    close(weights.sum(-1), torch.ones(3).double())
    for b in range(3):
        scores = [
            (
                attention.score.weight[0] * torch.tanh(attention.q_proj(q[b]) + attention.k_proj(v))
            ).sum()
            for v in values[b]
        ]
        want = torch.stack(scores).softmax(0)
        close(weights[b], want)
        close(context[b], want @ values[b])


@pytest.mark.parametrize("attention", [False, True])
def test_an_encoder_decoder_learns_to_reverse(attention):
    model = EncoderDecoder(5, 24, attention)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        source = torch.randint(5, (32, 3))
        logits, weights = model(source, source.flip(1))
        assert logits.shape == (32, 3, 5) and weights.shape == (32, 3, 3)
        loss = F.cross_entropy(logits.flatten(0, 1), source.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(5, (100, 3))
    free, weights = model(source, length=3)
    assert (free.argmax(-1) == source.flip(1)).all(1).float().mean() > 0.9
    close(weights.sum(-1), torch.full((100, 3), float(attention)), atol=1e-5)
    alone = torch.cat([model(row[None], length=3)[0] for row in source[:4]])
    close(free[:4], alone, atol=1e-4)


@pytest.mark.parametrize("attention", [False, True])
def test_a_target_symbol_is_predicted_from_those_before_it_only(attention):
    model = EncoderDecoder(5, 8, attention)
    source, target = torch.randint(5, (2, 4)), torch.randint(5, (2, 6))
    changed = target.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 5
    close(model(source, target)[0][:, :4], model(source, changed)[0][:, :4], atol=0)
    assert not torch.equal(model(source, target)[0][:, 4:], model(source, changed)[0][:, 4:])


# Bad input

BAD = {
    "no window": (lambda: skip_gram_pairs(np.array([1, 2]), 0), "window=0"),
    "no words": (lambda: number_words([["a"]], 2), "lower min_count"),
    "empty skip-gram": (lambda: SkipGram(0, 3), "n_words=0"),
    "too few pairs": (lambda: train_skip_gram(np.zeros((9, 2), int), np.ones(3, int)), "9 pairs"),
    "divergence": (
        lambda: train_skip_gram(
            np.random.default_rng(0).integers(0, 3, (8192, 2)), np.ones(3, int), learning_rate=1e30
        ),
        "lower learning_rate=1e\\+30",
    ),
    "no width": (lambda: LSTMCell(3, 0), "d_hidden=0"),
    "not projected": (
        lambda: unroll(LSTMCell(3, 2), torch.zeros(1, 4, 3), LSTMCell(3, 2).start(1)),
        "wanted \\[batch, seq >= 1, 8\\]",
    ),
    "no positions": (
        lambda: unroll(RNNCell(3, 2), torch.zeros(1, 0, 2), RNNCell(3, 2).start(1)),
        "seq >= 1",
    ),
    "cold": (lambda: LSTMLanguageModel(2, 2).sample("", 1, temperature=-1.0), "temperature=-1"),
    "fewer than none": (lambda: LSTMLanguageModel(2, 2).sample("", -1), "n_bytes=-1"),
    "short text": (lambda: next(stream_chunks(np.arange(9), 2, 5)), "9 ids for 2 streams"),
    "no streams": (lambda: next(stream_chunks(np.arange(9), 0, 5)), "0 streams"),
    "no target": (
        lambda: EncoderDecoder(3, 4, attention=True)(torch.zeros(1, 2, dtype=torch.int64)),
        "no target and length=0",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told(what):
    call, message = BAD[what]
    with pytest.raises((ConfigError, DataError), match=message):
        call()


def test_public_names_exist():
    assert all(hasattr(recurrent, name) for name in recurrent.__all__)
