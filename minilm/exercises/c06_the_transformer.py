"""Questions of chapter 06: parameters, norms, targets, the stream, and how far a stack reads."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Function: TypeAlias = Callable[[Array], Array]


# predict: the parameters of a Llama with tied embeddings


def parameters(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int
) -> int:
    attention = 2 * d * heads * head_dim + 2 * d * kv_heads * head_dim
    return vocab * d + layers * (attention + 3 * d * d_ff + 2 * d) + d


def sizes(rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    yield 49_152, 576, 30, 9, 3, 64, 1536  # SmolLM2-135M
    for _ in range(4):
        kv_heads, group = (int(n) for n in rng.integers(2, 5, size=2))
        d, layers, d_ff = 64 * int(rng.integers(4, 9)), int(rng.integers(4, 9)), 500
        yield 3000, d, layers, kv_heads * group, kv_heads, 48, d_ff + d


def changed(**change: float) -> Callable[..., int]:
    """`parameters`, with one of its terms taken a number of times."""
    terms = {"embedding": 1.0, "q_o": 1.0, "k_v": 1.0, "feed_forward": 3.0}
    terms |= {"norms": 2.0, "last_norm": 1.0, "biases": 0.0} | change

    def wrong(
        vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int
    ) -> int:
        block = terms["q_o"] * 2 * d * heads * head_dim + terms["k_v"] * 2 * d * kv_heads * head_dim
        block += terms["feed_forward"] * d * d_ff + terms["norms"] * d
        block += terms["biases"] * ((heads + 2 * kv_heads) * head_dim + 2 * d_ff + 2 * d)
        return round(terms["embedding"] * vocab * d + layers * block + terms["last_norm"] * d)

    return wrong


def multi_head(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int
) -> int:
    return parameters(vocab, d, layers, heads, heads, head_dim, d_ff)


def divided_width(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int
) -> int:
    wide = 2 * d * d + 2 * d * d * kv_heads // heads
    return vocab * d + layers * (wide + 3 * d * d_ff + 2 * d) + d


def one_layer(
    vocab: int, d: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int
) -> int:
    return parameters(vocab, d, 1, heads, kv_heads, head_dim, d_ff)


# implement: RMS norm


def rms(x: Array, gain: Array, eps: float) -> Array:
    out: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gain
    return out


def activations(rng: np.random.Generator) -> Iterator[tuple[Array, Array, float]]:
    for shape in ((3, 5, 4), (4, 4), (1, 1, 3), (2, 6), (5,)):
        x = rng.normal(0.7, 2.0, size=shape)
        yield x, rng.normal(1.0, 0.5, size=shape[-1]), 0.1
    yield np.zeros((2, 3)), np.ones(3), 1e-5


# implement: the loss of a padded batch


def loss_of_rows(logits: Array, ids: Array, lengths: Array) -> float:
    top = logits - logits.max(axis=-1, keepdims=True)
    log_p = top - np.log(np.exp(top).sum(axis=-1, keepdims=True))
    total, n = 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length - 1):
            total -= log_p[row, t, ids[row, t + 1]]
            n += 1
    return float(total / n)


def surprises(logits: Array, ids: Array, ahead: int = 1) -> Array:
    """-ln p(ids[t + ahead]) under logits[t]; 0 where there is no such id."""
    top = logits - logits.max(axis=-1, keepdims=True)
    log_p = top - np.log(np.exp(top).sum(axis=-1, keepdims=True))
    out = np.zeros(ids.shape)
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if 0 <= t + ahead < ids.shape[1]:
                out[row, t] = -log_p[row, t, ids[row, t + ahead]]
    return out


def counts(ids: Array, lengths: Array, first: int = 0, less: int = 1) -> Array:
    places = np.arange(ids.shape[1])
    out: Array = (places >= first) & (places < np.asarray(lengths)[:, None] - less)
    return out


def mean_of_means(logits: Array, ids: Array, lengths: Array) -> float:
    real, bits = counts(ids, lengths), surprises(logits, ids)
    rows = [bits[i][real[i]].mean() for i in range(len(ids)) if real[i].any()]
    return float(np.mean(rows))


def unnormalized(logits: Array, ids: Array, lengths: Array) -> float:
    rows, places = np.nonzero(counts(ids, lengths))
    return float(-logits[rows, places, ids[rows, places + 1]].mean())


def overflowing(logits: Array, ids: Array, lengths: Array) -> float:
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return unnormalized(log_p, ids, lengths)


def overflowing_softmax(logits: Array, ids: Array, lengths: Array) -> float:
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return unnormalized(np.log(p), ids, lengths)


def over_positions(logits: Array, ids: Array, lengths: Array) -> float:
    top = logits - logits.max(axis=1, keepdims=True)
    return unnormalized(top - np.log(np.exp(top).sum(axis=1, keepdims=True)), ids, lengths)


def batches(rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array]]:
    for lengths, seq, vocab in (([5, 2, 3], 6, 7), ([4, 4], 5, 3), ([2, 6, 1], 6, 5)):
        ids = rng.integers(0, vocab, size=(len(lengths), seq))
        yield 2 * rng.standard_normal((*ids.shape, vocab)), ids, np.array(lengths)
    ids = rng.integers(0, 4, size=(2, 5))
    yield 1000 + 2 * rng.standard_normal((2, 5, 4)), ids, np.array([5, 3])


# debug: a block that writes its norm into the stream


def block(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = x + attention(norm(x))
    return x + feed_forward(norm(x))


def run_block(answer: Callable[..., Array], x: Array, a: Array, b: Array) -> Array:
    """Build three functions from arrays: a mean over earlier positions, a bend, a norm."""

    def attention(x: Array) -> Array:
        mean: Array = np.cumsum(x, axis=1) / np.arange(1, x.shape[1] + 1)[:, None]
        return mean @ a

    def feed_forward(x: Array) -> Array:
        out: Array = np.tanh(x @ b)
        return out

    def norm(x: Array) -> Array:
        out: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return out

    return answer(x, attention, feed_forward, norm)


def streams(rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array]]:
    for batch, seq, width in ((2, 3, 4), (1, 1, 3), (3, 5, 2)):
        x = 3 * rng.standard_normal((batch, seq, width))
        yield x, rng.standard_normal((width, width)), rng.standard_normal((width, width))


def overwritten(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = norm(x)
    x = x + attention(x)
    x = norm(x)
    return x + feed_forward(x)


def first_overwritten(
    x: Array, attention: Function, feed_forward: Function, norm: Function
) -> Array:
    x = norm(x)
    x = x + attention(x)
    return x + feed_forward(norm(x))


def second_overwritten(
    x: Array, attention: Function, feed_forward: Function, norm: Function
) -> Array:
    x = norm(x + attention(norm(x)))
    return x + feed_forward(x)


def post_norm(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = norm(x + attention(x))
    return norm(x + feed_forward(x))


def parallel(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    return x + attention(norm(x)) + feed_forward(norm(x))


def no_sum(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    return feed_forward(norm(attention(norm(x))))


def first_unread(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = x + attention(x)
    return x + feed_forward(norm(x))


def no_norm(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = x + attention(x)
    return x + feed_forward(x)


def attention_dropped(
    x: Array, attention: Function, feed_forward: Function, norm: Function
) -> Array:
    return x + feed_forward(norm(x + attention(norm(x))))


def norm_of_outputs(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = x + norm(attention(x))
    return x + norm(feed_forward(x))


def norm_at_the_end(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    return norm(block(x, attention, feed_forward, norm))


def last_unread(x: Array, attention: Function, feed_forward: Function, norm: Function) -> Array:
    x = x + attention(norm(x))
    return x + feed_forward(x)


# measure: how far a stack of windows reads


REACH = 9  # three layers, each 3 positions further back


QUESTIONS = (
    Predict(
        "model.parameters",
        points=1,
        reference=parameters,
        forbid=("model.count_parameters",),
        cases=sizes,
        factor=1.000001,
        note="SmolLM2-135M has 134,515,008: a fifth of them in the embedding.",
        mistakes=(
            Mistake(
                "an output matrix",
                changed(embedding=2.0),
                "You count an output matrix; tied, it is the embedding once more.",
            ),
            Mistake(
                "two matrices",
                changed(feed_forward=2.0),
                "SwiGLU has three matrices: gate, up and down.",
            ),
            Mistake(
                "as many KV heads",
                multi_head,
                "Your keys and values are as wide as the queries; there are only `kv_heads` heads.",
            ),
            Mistake(
                "width over heads",
                divided_width,
                "You take d / heads for the width of a head; it is given, and need not be that.",
            ),
            Mistake(
                "no embedding",
                changed(embedding=0.0),
                "The embedding is missing.",
            ),
            Mistake(
                "one layer",
                one_layer,
                "That is one layer; there are `layers`.",
            ),
            Mistake(
                "no norms",
                changed(norms=0.0, last_norm=0.0),
                "The norms are missing: each has d numbers.",
            ),
            Mistake(
                "one norm a block",
                changed(norms=1.0),
                "You count one norm in a block; there are two, one before each half.",
            ),
            Mistake(
                "no last norm",
                changed(last_norm=0.0),
                "One norm is missing: the one after the last block.",
            ),
            Mistake(
                "biases",
                changed(biases=1.0),
                "You count biases; this model has none.",
            ),
            Mistake(
                "keys without values",
                changed(k_v=0.5),
                "You count one of two: values take as many numbers as keys.",
            ),
            Mistake(
                "no output projection",
                changed(q_o=0.5),
                "You count one of two: what the heads found goes through `o_proj`, as large as "
                "`q_proj`.",
            ),
        ),
    ),
    Implement(
        "model.rms_norm",
        points=2,
        reference=rms,
        forbid=("model.rms_norm", "model.RMSNorm", "model.build_norm"),
        cases=activations,
        mistakes=(
            Mistake(
                "layer norm",
                lambda x, gain, eps: rms(x - x.mean(axis=-1, keepdims=True), gain, eps),
                "You subtract the mean: that is layer norm. RMS norm only divides.",
            ),
            Mistake(
                "sum of squares",
                lambda x, gain, eps: x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + eps) * gain,
                "You divide by the length of the vector; the root *mean* square divides the sum "
                "by the width.",
            ),
            Mistake(
                "one statistic for all",
                lambda x, gain, eps: x / np.sqrt((x**2).mean() + eps) * gain,
                "You take one mean for the whole array; each vector has its own.",
            ),
            Mistake(
                "other axis",
                lambda x, gain, eps: x / np.sqrt((x**2).mean(axis=0, keepdims=True) + eps) * gain,
                "Your mean runs over the first axis; wanted the last, the features of one vector.",
            ),
            Mistake(
                "no root",
                lambda x, gain, eps: x / ((x**2).mean(axis=-1, keepdims=True) + eps) * gain,
                "You divide by the mean square; its root is missing.",
            ),
            Mistake(
                "eps outside",
                lambda x, gain, eps: (
                    x / (np.sqrt((x**2).mean(axis=-1, keepdims=True)) + eps) * gain
                ),
                "You add eps to the root; it belongs to the mean square, inside.",
            ),
            Mistake(
                "no eps",
                lambda x, gain, eps: rms(x, gain, 0.0),
                "eps is missing: a vector of zeros would be divided by zero.",
            ),
            Mistake(
                "eps of one's own",
                lambda x, gain, eps: rms(x, gain, 1e-5),
                "You add 1e-5 whatever `eps` is.",
            ),
            Mistake(
                "standard deviation",
                lambda x, gain, eps: x / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * gain,
                "You divide by the standard deviation, which takes the mean off first; the root "
                "mean square leaves it in.",
            ),
            Mistake(
                "no gain",
                lambda x, gain, eps: rms(x, np.ones_like(gain), eps),
                "The gain is missing.",
            ),
        ),
    ),
    Implement(
        "model.padded_loss",
        points=3,
        reference=loss_of_rows,
        forbid=("model.next_token_loss",),
        cases=batches,
        mistakes=(
            Mistake(
                "not moved",
                lambda logits, ids, lengths: surprises(logits, ids, ahead=0)[
                    counts(ids, lengths, less=0)
                ].mean(),
                "You ask each position for the id that it has just read; wanted the next one.",
            ),
            Mistake(
                "moved the wrong way",
                lambda logits, ids, lengths: surprises(logits, ids, ahead=-1)[
                    counts(ids, lengths, first=1, less=0)
                ].mean(),
                "You ask each position for the id before it; wanted the next one.",
            ),
            Mistake(
                "padding counted",
                lambda logits, ids, lengths: surprises(logits, ids)[:, :-1].mean(),
                "You count padding: predictions of ids beyond a row's length.",
            ),
            Mistake(
                "first padding counted",
                lambda logits, ids, lengths: surprises(logits, ids)[:, :-1][
                    counts(ids, lengths, less=0)[:, :-1]
                ].mean(),
                "The last real id of a row predicts padding, and you count that prediction.",
            ),
            Mistake(
                "padding in the denominator",
                lambda logits, ids, lengths: (
                    surprises(logits, ids)[counts(ids, lengths)].sum()
                    / (ids.shape[0] * (ids.shape[1] - 1))
                ),
                "Padding is out of your sum and still in its denominator.",
            ),
            Mistake(
                "mean of means",
                mean_of_means,
                "You average the means of the rows, so that a short row weighs as much as a long "
                "one; wanted one mean over all predictions.",
            ),
            Mistake(
                "real ids in the denominator",
                lambda logits, ids, lengths: (
                    surprises(logits, ids)[counts(ids, lengths)].sum() / np.sum(lengths)
                ),
                "You divide by the number of real ids; the first of each row is never predicted.",
            ),
            Mistake(
                "last id left out",
                lambda logits, ids, lengths: surprises(logits, ids)[
                    counts(ids, lengths, less=2)
                ].mean(),
                "You leave out the prediction of each row's last real id: a row of n has n - 1.",
            ),
            Mistake(
                "no softmax",
                unnormalized,
                "You average logits; ln p is the logit minus the logarithm of the sum of all "
                "exponentials.",
            ),
            Mistake(
                "softmax over positions",
                over_positions,
                "Your probabilities sum to one over positions; they should over the vocabulary.",
            ),
            Mistake(
                "overflow",
                overflowing,
                "The exponential of 1,000 is infinite: take the largest logit off first.",
            ),
            Mistake(
                "overflow in the softmax",
                overflowing_softmax,
                "The exponential of 1,000 is infinite: take the largest logit off first.",
            ),
            Mistake(
                "sum",
                lambda logits, ids, lengths: surprises(logits, ids)[counts(ids, lengths)].sum(),
                "That is the sum; wanted the mean over all predictions.",
            ),
        ),
    ),
    Debug(
        "model.block",
        points=3,
        reference=block,
        cases=streams,
        run=run_block,
        forbid=("model.Block",),
        mistakes=(
            Mistake(
                "the norm is written into the stream",
                overwritten,
                "The stream that leaves the block is not the one that came in plus two additions: "
                "the norm has replaced it, twice.",
            ),
            Mistake(
                "the second norm mended",
                first_overwritten,
                "One of two: what came in is still replaced by its norm before attention adds "
                "to it.",
            ),
            Mistake(
                "the first norm mended",
                second_overwritten,
                "One of two: what attention has made of the stream is still replaced by its norm.",
            ),
            Mistake(
                "post-norm",
                post_norm,
                "You normalize the sums: that is post-norm. Wanted pre-norm: only what a layer "
                "reads.",
            ),
            Mistake(
                "parallel",
                parallel,
                "Your feed-forward network reads the stream as it was before attention; it should "
                "read what attention added as well.",
            ),
            Mistake(
                "no sum",
                no_sum,
                "Nothing is added to the stream any more: each layer replaces it.",
            ),
            Mistake(
                "no norm",
                no_norm,
                "The stream is whole again, but now nobody reads it through a norm.",
            ),
            Mistake(
                "attention reads the bare stream",
                first_unread,
                "Your attention reads the stream without a norm.",
            ),
            Mistake(
                "attention dropped",
                attention_dropped,
                "What attention found reaches the feed-forward network, but not the stream that "
                "leaves the block.",
            ),
            Mistake(
                "norm of the outputs",
                norm_of_outputs,
                "You normalize what the layers write; wanted the norm of what they read.",
            ),
            Mistake(
                "norm at the end",
                norm_at_the_end,
                "You normalize the stream that leaves the block; nothing should touch it.",
            ),
            Mistake(
                "feed-forward reads the bare stream",
                last_unread,
                "Your feed-forward network reads the stream without a norm.",
            ),
        ),
    ),
    Measure(
        "model.reach",
        points=2,
        reference=REACH,
        note="Each layer sees 3 positions further back than the one below it.",
        mistakes=(
            Mistake(
                "position itself",
                REACH + 1,
                "That counts the position itself; wanted those before it.",
            ),
            Mistake(
                "one layer",
                3,
                "That is how far one layer sees; the layer below has gathered from further back.",
            ),
            Mistake(
                "one window",
                4,
                "That is what one layer sees, itself included.",
            ),
            Mistake(
                "window each, itself too",
                13,
                "Two counts are off: a window of 4 reaches 3 further, and the position itself is "
                "not before it.",
            ),
            Mistake(
                "window each",
                12,
                "A window of 4 holds the position itself, so each layer reaches 3 further, not 4.",
            ),
            Mistake(
                "all",
                30,
                "That is every earlier position: set the window of each layer's attention.",
            ),
        ),
    ),
    Choose(
        "model.symptom",
        points=1,
        right="b",
        because="The answer is in the input: a loss that is too good is a bug until shown "
        "otherwise.",
        wrong={
            "a": "Too high a rate makes the loss jump or rise; it cannot make it better than "
            "anything that ever read English.",
            "c": "Small weights give a loss of ln V at the beginning, which is what was seen.",
            "d": "A few hundred steps do not let a model learn 4 MB by heart.",
        },
    ),
)
