"""Word vectors and recurrent networks, in the order chapter 04 explains them.

Three parts. *Words*: skip-gram with negative sampling turns a text into one vector a word. *Time*:
a cell reads a sequence one position after another and keeps a state (`RNNCell`, `LSTMCell`,
`unroll`); `LSTMLanguageModel` predicts bytes with it. *From sequence to sequence*: `EncoderDecoder`
squeezes a whole sequence into one state, or looks back at it through `AdditiveAttention`.

The half of a cell that reads the input does not depend on the state, so it is computed for all
positions at once, outside the loop. Only what must be done one after another is inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilm.errors import ConfigError, DataError
from minilm.measure import ByteTokenizer

__all__ = [
    "AdditiveAttention",
    "Cell",
    "EncoderDecoder",
    "LSTMCell",
    "LSTMLanguageModel",
    "RNNCell",
    "SkipGram",
    "keep_probability",
    "nearest",
    "noise_distribution",
    "number_words",
    "shifted_pmi",
    "skip_gram_pairs",
    "stream_chunks",
    "train_language_model",
    "train_skip_gram",
    "unroll",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
State: TypeAlias = tuple[Tensor, ...]

N_BYTES = 256
BEGIN = 256  # the id, no byte, that stands before a text


# Words


def number_words(texts: Sequence[Sequence[str]], min_count: int) -> tuple[list[str], list[Array]]:
    """Number the words of some texts, the most frequent first; -1 stands for rarer ones.

    Args:
        texts: Each a sequence of words.
        min_count: Words that occur less often than this get no number.

    Returns:
        The words in the order of their numbers, and for each text its numbers.

    Raises:
        DataError: If no word is frequent enough.

    Example:
        >>> words, (ids,) = number_words([["to", "be", "or", "not", "to", "be"]], min_count=2)
        >>> words, ids
        (['to', 'be'], array([ 0,  1, -1, -1,  0,  1]))
    """
    counts: dict[str, int] = {}
    for text in texts:
        for word in text:
            counts[word] = counts.get(word, 0) + 1
    words = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: -counts[w])
    if not words:
        raise DataError(f"no word occurs {min_count} times; lower min_count or pass more text")
    number = {word: i for i, word in enumerate(words)}
    return words, [np.array([number.get(word, -1) for word in text]) for text in texts]


def keep_probability(
    counts: Int[Array, " words"], threshold: float = 1e-4
) -> Float[Array, " words"]:
    """How often to keep each word: always, but for those above a share `threshold` of the text.

    Example:
        >>> keep_probability(np.array([9_600, 300, 100]), threshold=0.01).round(3)
        array([0.102, 0.577, 1.   ])

    Source:
        Mikolov et al. 2013, https://arxiv.org/abs/1310.4546
    """
    kept: Array = np.minimum(1.0, np.sqrt(threshold * counts.sum() / counts))
    return kept


def skip_gram_pairs(ids: Int[Array, " seq"], window: int) -> Int[Array, "pairs 2"]:
    """Every word with every neighbour at most `window` away; pairs with a gap (-1) are left out.

    Raises:
        ConfigError: If `window` is below 1.

    Example:
        >>> skip_gram_pairs(np.array([7, 8, -1, 9]), window=1)
        array([[7, 8],
               [8, 7]])
    """
    if window < 1:
        raise ConfigError(f"window={window}; a word needs at least 1 neighbour on each side")
    found = [np.empty((0, 2), dtype=ids.dtype)]
    for distance in range(1, min(window, len(ids) - 1) + 1):
        pairs = np.stack([ids[:-distance], ids[distance:]], axis=1)
        pairs = pairs[(pairs >= 0).all(axis=1)]
        found += [pairs, pairs[:, ::-1]]
    return np.concatenate(found)


def noise_distribution(counts: Int[Array, " words"], power: float = 0.75) -> Float[Array, " words"]:
    """The probability with which each word is drawn as noise: counts ** power, normalized.

    Example:
        >>> noise_distribution(np.array([16, 1])).round(3)
        array([0.889, 0.111])

    Source:
        Mikolov et al. 2013, https://arxiv.org/abs/1310.4546
    """
    weights = counts.astype(np.float64) ** power
    shares: Array = weights / weights.sum()
    return shares


class SkipGram(nn.Module):
    """Two vectors a word: one for when it is the word, one for when it is a neighbour.

    Gradients are sparse, so that a step touches only the rows of its batch. SGD takes them as they
    are; `torch.optim.Adam` does not.

    Args:
        n_words: Words in the vocabulary.
        d_model: Numbers in a vector.

    Raises:
        ConfigError: If a size is not positive.

    Source:
        Mikolov et al. 2013, https://arxiv.org/abs/1310.4546
    """

    def __init__(self, n_words: int, d_model: int) -> None:
        super().__init__()
        if min(n_words, d_model) < 1:
            raise ConfigError(f"n_words={n_words}, d_model={d_model}; wanted both at least 1")
        self.words = nn.Embedding(n_words, d_model, sparse=True)
        self.neighbours = nn.Embedding(n_words, d_model, sparse=True)
        nn.init.uniform_(self.words.weight, -0.5 / d_model, 0.5 / d_model)
        nn.init.zeros_(self.neighbours.weight)

    def forward(
        self,
        words: Int[Tensor, "groups pairs"],
        neighbours: Int[Tensor, "groups pairs"],
        noise: Int[Tensor, "groups noise"],
    ) -> Float[Tensor, ""]:
        """The loss, summed: tell each true neighbour from each noise word of its group."""
        w = self.words(words)
        true = (w * self.neighbours(neighbours)).sum(-1)  # [groups, pairs]
        false = w @ self.neighbours(noise).mT  # [groups, pairs, noise]
        return -F.logsigmoid(true).sum() - F.logsigmoid(-false).sum()


def train_skip_gram(
    pairs: Int[Array, "pairs 2"],
    counts: Int[Array, " words"],
    d_model: int = 64,
    n_noise: int = 5,
    epochs: int = 1,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> tuple[SkipGram, list[float]]:
    """Fit word vectors to pairs by gradient descent with negative sampling.

    A batch holds 64 groups of 32 pairs. The pairs of a group share their noise words: each still
    meets `n_noise` of them, and 32 times fewer vectors have to be fetched.

    Args:
        pairs: A word and its neighbour in each row.
        counts: How often each word occurs; decides the noise.
        d_model: Numbers in a vector.
        n_noise: Noise words for each true neighbour.
        epochs: Times each pair is seen.
        learning_rate: At the start; falls to zero in a straight line.
        seed: Of the initial vectors, the order and the noise.

    Returns:
        The model, and the loss for each batch as a mean over its pairs.

    Raises:
        DataError: If there are fewer pairs than one batch holds.
        ConfigError: If the loss grows out of bounds.
    """
    groups, size = 64, 32
    steps_per_epoch = len(pairs) // (groups * size)
    if not steps_per_epoch:
        raise DataError(f"{len(pairs)} pairs; wanted at least {groups * size}, one batch")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = SkipGram(len(counts), d_model)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    table, q = torch.from_numpy(pairs), torch.from_numpy(noise_distribution(counts))
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * groups * size : (step + 1) * groups * size]
            words, neighbours = table[chosen].view(groups, size, 2).unbind(-1)
            noise = torch.multinomial(q, groups * n_noise, replacement=True, generator=generator)
            loss = model(words, neighbours, noise.view(groups, n_noise))
            left = 1 - len(losses) / (epochs * steps_per_epoch)
            optimizer.param_groups[0]["lr"] = learning_rate * left
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / (groups * size))
        if not np.isfinite(losses[-1]):
            raise ConfigError(f"the loss is {losses[-1]}; lower learning_rate={learning_rate}")
    return model, losses


def nearest(
    vectors: Float[Array, "words d_model"], query: Float[Array, " d_model"], k: int
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """The k rows whose directions are closest to the query's, and their cosines, best first.

    Example:
        >>> nearest(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), np.array([1.0, 0.1]), k=2)[0]
        array([0, 2])
    """
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    cosines = vectors @ query / np.maximum(lengths, 1e-12)
    best = np.argsort(-cosines, kind="stable")[:k]
    return best, cosines[best]


def shifted_pmi(
    pair_counts: Float[Array, "words neighbours"], noise: Float[Array, " neighbours"], n_noise: int
) -> Float[Array, "words neighbours"]:
    """The dot products at which the skip-gram loss is smallest; -inf where a pair never occurs.

    It is ln(p(neighbour | word) / noise(neighbour)) - ln(n_noise). With the noise drawn as the
    neighbours occur, the first part is their pointwise mutual information.

    Source:
        Levy & Goldberg 2014, https://papers.nips.cc/paper/5477
    """
    expected = n_noise * pair_counts.sum(axis=1, keepdims=True) * noise
    with np.errstate(divide="ignore"):
        scores: Array = np.log(pair_counts) - np.log(expected)
    return scores


# Time


class Cell(nn.Module):
    """What recurrent cells share: a projection of the input, one of the state, a first state.

    Args:
        d_input: Width of an input.
        d_hidden: Width of the state.

    Raises:
        ConfigError: If a width is not positive.
    """

    n_gates: int  # blocks of d_hidden that are computed from input and state
    n_states: int  # tensors in the state; the first one is the output

    def __init__(self, d_input: int, d_hidden: int) -> None:
        super().__init__()
        if min(d_input, d_hidden) < 1:
            raise ConfigError(f"d_input={d_input}, d_hidden={d_hidden}; wanted both at least 1")
        self.d_hidden = d_hidden
        self.input_proj = nn.Linear(d_input, self.n_gates * d_hidden)
        self.state_proj = nn.Linear(d_hidden, self.n_gates * d_hidden, bias=False)
        nn.init.zeros_(self.input_proj.bias)

    def start(self, batch: int) -> State:
        """A state of zeros."""
        zeros = self.state_proj.weight.new_zeros(batch, self.d_hidden)
        return (zeros,) * self.n_states


class RNNCell(Cell):
    """The plain recurrent network: the new state is tanh of a sum of input and old state.

    Source:
        Elman 1990, https://doi.org/10.1207/s15516709cog1402_1
    """

    n_gates, n_states = 1, 1

    def forward(self, projected: Float[Tensor, "batch gates"], state: State) -> State:
        """One step: the projected input of one position and a state in, the next state out."""
        (h,) = state
        return (torch.tanh(projected + self.state_proj(h)),)


class LSTMCell(Cell):
    """Long short-term memory: a memory that is added to, and gates that open and close.

    The gates stand in PyTorch's order (input, forget, candidate, output). The bias of the forget
    gate starts at 1, so that a new cell remembers.

    Source:
        Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; forget gate:
        Gers et al. 2000, https://doi.org/10.1162/089976600300015015
    """

    n_gates, n_states = 4, 2

    def __init__(self, d_input: int, d_hidden: int) -> None:
        super().__init__(d_input, d_hidden)
        with torch.no_grad():
            self.input_proj.bias[d_hidden : 2 * d_hidden] = 1.0

    def forward(self, projected: Float[Tensor, "batch gates"], state: State) -> State:
        """One step: the projected input of one position and a state in, the next state out."""
        h, c = state
        i, f, g, o = (projected + self.state_proj(h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def unroll(
    cell: Cell, projected: Float[Tensor, "batch seq gates"], state: State
) -> tuple[Float[Tensor, "batch seq d_hidden"], State]:
    """Walk a cell along a sequence: the loop that no second core can share.

    Args:
        cell: An `RNNCell` or an `LSTMCell`.
        projected: The inputs after `cell.input_proj`.
        state: Where to start, such as `cell.start(batch)` or the last state of an earlier call.

    Returns:
        The output at each position, and the last state.

    Raises:
        ConfigError: If there is no position, or the last axis is not what the cell computes.
    """
    wanted = cell.n_gates * cell.d_hidden
    if projected.shape[1] == 0 or projected.shape[2] != wanted:
        raise ConfigError(
            f"projected has shape {tuple(projected.shape)}, wanted [batch, seq >= 1, {wanted}]; "
            "pass cell.input_proj(inputs)"
        )
    outputs = []
    for x in projected.unbind(dim=1):
        state = cell(x, state)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


# A language model


class LSTMLanguageModel(nn.Module):
    """Predict the next byte from the state of an LSTM.

    The loop over time is PyTorch's: equal to `unroll` of an `LSTMCell`, and faster.

    Args:
        d_embed: Width of a byte's embedding.
        d_hidden: Width of the state.
        max_seq_len: The window in which `minilm.measure.score` reads. The model itself takes rows
            of any length; windows can be read side by side, a whole play only step after step.

    Attributes:
        tokenizer: Bytes, one id each.

    Raises:
        ConfigError: If a width is not positive.

    Example:
        >>> model = LSTMLanguageModel(d_embed=4, d_hidden=8)
        >>> model.log_probs(np.array([[72, 105]])).shape
        (1, 2)
    """

    def __init__(
        self, d_embed: int = 64, d_hidden: int = 256, max_seq_len: int | None = 512
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_seq_len = ByteTokenizer(), max_seq_len
        self.embedding = nn.Embedding(N_BYTES + 1, d_embed)
        self.lstm = nn.LSTM(d_embed, d_hidden, batch_first=True)
        self.head = nn.Linear(d_hidden, N_BYTES)
        with torch.no_grad():  # as in LSTMCell: begin by remembering
            self.lstm.get_parameter("bias_ih_l0")[d_hidden : 2 * d_hidden] = 1.0

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq vocab"], State]:
        """The logits of the byte after each input, and the state to go on from."""
        outputs, state = self.lstm(self.embedding(input_ids), state)
        return self.head(outputs), state

    @torch.no_grad()
    def log_probs(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
        """Return ln p(id | the ids before it in its row) for each id."""
        targets = torch.from_numpy(ids).to(self.embedding.weight.device, torch.int64)
        inputs = F.pad(targets, (1, 0), value=BEGIN)[:, :-1]
        log_p = self(inputs)[0].log_softmax(-1)
        picked: Array = log_p.gather(-1, targets[..., None])[..., 0].double().cpu().numpy()
        return picked

    @torch.no_grad()
    def sample(self, prompt: str, n_bytes: int, temperature: float = 1.0, seed: int = 0) -> str:
        """Continue a prompt byte by byte, each drawn from the model's distribution.

        Args:
            prompt: The text so far; may be empty.
            n_bytes: How many bytes to add.
            temperature: Below 1 prefers the probable, above 1 evens out; 0 always takes the most
                probable byte.
            seed: Equal seeds give equal texts.

        Returns:
            The continuation, without the prompt. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            ConfigError: If `temperature` or `n_bytes` is negative.
        """
        if n_bytes < 0 or temperature < 0:
            got = f"n_bytes={n_bytes}, temperature={temperature}"
            raise ConfigError(f"{got}; neither may be below 0")
        generator = torch.Generator().manual_seed(seed)
        new, state = [BEGIN, *self.tokenizer.encode(prompt)], None
        result: list[int] = []
        for _ in range(n_bytes):
            logits, state = self(torch.tensor([new], device=self.embedding.weight.device), state)
            last = logits[0, -1].cpu()
            if temperature == 0:
                new = [int(last.argmax())]
            else:
                p = (last / temperature).softmax(-1)
                new = [int(torch.multinomial(p, 1, generator=generator))]
            result += new
        return self.tokenizer.decode(result)


def stream_chunks(
    ids: Int[Array, " n"], batch_size: int, seq_len: int
) -> Iterator[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], bool]]:
    """Cut a text into `batch_size` streams and read them side by side, again and again.

    Row r of each chunk goes on where row r of the chunk before it stopped: what truncated
    backpropagation through time needs to carry its state.

    Yields:
        Inputs, targets (the inputs moved by one), and whether the streams begin anew here.

    Raises:
        DataError: If the text is too short for one chunk.

    Example:
        >>> chunks = stream_chunks(np.arange(9), batch_size=2, seq_len=2)
        >>> [next(chunks)[0].tolist() for _ in range(3)]
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[0, 1], [4, 5]]]
    """
    length = (len(ids) - 1) // batch_size if batch_size > 0 else 0
    if seq_len < 1 or length < seq_len:
        raise DataError(
            f"{len(ids)} ids for {batch_size} streams of at least {seq_len} (and one more); "
            "take fewer or shorter streams, at least one of each"
        )
    text = torch.from_numpy(ids.astype(np.int64))
    inputs = text[: batch_size * length].view(batch_size, length)
    targets = text[1 : batch_size * length + 1].view(batch_size, length)
    while True:
        for start in range(0, length - seq_len + 1, seq_len):
            part = slice(start, start + seq_len)
            yield inputs[:, part], targets[:, part], start == 0


def train_language_model(
    model: LSTMLanguageModel,
    texts: Sequence[bytes],
    steps: int,
    batch_size: int = 32,
    seq_len: int = 32,
    learning_rate: float = 0.005,
    carry: int = 16,
    stop_after: int | None = None,
) -> list[float]:
    """Train by truncated backpropagation through time: the state goes on, the gradient stops.

    Adam, warm-up over 30 steps, then down to zero in a straight line; gradients clipped at norm 1.

    Args:
        model: Changed in place.
        texts: Each is read with the begin token before it.
        steps: Optimizer steps.
        batch_size: Streams read side by side.
        seq_len: Positions the gradient flows back at most.
        learning_rate: The highest.
        carry: Chunks through which a state is carried. Then the model begins anew, with the begin
            token and no state, so that it learns how to start.
        stop_after: Take only the first so many steps of the run.

    Returns:
        The loss of each step in nats per byte.
    """
    parts = [np.append(BEGIN, np.frombuffer(text, np.uint8).astype(np.int64)) for text in texts]
    chunks = stream_chunks(np.concatenate(parts), batch_size, seq_len)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.99))
    device, losses = model.embedding.weight.device, []
    state: State | None = None
    for step in range(steps if stop_after is None else min(stop_after, steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / 30, 1 - step / steps)
        inputs, targets, anew = next(chunks)
        if anew or step % carry == 0:
            state, inputs = None, F.pad(inputs[:, 1:], (1, 0), value=BEGIN)
        logits, state = model(inputs.to(device), state)
        state = tuple(s.detach() for s in state)
        loss = F.cross_entropy(  # the begin token is never predicted
            logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=BEGIN
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


# From sequence to sequence


class AdditiveAttention(nn.Module):
    """Look back at a sequence: a small network scores each position, softmax makes weights.

    Args:
        d_model: Width of the query, of each position, and of the network between them.

    Source:
        Bahdanau et al. 2014, https://arxiv.org/abs/1409.0473
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.score = nn.Linear(d_model, 1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "batch d_model"],
        keys: Float[Tensor, "batch seq d_model"],
        values: Float[Tensor, "batch seq d_model"],
    ) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch seq"]]:
        """The weighted mean of the values, and the weights; `keys` are `k_proj(values)`."""
        scores = self.score(torch.tanh(self.q_proj(query)[:, None] + keys))[..., 0]
        weights = scores.softmax(dim=-1)
        return (weights[:, None] @ values)[:, 0], weights


class EncoderDecoder(nn.Module):
    """Read one sequence with an LSTM, write another with a second LSTM.

    Without attention the last state of the encoder is all that the decoder gets to know. With it,
    the decoder looks at every position of the source before each symbol that it writes.

    Args:
        vocab_size: Symbols of source and target. One more, `vocab_size`, begins each target.
        d_model: Width of embeddings and states.
        attention: Whether the decoder may look back.

    Source:
        Sutskever et al. 2014, https://arxiv.org/abs/1409.3215; with attention: Bahdanau et al.
        2014, https://arxiv.org/abs/1409.0473
    """

    def __init__(self, vocab_size: int, d_model: int, attention: bool) -> None:
        super().__init__()
        self.begin = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, d_model)
        self.encoder = LSTMCell(d_model, d_model)
        self.decoder = LSTMCell(2 * d_model if attention else d_model, d_model)
        self.attention = AdditiveAttention(d_model) if attention else None
        self.head = nn.Linear(2 * d_model if attention else d_model, vocab_size)

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch target"] | None = None,
        length: int = 0,
    ) -> tuple[Float[Tensor, "batch target vocab"], Float[Tensor, "batch target source"]]:
        """The logits of each target symbol given those before it, and the attention weights.

        Args:
            source: Rows of equal length.
            target: What to write; each symbol is predicted from the true ones before it. Left out,
                the model goes on from its own most probable symbols.
            length: How many symbols to write when there is no target.

        Raises:
            ConfigError: If there is neither a target nor a length.
        """
        if target is None and length < 1:
            raise ConfigError("no target and length=0; pass the target, or how many to write")
        inputs = self.encoder.input_proj(self.embedding(source))
        memory, state = unroll(self.encoder, inputs, self.encoder.start(len(source)))
        keys = self.attention.k_proj(memory) if self.attention else memory
        weights = memory.new_zeros(source.shape)
        last = torch.full_like(source[:, 0], self.begin)
        logits, looks = [], []
        for step in range(length if target is None else target.shape[1]):
            x = self.embedding(last)
            if self.attention:
                context, weights = self.attention(state[0], keys, memory)
                x = torch.cat([x, context], dim=-1)
            state = self.decoder(self.decoder.input_proj(x), state)
            seen = torch.cat([state[0], context], dim=-1) if self.attention else state[0]
            logits.append(self.head(seen))
            looks.append(weights)
            last = logits[-1].argmax(-1) if target is None else target[:, step]
        return torch.stack(logits, dim=1), torch.stack(looks, dim=1)
