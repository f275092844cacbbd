"""Questions of chapter 18: room for texts, a cache's rows, positions, top-p, stop strings."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minilm.exercises.engine import Array, Choose, Debug, Implement, Mistake, Predict, Rng

__all__ = ["QUESTIONS"]


# predict: how many texts fit beside the weights


def texts_with(
    both: int = 2,
    layers: bool = True,
    query_heads: bool = False,
    weights: bool = True,
    cache_bytes: int | None = None,
    weight_bytes: int | None = None,
    rounded: bool = True,
) -> Callable[..., int | float]:
    """Texts that fit into a memory, in which one part may be another."""

    def texts(
        memory_bytes: int,
        parameters: int,
        number_bytes: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        seq_len: int,
    ) -> int | float:
        heads = n_heads if query_heads else n_kv_heads
        one_token = both * (n_layers if layers else 1) * heads * head_dim
        one_text = one_token * (cache_bytes or number_bytes) * seq_len
        room = memory_bytes - parameters * (weight_bytes or number_bytes) * weights
        return room // one_text if rounded else room / one_text

    return texts


def machines(rng: Rng) -> Iterator[tuple[int, ...]]:
    yield 24 * 10**9, 8_030_261_248, 2, 32, 32, 8, 128, 4096
    for number_bytes in (2, 4, 2):
        n_kv_heads, head_dim = int(rng.integers(1, 9)), 32 * int(rng.integers(1, 5))
        n_layers, seq_len = int(rng.integers(12, 80)), int(rng.integers(500, 1000))
        parameters = int(rng.integers(10**8, 3 * 10**9))
        memory = parameters * number_bytes + int(rng.integers(20, 80)) * 10**9 + 7
        yield (
            memory,
            parameters,
            number_bytes,
            n_layers,
            int(rng.integers(2, 9)) * n_kv_heads,
            n_kv_heads,
            head_dim,
            seq_len,
        )


# implement: the rows of a cache

NO_ROOM = (
    "One token for a full row is lost without a word: a slice beyond the end of an array is empty. "
    "Compare the new length with the room first."
)


def extend_with(
    chosen: Callable[[Array, Array], Array] = lambda new, positions: new[positions >= 0],
    first: Callable[[Array, int], int] = lambda lengths, row: int(lengths[row]),
    grown: Callable[[int, int, int], int] = lambda start, tokens, columns: start + tokens,
    checked: bool = True,
) -> Callable[[Array, Array, Array, Array], tuple[Array, Array]]:
    """Write new rows into a cache, in which one part may be another."""

    def extend(store: Array, lengths: Array, new: Array, positions: Array) -> tuple[Array, Array]:
        store, before, lengths = store.copy(), lengths.copy(), lengths.copy()
        for row in range(len(new)):
            tokens = chosen(new[row], positions[row])
            start = first(before, row)
            if checked and start + len(tokens) > store.shape[1]:
                raise ValueError("no room")
            store[row, start : start + len(tokens)] = tokens
            lengths[row] = grown(int(before[row]), len(tokens), new.shape[1])
        return store, lengths

    return extend


def by_positions(store: Array, lengths: Array, new: Array, positions: Array) -> tuple[Array, Array]:
    store = store.copy()
    rows = np.arange(len(new))[:, None]
    store[rows, positions] = new
    return store, lengths + (positions >= 0).sum(axis=1)


def caches(rng: Rng) -> Iterator[tuple[Array, Array, Array, Array]]:
    prompts = np.array([[-1, -1, 0, 1], [0, 1, 2, 3], [-1, -1, -1, 0]])
    turns = np.array([[3, 4, -1], [1, 2, 3], [-1, -1, -1]])
    gaps = np.array([[-1, 2, -1, 3], [5, -1, -1, -1]])
    step = np.array([[4], [-1], [0]])
    for positions, held in (
        (prompts, [0, 0, 0]),
        (turns, [3, 1, 4]),
        (gaps, [2, 5]),
        (step, [4, 2, 0]),
    ):
        lengths = np.array(held)
        store = np.zeros((len(held), 9, 2))
        for row, length in enumerate(held):
            store[row, :length] = rng.normal(size=(length, 2))
        yield store, lengths, rng.normal(size=(*positions.shape, 2)), positions


def says_when_full(extend: Callable[..., object], rng: Rng) -> str | None:
    store, lengths = rng.normal(size=(2, 4, 3)), np.array([1, 4])
    try:
        extend(store, lengths, rng.normal(size=(2, 1, 3)), np.array([[1], [4]]))
    except ValueError:
        return None
    return NO_ROOM


# debug: positions of a batch padded on the left


def positions_with(
    first: str = "row",
    decode: str = "row",
    padding: int = -1,
    shift: int = 0,
    left: bool = True,
) -> Callable[[Array, int], tuple[Array, Array]]:
    """Positions of prompts and of new tokens, in which one part may be another."""

    def positions(lengths: Array, n_new: int) -> tuple[Array, Array]:
        longest = int(lengths.max())
        columns, new = np.arange(longest)[None], np.arange(n_new)[None]
        skipped = longest - lengths[:, None]
        is_token = columns >= skipped if left else columns < lengths[:, None]
        own = columns - skipped if first == "row" and left else columns + 0 * skipped
        prefill = np.where(is_token, own, padding)
        start = lengths[:, None] if decode == "row" else np.full_like(skipped, longest)
        return prefill, start + new + shift

    return positions


def batches(rng: Rng) -> Iterator[tuple[Array, int]]:
    yield np.array([2, 5, 3]), 4
    yield np.array([4]), 2
    yield np.array([3, 3]), 1
    yield rng.integers(1, 9, size=5), 3


# implement: top-p


def softmax(logits: Array) -> Array:
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def kept_before(probabilities: Array, p: float) -> Array:
    return np.asarray(probabilities.cumsum(axis=-1) - probabilities < p)


def first_and_below(probabilities: Array, p: float) -> Array:
    kept = np.asarray(probabilities.cumsum(axis=-1) <= p)
    kept[:, 0] = True
    return kept


def one_more(probabilities: Array, p: float) -> Array:
    kept = kept_before(probabilities, p)
    kept[:, 1:] |= kept[:, :-1].copy()
    return kept


def top_p_with(
    kept_sorted: Callable[[Array, float], Array] = kept_before,
    order: Callable[[Array], Array] = lambda probabilities: np.argsort(-probabilities, axis=-1),
    renormalized: bool = True,
    put_back: bool = True,
    probable: Callable[[Array], Array] = softmax,
) -> Callable[[Array, float], Array]:
    """Probabilities after top-p, in which one part may be another."""

    def top_p(logits: Array, p: float) -> Array:
        probabilities = probable(logits)
        places = order(probabilities)
        ordered = np.take_along_axis(probabilities, places, axis=-1)
        ordered = np.where(kept_sorted(ordered, p), ordered, 0.0)
        out = ordered
        if put_back:
            out = np.zeros_like(ordered)
            np.put_along_axis(out, places, ordered, axis=-1)
        return np.asarray(out / out.sum(axis=-1, keepdims=True)) if renormalized else out

    return top_p


def one_set(logits: Array, p: float) -> Array:
    kept = top_p_with()(logits, p)[:1] > 0
    rest = np.where(kept, softmax(logits), 0.0)
    return np.asarray(rest / rest.sum(axis=-1, keepdims=True))


def rows_of_logits(rng: Rng) -> Iterator[tuple[Array, float]]:
    for p in (0.5, 0.8, 0.95):
        yield 2.0 * rng.standard_normal((3, 7)), p
    certain = rng.standard_normal((2, 5))
    certain[:, 3] += 9.0
    yield certain, 0.6  # the first id alone exceeds p
    yield 0.3 * rng.standard_normal((3, 6)), 0.5
    yield rng.standard_normal((2, 4)), 1.0


# implement: stop strings


def stream_with(
    joined: bool = True,
    held_back: str = "longest",
    whole_stop: bool = False,
    flushed: bool = True,
    earliest: bool = True,
    ends: bool = True,
) -> Callable[[Sequence[str], Sequence[str]], list[str]]:
    """The texts to show, in which one part may be another."""

    def beginnings(text: str, stops: Sequence[str]) -> list[int]:
        return [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]

    def hold(text: str, stops: Sequence[str]) -> int:
        if held_back == "nothing":
            return 0
        if held_back == "fixed":
            return min(len(text), max(map(len, stops), default=1) - 1)
        if held_back == "whole":
            return len(text) if any(s.startswith(text) for s in stops) else 0
        if held_back == "everything":
            return len(text)
        return (min if held_back == "shortest" else max)(beginnings(text, stops), default=0)

    def stream(pieces: Sequence[str], stops: Sequence[str]) -> list[str]:
        out, seen, shown, done = [], "", 0, False
        for piece in pieces:
            if done:
                out.append("")
                continue
            seen += piece
            start = 0 if joined else len(seen) - len(piece)
            found = [(seen.find(s, start), s) for s in stops if seen.find(s, start) >= 0]
            if found:
                place, stop = min(found) if earliest else found[0]
                end = place + len(stop) * whole_stop
                out.append(seen[shown:end])
                done, seen, shown = ends, seen[place + len(stop) :], 0
                continue
            end = max(shown, len(seen) - hold(seen[shown:], stops))
            out.append(seen[shown:end])
            shown = end
        return [*out, "" if done or not flushed else seen[shown:]]

    return stream


def streams(rng: Rng) -> Iterator[tuple[list[str], list[str]]]:
    yield ["Par", "is is", " nice", "\nUs", "er: why?", " So"], ["\nUser:"]
    yield ["no", " sto", "p her", "e"], ["stop!"]
    yield ["a", "aa", "b", "c"], ["aab"]
    yield ["one two three"], ["three", "two"]
    yield ["x", "\n", "y\n", "\nz"], ["\n\n", "END"]
    yield ["the EN", "d", " EN", "D of it", "END"], ["END"]
    yield ["free", " text"], []
    yield ["He", "llo <", "|e"], ["<|end|>"]
    letters = rng.choice(list("ab"), size=12).tolist()
    yield letters, ["abba", "bbb"]


QUESTIONS = (
    Predict(
        "cache.texts",
        points=1,
        reference=texts_with(),
        cases=machines,
        factor=1 + 1e-9,
        note="That is why servers count free memory in tokens.",
        mistakes=(
            Mistake(
                "all heads",
                texts_with(query_heads=True),
                "The cache holds keys and values of the KV heads; query heads leave nothing "
                "behind.",
            ),
            Mistake(
                "keys only",
                texts_with(both=1),
                "You count one vector for each token and KV head. There are two, a key and a "
                "value.",
            ),
            Mistake(
                "one layer",
                texts_with(layers=False),
                "Every layer keeps its own keys and values.",
            ),
            Mistake(
                "no weights",
                texts_with(weights=False),
                "The weights need room, too, before the first text comes.",
            ),
            Mistake(
                "numbers for bytes",
                texts_with(cache_bytes=1),
                "A number in the cache takes `number_bytes` bytes; yours take one.",
            ),
            Mistake(
                "numbers for bytes in the weights",
                texts_with(weight_bytes=1),
                "A weight takes `number_bytes` bytes; yours take one.",
            ),
            Mistake(
                "parts of texts",
                texts_with(rounded=False),
                "Whole texts are asked for: round down.",
            ),
        ),
    ),
    Implement(
        "cache.extend",
        points=3,
        reference=extend_with(),
        forbid=("cache.LayerCache.extend", "cache.KVCache.plan"),
        cases=caches,
        probes=(says_when_full,),
        mistakes=(
            Mistake(
                "padding goes last",
                by_positions,
                "Padding has the position -1, and in NumPy the index -1 is the last place: that is "
                "where you write it.",
            ),
            Mistake(
                "padding too",
                extend_with(chosen=lambda new, positions: new),
                "You store padding as well; only columns with a position from 0 up are tokens.",
            ),
            Mistake(
                "padding stored, not counted",
                extend_with(
                    chosen=lambda new, positions: new,
                    grown=lambda start, tokens, columns: start,
                ),
                "You store every column and count none.",
            ),
            Mistake(
                "first columns",
                extend_with(chosen=lambda new, positions: new[: (positions >= 0).sum()]),
                "You take the first columns of a row. Padding may stand before its tokens.",
            ),
            Mistake(
                "last columns",
                extend_with(chosen=lambda new, positions: new[len(new) - (positions >= 0).sum() :]),
                "You take the last columns of a row. Padding may stand behind its tokens.",
            ),
            Mistake(
                "one start for all",
                extend_with(first=lambda lengths, row: int(lengths.max())),
                "All rows are written behind the longest one; each row has a length of its own.",
            ),
            Mistake(
                "from the beginning",
                extend_with(first=lambda lengths, row: 0),
                "You write over what the row already holds: start at its length.",
            ),
            Mistake(
                "lengths by columns",
                extend_with(grown=lambda start, tokens, columns: start + columns),
                "Lengths grow by the number of columns in your code; padding is not stored.",
            ),
            Mistake(
                "lengths stay",
                extend_with(grown=lambda start, tokens, columns: start),
                "Your lengths do not grow, so that the next token overwrites these.",
            ),
            Mistake(
                "one late",
                extend_with(first=lambda lengths, row: int(lengths[row]) + 1),
                "You leave a place empty. A row of length n fills the places 0 to n - 1.",
            ),
            Mistake(
                "one early",
                extend_with(first=lambda lengths, row: max(0, int(lengths[row]) - 1)),
                "You overwrite the last token of a row: place n is the first free one of a row of "
                "length n.",
            ),
            Mistake("silently full", extend_with(checked=False), NO_ROOM),
        ),
    ),
    Debug(
        "generation.positions",
        points=2,
        reference=positions_with(),
        forbid=("attention.token_positions", "model.pad_left"),
        cases=batches,
        note="Only prompts shorter than the longest were wrong, and they still read like English.",
        mistakes=(
            Mistake(
                "as handed out",
                positions_with(first="column", decode="longest"),
                "Both are still wrong. Where does a row's own text begin, and how many tokens has "
                "it when the first new one comes?",
            ),
            Mistake(
                "only the new tokens",
                positions_with(first="column"),
                "The new tokens are right now. But a padded prompt begins at the column where its "
                "padding ends; that token's position is 0.",
            ),
            Mistake(
                "only the prompts",
                positions_with(decode="longest"),
                "The prompts are right now. But new tokens of a short row follow that row's last "
                "position, not the longest row's.",
            ),
            Mistake(
                "one too far",
                positions_with(shift=1),
                "A prompt of n tokens fills the positions 0 to n - 1, so the next is n, not n + 1.",
            ),
            Mistake(
                "one back",
                positions_with(shift=-1),
                "Your first new token gets the position of the prompt's last.",
            ),
            Mistake(
                "padding at 0",
                positions_with(padding=0),
                "Padding must have the position -1; at 0 it would be seen as a token.",
            ),
            Mistake(
                "padding at 1",
                positions_with(padding=1),
                "Padding must have the position -1 here; at 1 it would be seen as a token.",
            ),
            Mistake(
                "padded on the right",
                positions_with(left=False),
                "These batches are padded on the left; yours are padded on the right.",
            ),
        ),
    ),
    Implement(
        "generation.top_p",
        points=3,
        reference=top_p_with(),
        forbid=("generation.keep_top_p", "generation.next_token_probs"),
        cases=rows_of_logits,
        mistakes=(
            Mistake(
                "the crossing one dropped",
                top_p_with(kept_sorted=lambda ordered, p: ordered.cumsum(axis=-1) <= p),
                "The id with which the sum reaches p belongs to the set. You drop it, and where "
                "the first id alone exceeds p, nothing is left.",
            ),
            Mistake(
                "the crossing one dropped, the first kept",
                top_p_with(kept_sorted=first_and_below),
                "You keep the first id always, but the id with which the sum reaches p belongs to "
                "the set as well.",
            ),
            Mistake(
                "one too many",
                top_p_with(kept_sorted=one_more),
                "You keep one id after the sum has reached p.",
            ),
            Mistake(
                "not renormalized",
                top_p_with(renormalized=False),
                "Your probabilities do not sum to one: divide by what is left.",
            ),
            Mistake(
                "unsorted",
                top_p_with(
                    order=lambda probabilities: np.broadcast_to(
                        np.arange(probabilities.shape[-1]), probabilities.shape
                    )
                ),
                "You add up in the order of the ids. The set is the smallest one: begin with the "
                "most probable.",
            ),
            Mistake(
                "the least probable",
                top_p_with(order=lambda probabilities: np.argsort(probabilities, axis=-1)),
                "You begin with the least probable ids.",
            ),
            Mistake(
                "not put back",
                top_p_with(put_back=False),
                "Your result is in the order of the sort; each probability must stand at its id.",
            ),
            Mistake(
                "min-p",
                top_p_with(kept_sorted=lambda ordered, p: ordered >= p * ordered[:, :1]),
                "You keep what has p times the highest probability: that is min-p.",
            ),
            Mistake(
                "each above p",
                top_p_with(kept_sorted=lambda ordered, p: ordered >= p),
                "You compare each probability with p; it is their sum that has to reach it.",
            ),
            Mistake(
                "each above 1 - p",
                top_p_with(kept_sorted=lambda ordered, p: ordered >= 1 - p),
                "You compare each probability with 1 - p; it is the sum that has to reach p.",
            ),
            Mistake(
                "one set for all rows",
                one_set,
                "Every row gets the set of the first one; each has its own.",
            ),
            Mistake(
                "logits as probabilities",
                top_p_with(probable=lambda logits: logits - logits.min(axis=-1, keepdims=True)),
                "You add up logits: take the softmax first.",
            ),
        ),
    ),
    Implement(
        "generation.stream",
        points=3,
        reference=stream_with(),
        forbid=("generation.TextStream",),
        cases=streams,
        note="Nothing of a stop string was ever shown, and nothing waited longer than it must.",
        mistakes=(
            Mistake(
                "piece by piece",
                stream_with(joined=False, held_back="nothing"),
                "You look for stop strings in each piece alone; one may begin in a piece and end "
                "in another.",
            ),
            Mistake(
                "nothing held back",
                stream_with(held_back="nothing"),
                "You find a stop string across pieces, but its beginning has been shown by then.",
            ),
            Mistake(
                "rest lost",
                stream_with(flushed=False),
                "What you held back at the end is lost: no stop string came, so it must be shown.",
            ),
            Mistake(
                "stop string shown",
                stream_with(whole_stop=True),
                "You show the stop string itself; the text ends before it.",
            ),
            Mistake(
                "first in the list",
                stream_with(earliest=False),
                "Where two stop strings are found, the text ends at the earlier place, whatever "
                "their order in the list.",
            ),
            Mistake(
                "fixed number",
                stream_with(held_back="fixed"),
                "You always hold back as many characters as a stop string has, less one. Hold "
                "back only what can still become one.",
            ),
            Mistake(
                "everything",
                stream_with(held_back="everything"),
                "You show nothing before the end: a reader waits for the whole text.",
            ),
            Mistake(
                "the whole rest",
                stream_with(held_back="whole"),
                "You hold text back only if all of it is the beginning of a stop string. A stop "
                "string may begin in the middle of a piece.",
            ),
            Mistake(
                "shortest",
                stream_with(held_back="shortest"),
                "Of several endings that may become a stop string, hold back the longest.",
            ),
            Mistake(
                "goes on",
                stream_with(ends=False),
                "You show what comes after the stop string.",
            ),
        ),
    ),
    Choose(
        "decoder.batch",
        points=1,
        right="b",
        because="A step reads all weights once, for one text or for eight.",
        wrong={
            "a": "That would be so if arithmetic set the pace. At batch 1 the cores wait for "
            "weights, and one reading serves all eight rows.",
            "c": "Each text still needs one step for each token, and a step does not get shorter.",
            "d": "The caches of eight texts are read, too, but at this length they are a small "
            "part of the weights.",
        },
    ),
)
