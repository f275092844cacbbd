"""Questions of chapter 04: the size of a cell, its step, negative samples, streams, reach."""

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Pair: TypeAlias = tuple[Any, Array]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# predict: the numbers in an LSTM cell


def lstm_parameters(d_input: int, d_hidden: int) -> int:
    return 4 * d_hidden * (d_input + d_hidden + 1)


def widths(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    yield 1, 1
    for _ in range(4):
        d_input, d_hidden = rng.integers(2, 60, size=2)
        yield int(d_input), int(d_hidden)


# implement: one step of an LSTM


def lstm_step(x: Array, h: Array, c: Array, w: Array, u: Array, b: Array) -> tuple[Array, Array]:
    i, f, g, o = np.split(x @ w + h @ u + b, 4, axis=-1)
    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(new), new


def steps(rng: np.random.Generator) -> Iterator[tuple[Array, ...]]:
    for batch, d_input, d_hidden in ((1, 1, 1), (3, 4, 2), (2, 3, 3)):
        shapes: tuple[tuple[int, ...], ...] = (
            (batch, d_input),
            (batch, d_hidden),
            (batch, d_hidden),
            (d_input, 4 * d_hidden),
            (d_hidden, 4 * d_hidden),
            (4 * d_hidden,),
        )
        yield tuple(rng.standard_normal(shape) for shape in shapes)


def gates(x: Array, h: Array, w: Array, u: Array, b: Array) -> list[Array]:
    return np.split(x @ w + h @ u + b, 4, axis=-1)


def other_order(x: Array, h: Array, c: Array, w: Array, u: Array, b: Array) -> tuple[Array, Array]:
    f, i, g, o = gates(x, h, w, u, b)
    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(new), new


def candidate_without_tanh(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    i, f, g, o = gates(x, h, w, u, b)
    new = sigmoid(f) * c + sigmoid(i) * sigmoid(g)
    return sigmoid(o) * np.tanh(new), new


def shows_old_memory(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    return sigmoid(gates(x, h, w, u, b)[3]) * np.tanh(c), lstm_step(x, h, c, w, u, b)[1]


def shows_raw_memory(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    new = lstm_step(x, h, c, w, u, b)[1]
    return sigmoid(gates(x, h, w, u, b)[3]) * new, new


def one_minus_forget(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    i, f, g, o = gates(x, h, w, u, b)
    new = (1 - sigmoid(f)) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(new), new


def output_before_candidate(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    i, f, o, g = gates(x, h, w, u, b)
    new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(new), new


def raw_candidate(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    i, f, g, o = gates(x, h, w, u, b)
    new = sigmoid(f) * c + sigmoid(i) * g
    return sigmoid(o) * np.tanh(new), new


def gates_without_sigmoid(
    x: Array, h: Array, c: Array, w: Array, u: Array, b: Array
) -> tuple[Array, Array]:
    i, f, g, o = gates(x, h, w, u, b)
    new = f * c + i * np.tanh(g)
    return o * np.tanh(new), new


# implement: the gradient of negative sampling


def negative_sampling(u: Array, v: Array, noise: Array) -> Pair:
    true, false = u @ v, noise @ u
    loss = np.logaddexp(0, -true) + np.logaddexp(0, false).sum()
    return loss, (sigmoid(true) - 1) * v + sigmoid(false) @ noise


def word_and_noise(rng: np.random.Generator) -> Iterator[tuple[Array, ...]]:
    for d_model, n_noise in ((3, 2), (1, 1), (4, 5)):
        yield tuple(rng.standard_normal(s) for s in ((d_model,), (d_model,), (n_noise, d_model)))
    yield np.zeros(3), np.ones(3), np.ones((2, 3))


def noise_pulled_closer(u: Array, v: Array, noise: Array) -> Pair:
    true, false = u @ v, noise @ u
    loss = np.logaddexp(0, -true) + np.logaddexp(0, -false).sum()
    return loss, (sigmoid(true) - 1) * v + (sigmoid(false) - 1) @ noise


def mean_of_noise(u: Array, v: Array, noise: Array) -> Pair:
    true, false = u @ v, noise @ u
    loss = np.logaddexp(0, -true) + np.logaddexp(0, false).mean()
    return loss, (sigmoid(true) - 1) * v + sigmoid(false) @ noise / len(noise)


def noise_pushes_the_wrong_way(u: Array, v: Array, noise: Array) -> Pair:
    true, false = u @ v, noise @ u
    return negative_sampling(u, v, noise)[0], (sigmoid(true) - 1) * v - sigmoid(false) @ noise


def one_score_for_all_noise(u: Array, v: Array, noise: Array) -> Pair:
    return negative_sampling(u, v, noise.sum(axis=0, keepdims=True))


def full_softmax(u: Array, v: Array, noise: Array) -> Pair:
    scores = np.append(u @ v, noise @ u)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return -np.log(p[0]), (p[0] - 1) * v + p[1:] @ noise


# debug: streams that do not go on


def streams(ids: Array, batch: int, seq: int) -> tuple[Array, Array]:
    length = (len(ids) - 1) // batch // seq * seq
    stride = (len(ids) - 1) // batch
    places = (
        np.arange(length // seq)[:, None, None] * seq
        + np.arange(batch)[None, :, None] * stride
        + np.arange(seq)
    )
    return ids[places], ids[places + 1]


def texts(rng: np.random.Generator) -> Iterator[tuple[Array, int, int]]:
    for n, batch, seq in ((25, 2, 3), (31, 3, 2), (13, 1, 4), (20, 2, 3), (14, 1, 5)):
        yield rng.permutation(n), batch, seq


def rows_go_on(answer: Any, rng: np.random.Generator) -> str | None:
    """With a rest, the next row may begin after the chunks or after the rest: both are right."""
    ids, told = rng.permutation(60), "With 60 ids in 3 rows and chunks of 4,"
    inputs, targets = (np.asarray(part) for part in answer(ids.copy(), 3, 4))
    if inputs.shape != (4, 3, 4) or targets.shape != (4, 3, 4):
        return f"{told} your shapes are {inputs.shape}, {targets.shape}; wanted (4, 3, 4) twice."
    after = dict(itertools.pairwise(ids.tolist()))
    if [after.get(one) for one in inputs.ravel().tolist()] != targets.ravel().tolist():
        return f"{told} some of your targets are not the id that follows their input."
    if not np.array_equal(inputs[1:, :, 0], targets[:-1, :, -1]):
        return f"{told} your row r does not go on where row r of the chunk before stopped."
    if len(np.unique(inputs)) != inputs.size:
        return f"{told} your rows read some ids twice."
    return None


def chunks_in_order(ids: Array, batch: int, seq: int) -> tuple[Array, Array]:
    n = (len(ids) - 1) // (batch * seq)
    inputs = ids[: n * batch * seq].reshape(n, batch, seq)
    targets = ids[1 : n * batch * seq + 1].reshape(n, batch, seq)
    return inputs, targets


def rows_not_swapped(ids: Array, batch: int, seq: int) -> tuple[Array, ...]:
    return tuple(np.swapaxes(part, 0, 1) for part in streams(ids, batch, seq))


def neighbours_side_by_side(ids: Array, batch: int, seq: int) -> tuple[Array, ...]:
    length = (len(ids) - 1) // batch
    both = (part[: batch * length].reshape(length, batch) for part in (ids[:-1], ids[1:]))
    return tuple(
        part[: length // seq * seq].reshape(-1, seq, batch).swapaxes(1, 2) for part in both
    )


def rolled(ids: Array, batch: int, seq: int) -> tuple[Array, Array]:
    inputs, _ = streams(ids, batch, seq)
    return inputs, np.roll(inputs, -1, axis=2)


# measure: what is left of a gradient after 50 steps


REACH = float(sigmoid(3.0) ** 50)


def one_number(answer: Any) -> Any:
    """A state of shape (1, 1), as `lstm_step` returns it, is as good as the number in it."""
    value = answer() if callable(answer) else answer
    return value.item() if isinstance(value, np.ndarray) and value.shape == (1, 1) else value


QUESTIONS = (
    Predict(
        "recurrent.lstm_parameters",
        points=1,
        reference=lstm_parameters,
        cases=widths,
        factor=1.001,
        note="At d_input = 64 and d_hidden = 192 the state's part is three quarters of it.",
        mistakes=(
            Mistake(
                "one block",
                lambda d_input, d_hidden: d_hidden * (d_input + d_hidden + 1),
                "That is a plain RNN; an LSTM computes four blocks: three gates and a candidate.",
            ),
            Mistake(
                "two biases",
                lambda d_input, d_hidden: 4 * d_hidden * (d_input + d_hidden + 2),
                "You count two biases, as in PyTorch; the chapter's cell has one.",
            ),
            Mistake(
                "no bias",
                lambda d_input, d_hidden: 4 * d_hidden * (d_input + d_hidden),
                "The bias is missing.",
            ),
            Mistake(
                "no state",
                lambda d_input, d_hidden: 4 * d_hidden * (d_input + 1),
                "The weights that read the old state are missing.",
            ),
            Mistake(
                "three blocks",
                lambda d_input, d_hidden: 3 * d_hidden * (d_input + d_hidden + 1),
                "You count the three gates; what they let in, the candidate, has weights too.",
            ),
        ),
    ),
    Implement(
        "recurrent.lstm_step",
        points=3,
        reference=lstm_step,
        forbid=("recurrent.LSTMCell", "recurrent.unroll"),
        cases=steps,
        mistakes=(
            Mistake(
                "gates in another order",
                other_order,
                "Your input and forget gates are exchanged: the order is i, f, g, o.",
            ),
            Mistake(
                "sigmoid of the candidate",
                candidate_without_tanh,
                "Your candidate goes through a sigmoid, so the memory can only be added to "
                "upwards: it needs both signs.",
            ),
            Mistake(
                "old memory shown",
                shows_old_memory,
                "Your output shows the memory from before this step.",
            ),
            Mistake(
                "memory shown raw",
                shows_raw_memory,
                "Your output lacks the tanh around the memory.",
            ),
            Mistake(
                "forget gate upside down",
                one_minus_forget,
                "Your forget gate works upside down: 1 must mean keep.",
            ),
            Mistake(
                "output gate before the candidate",
                output_before_candidate,
                "Your candidate and output gate are exchanged: the order is i, f, g, o.",
            ),
            Mistake(
                "raw candidate",
                raw_candidate,
                "Your candidate lacks its tanh, so one step could write any amount.",
            ),
            Mistake(
                "gates without sigmoid",
                gates_without_sigmoid,
                "Your gates lack their sigmoid: a gate is a share between 0 and 1.",
            ),
            Mistake(
                "returned in the other order",
                lambda x, h, c, w, u, b: lstm_step(x, h, c, w, u, b)[::-1],
                "You return the memory first; wanted the output h, then the memory c.",
            ),
            Mistake(
                "no old state",
                lambda x, h, c, w, u, b: lstm_step(x, 0 * h, c, w, u, b),
                "Your gates do not read the old output h.",
            ),
            Mistake(
                "no bias",
                lambda x, h, c, w, u, b: lstm_step(x, h, c, w, u, 0 * b),
                "The bias is missing from your gates.",
            ),
        ),
    ),
    Implement(
        "recurrent.negative_sampling",
        points=3,
        reference=negative_sampling,
        forbid=("recurrent.SkipGram",),
        cases=word_and_noise,
        mistakes=(
            Mistake(
                "noise pulled closer",
                noise_pulled_closer,
                "You treat noise words as true neighbours: their score must be pushed down.",
            ),
            Mistake(
                "mean over noise",
                mean_of_noise,
                "You average over the noise words; each is a question of its own, so they add up.",
            ),
            Mistake(
                "mean over all questions",
                lambda u, v, noise: tuple(
                    part / (1 + len(noise)) for part in negative_sampling(u, v, noise)
                ),
                "You average over all the questions; wanted is their sum.",
            ),
            Mistake(
                "one score for all noise",
                one_score_for_all_noise,
                "You add up the noise vectors first; each noise word has a score, and a sigmoid, "
                "of its own.",
            ),
            Mistake(
                "gradient pulls noise closer",
                noise_pushes_the_wrong_way,
                "Your loss is right, but in the gradient the noise has the wrong sign: a step "
                "downhill would pull the noise closer.",
            ),
            Mistake(
                "gradient without noise",
                lambda u, v, noise: (
                    negative_sampling(u, v, noise)[0],
                    (sigmoid(u @ v) - 1) * v,
                ),
                "Your loss is right, but the noise words are missing from the gradient.",
            ),
            Mistake(
                "softmax",
                full_softmax,
                "That is a softmax over neighbour and noise; negative sampling asks independent "
                "yes-or-no questions.",
            ),
            Mistake(
                "no noise",
                lambda u, v, noise: negative_sampling(u, v, noise[:0]),
                "The noise words are missing: without them all vectors grow towards each other.",
            ),
            Mistake(
                "ascent",
                lambda u, v, noise: (
                    negative_sampling(u, v, noise)[0],
                    -negative_sampling(u, v, noise)[1],
                ),
                "Your gradient has the wrong sign: it points downhill.",
            ),
            Mistake(
                "only the first noise word",
                lambda u, v, noise: negative_sampling(u, v, noise[:1]),
                "Only the first noise word enters your loss.",
            ),
            Mistake(
                "gradient of the neighbour",
                lambda u, v, noise: (
                    negative_sampling(u, v, noise)[0],
                    (sigmoid(u @ v) - 1) * u + sigmoid(noise @ u).sum() * u,
                ),
                "You differentiate with respect to the neighbours; wanted that of the word u.",
            ),
        ),
    ),
    Debug(
        "recurrent.streams",
        points=3,
        reference=streams,
        forbid=("recurrent.stream_chunks",),
        cases=texts,
        probes=(rows_go_on,),
        mistakes=(
            Mistake(
                "chunks in order",
                chunks_in_order,
                "Row r of a batch does not go on where row r of the batch before stopped, so the "
                "carried state belongs to other text.",
            ),
            Mistake(
                "row before chunk",
                rows_not_swapped,
                "Your axes are (row, chunk, seq); wanted (chunk, row, seq): the first axis is what "
                "the training loop walks along.",
            ),
            Mistake(
                "neighbours side by side",
                neighbours_side_by_side,
                "Your rows skip: ids that stand next to each other in the text stand in different "
                "rows.",
            ),
            Mistake(
                "rolled targets",
                rolled,
                "The last target of each row is the row's own first id: the text goes on beyond "
                "the chunk.",
            ),
            Mistake(
                "target = input",
                lambda ids, batch, seq: (streams(ids, batch, seq)[0],) * 2,
                "Your targets are the inputs: the model would learn to copy.",
            ),
            Mistake(
                "moved by two",
                lambda ids, batch, seq: (
                    streams(ids, batch, seq)[0],
                    np.append(ids, ids)[2:][np.argsort(ids)][streams(ids, batch, seq)[0]],
                ),
                "Your targets are moved by two.",
            ),
            Mistake(
                "inputs and targets exchanged",
                lambda ids, batch, seq: streams(ids, batch, seq)[::-1],
                "Your inputs are the later ones: the model would predict the past.",
            ),
            Mistake(
                "batch and time exchanged",
                lambda ids, batch, seq: tuple(
                    np.swapaxes(part, 1, 2) for part in streams(ids, batch, seq)
                ),
                "Your axes are (chunk, seq, batch); wanted (chunk, batch, seq).",
            ),
        ),
    ),
    Measure(
        "recurrent.reach",
        points=2,
        reference=REACH,
        run=one_number,
        mistakes=(
            Mistake(
                "49 steps",
                float(sigmoid(3.0) ** 49),
                "That is the factor of 49 steps; from c_0 to c_50 there are 50.",
            ),
            Mistake(
                "one step",
                float(sigmoid(3.0)),
                "That is the factor of one step.",
            ),
            Mistake(
                "forget bias 1",
                float(sigmoid(1.0) ** 50),
                "That is what a forget bias of 1 leaves; the question has 3.",
            ),
            Mistake("no gate", 1.0, "The forget gate is below 1, so something is lost each step."),
        ),
    ),
    Choose(
        "recurrent.why_it_copies",
        points=1,
        right="c",
        because="Moving the target by one position is the whole difference.",
        wrong={
            "a": "More text does not help: each answer still stands in its own question.",
            "b": "The shape of a row is no obstacle; the same padded rows work with other targets.",
            "d": "Greedy choice makes a text dull; it does not make a model repeat its input.",
        },
    ),
)
