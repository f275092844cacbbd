"""Questions of chapter 03: what a vocabulary costs, merges, encoding, streams of bytes."""

import codecs
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from minilm.corpus import load_shakespeare
from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict
from minilm.tokenizer import BPETokenizer, train_bpe

__all__ = ["QUESTIONS"]

Words: TypeAlias = dict[str, int]
Merge: TypeAlias = tuple[str, str]


# predict: FLOPs per byte


def flops_per_byte(n_body: int, d_model: int, vocab_size: int, bytes_per_token: float) -> float:
    return 2 * (n_body + vocab_size * d_model) / bytes_per_token


def models(rng: np.random.Generator) -> Iterator[tuple[int, int, int, float]]:
    for body in (1, 40, 1000):
        d_model, vocab = int(rng.integers(64, 900)), int(rng.integers(300, 60_000))
        yield body * 100_000, d_model, vocab, round(float(rng.uniform(1.5, 4.5)), 2)


# implement: learn merges


def joined(symbols: list[str], pair: Merge) -> list[str]:
    out: list[str] = []
    place = 0
    while place < len(symbols):
        if tuple(symbols[place : place + 2]) == pair:
            out.append(pair[0] + pair[1])
            place += 2
        else:
            out.append(symbols[place])
            place += 1
    return out


def joined_once(symbols: list[str], pair: Merge) -> list[str]:
    for place, two in enumerate(pairwise(symbols)):
        if two == pair:
            return [*symbols[:place], pair[0] + pair[1], *symbols[place + 2 :]]
    return symbols


def joined_from_the_right(symbols: list[str], pair: Merge) -> list[str]:
    out: list[str] = []
    place = len(symbols)
    while place > 0:
        if place > 1 and (symbols[place - 2], symbols[place - 1]) == pair:
            out.append(pair[0] + pair[1])
            place -= 2
        else:
            out.append(symbols[place - 1])
            place -= 1
    return out[::-1]


def joined_and_skipped(symbols: list[str], pair: Merge) -> list[str]:
    """Joins in place and then goes two places on, past a neighbour."""
    out, place = list(symbols), 0
    while place < len(out) - 1:
        if (out[place], out[place + 1]) == pair:
            out[place : place + 2] = [pair[0] + pair[1]]
            place += 1
        place += 1
    return out


def joined_as_text(symbols: list[str], pair: Merge) -> list[str]:
    return " ".join(symbols).replace(" ".join(pair), "".join(pair)).split()


def joined_twice(symbols: list[str], pair: Merge) -> list[str]:
    """Overlapping places are all joined, so letters in the middle are used twice."""
    two = [*pairwise(symbols), ("", "")]
    return [
        "".join(pair) if two[place] == pair else symbol
        for place, symbol in enumerate(symbols)
        if two[place] == pair or not (place and two[place - 1] == pair)
    ]


def all_pairs(parts: list[str]) -> list[Merge]:
    return list(pairwise(parts))


def pairs_once(parts: list[str]) -> list[Merge]:
    return list(dict.fromkeys(pairwise(parts)))


def pairs_apart(parts: list[str]) -> list[Merge]:
    """Each pair as often as it can be joined."""
    out: list[Merge] = []
    for pair in pairs_once(parts):
        out += [pair] * (len(parts) - len(joined(parts, pair)))
    return out


def merges_of(
    words: Words,
    n_merges: int,
    weigh: bool = True,
    least: int = 1,
    pairs: Callable[[list[str]], list[Merge]] = all_pairs,
    tie: Callable[[dict[Merge, int]], Merge] = lambda best: min(best),
    join: Callable[[list[str], Merge], list[str]] = joined,
    rank: Callable[[dict[Merge, int]], int] = lambda counts: max(counts.values()),
) -> list[Merge]:
    """Training, with each of its decisions open to a mistake."""
    symbols = {word: list(word) for word in words}
    merges: list[Merge] = []
    for _ in range(n_merges):
        counts: dict[Merge, int] = {}
        for word, parts in symbols.items():
            for pair in pairs(parts):
                counts[pair] = counts.get(pair, 0) + (words[word] if weigh else 1)
        if max(counts.values(), default=0) < least:
            break
        most = rank(counts)
        merges.append(tie({pair: n for pair, n in counts.items() if n == most}))
        symbols = {word: join(parts, merges[-1]) for word, parts in symbols.items()}
    return merges


def learn(words: Words, n_merges: int) -> list[Merge]:
    return merges_of(words, n_merges)


def with_end_marks(words: Words, n_merges: int) -> list[Merge]:
    return merges_of({word + "_": n for word, n in words.items()}, n_merges)


def across_words(words: Words, n_merges: int) -> list[Merge]:
    return merges_of({"".join(word * n for word, n in words.items()): 1}, n_merges)


def counted_once(words: Words, n_merges: int) -> list[Merge]:
    """Ranks by the counts of single letters, never counted again."""
    counts: dict[Merge, int] = {}
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] = counts.get(pair, 0) + n
    return sorted(counts, key=lambda pair: (-counts[pair], pair))[:n_merges]


def texts(rng: np.random.Generator) -> Iterator[tuple[Words, int]]:
    yield {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}, 4
    yield {"zb": 3, "ab": 3, "za": 3}, 2  # ties
    yield {"abcq": 9, "abq": 5, "cqx": 1, "aba": 2, "abx": 2}, 6  # a tie of unequal lengths
    yield {"aaa": 3, "bc": 5}, 2  # six times (a, a)
    yield {"abab": 3, "cd": 5}, 2  # six times (a, b)
    yield {"ababab": 4}, 3
    yield {"babb": 5, "bab": 9, "abab": 3}, 5
    yield {"aaaa": 2, "baaab": 2}, 3
    yield {"to": 4, "ot": 5, "tot": 1}, 9  # no pair is left before nine merges
    yield {"banana": 3, "bandana": 2, "nab": 6}, 5
    for _ in range(2):
        drawn = ["".join(rng.choice(list("abc"), size=rng.integers(1, 7))) for _ in range(6)]
        yield {word: int(rng.integers(1, 9)) for word in drawn}, 5


# implement: encode


def encode(piece: str, merges: list[Merge]) -> list[str]:
    symbols = list(piece)
    for pair in merges:
        symbols = joined(symbols, pair)
    return symbols


def longest_match(piece: str, merges: list[Merge]) -> list[str]:
    vocab = {a + b for a, b in merges} | set(piece)
    out: list[str] = []
    while piece:
        size = next(n for n in range(len(piece), 0, -1) if piece[:n] in vocab)
        out.append(piece[:size])
        piece = piece[size:]
    return out


def leftmost_first(piece: str, merges: list[Merge]) -> list[str]:
    symbols = list(piece)
    while True:
        found = [place for place, pair in enumerate(pairwise(symbols)) if pair in merges]
        if not found:
            return symbols
        place = found[0]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def highest_rank_first(piece: str, merges: list[Merge]) -> list[str]:
    symbols = list(piece)
    while True:
        found = [merges.index(pair) for pair in pairwise(symbols) if pair in merges]
        if not found:
            return symbols
        symbols = joined(symbols, merges[max(found)])


def with_join(join: Callable[[list[str], Merge], list[str]]) -> Callable[..., list[str]]:
    def wrong(piece: str, merges: list[Merge]) -> list[str]:
        symbols = list(piece)
        for pair in merges:
            symbols = join(symbols, pair)
        return symbols

    return wrong


def highest_rank_first_one_place(piece: str, merges: list[Merge]) -> list[str]:
    symbols = list(piece)
    while True:
        found = [
            (-merges.index(two), i) for i, two in enumerate(pairwise(symbols)) if two in merges
        ]
        if not found:
            return symbols
        place = min(found)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def whole_piece_first(piece: str, merges: list[Merge]) -> list[str]:
    return [piece] if piece in [a + b for a, b in merges] else encode(piece, merges)


def any_pair_that_spells(piece: str, merges: list[Merge]) -> list[str]:
    symbols = list(piece)
    for a, b in merges:
        place = 0
        while place < len(symbols) - 1:
            if symbols[place] + symbols[place + 1] == a + b:
                symbols[place : place + 2] = [a + b]
            place += 1
    return symbols


LEARNED = [("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("b", "cd"), ("abc", "d")]


def pieces(rng: np.random.Generator) -> Iterator[tuple[str, list[Merge]]]:
    yield "", LEARNED
    yield "a", LEARNED
    yield "ab", []
    yield "abab", LEARNED
    yield "babb", [("b", "a"), ("a", "b")]
    yield "dabcab", LEARNED
    yield "abcd", LEARNED
    yield "bcdabab", LEARNED
    yield "bcd", [("c", "d"), ("b", "c"), ("b", "cd")]
    yield "aaaaa", [("a", "a"), ("aa", "a")]
    yield "xabc", [("b", "c"), ("a", "b"), ("ab", "c")]  # abc has no way from a and bc
    for _ in range(3):
        yield "".join(rng.choice(list("abcd"), size=9)), LEARNED


# debug: a stream of bytes


def stream(tokens: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [*(decoder.decode(token) for token in tokens), decoder.decode(b"", final=True)]


def each_alone(tokens: list[bytes]) -> list[str]:
    return [*(token.decode("utf-8", errors="replace") for token in tokens), ""]


def halves_dropped(tokens: list[bytes]) -> list[str]:
    return [*(token.decode("utf-8", errors="ignore") for token in tokens), ""]


def all_at_the_end(tokens: list[bytes]) -> list[str]:
    return ["" for _ in tokens] + [b"".join(tokens).decode("utf-8", errors="replace")]


def whole_text(tokens: list[bytes]) -> list[str]:
    new = stream(tokens)
    return ["".join(new[: end + 1]) for end in range(len(new))]


def no_last(tokens: list[bytes]) -> list[str]:
    return [*stream(tokens)[:-1], ""]


def until_it_decodes(tokens: list[bytes]) -> list[str]:
    shown: list[str] = []
    kept = b""
    for token in tokens:
        kept += token
        try:
            shown.append(kept.decode("utf-8"))
            kept = b""
        except UnicodeDecodeError:
            shown.append("")
    return [*shown, kept.decode("utf-8", errors="replace")]


def flushed_on_error(tokens: list[bytes]) -> list[str]:
    """Keeps an unfinished end, but empties all it has when anything else is wrong."""
    shown: list[str] = []
    kept = b""
    for token in tokens:
        kept += token
        try:
            shown.append(kept.decode("utf-8"))
            kept = b""
        except UnicodeDecodeError as error:
            good = error.start if error.reason == "unexpected end of data" else len(kept)
            shown.append(kept[:good].decode("utf-8", errors="replace"))
            kept = kept[good:]
    return [*shown, kept.decode("utf-8", errors="replace")]


def counted_by_first_byte(tokens: list[bytes]) -> list[str]:
    """Waits for as many bytes as the first promises, whatever they are."""
    shown: list[str] = []
    kept = b""
    for token in tokens:
        kept += token
        text = ""
        while kept:
            size = next((n for n, low in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if kept[0] >= low), 1)
            if kept[0] >= 0xF8:
                size = 1
            if len(kept) < size:
                break
            text += kept[:size].decode("utf-8", errors="replace")
            kept = kept[size:]
        shown.append(text)
    return [*shown, kept.decode("utf-8", errors="replace")]


def marks_at_the_end_wait(tokens: list[bytes]) -> list[str]:
    shown: list[str] = []
    data, n_shown = b"", 0
    for token in tokens:
        data += token
        text = data.decode("utf-8", errors="replace").rstrip("\ufffd")
        shown.append(text[n_shown:])
        n_shown = max(n_shown, len(text))
    return [*shown, data.decode("utf-8", errors="replace")[n_shown:]]


def all_or_nothing(tokens: list[bytes]) -> list[str]:
    """Shows nothing while the text ends in a mark."""
    shown: list[str] = []
    data, n_shown = b"", 0
    for token in tokens:
        data += token
        text = data.decode("utf-8", errors="replace")
        whole = not text.endswith("\ufffd")
        shown.append(text[n_shown:] if whole else "")
        n_shown = len(text) if whole else n_shown
    return [*shown, data.decode("utf-8", errors="replace")[n_shown:]]


def marks_deleted(tokens: list[bytes]) -> list[str]:
    return [text.replace("\ufffd", "") for text in stream(tokens)]


def last_token_is_the_end(tokens: list[bytes]) -> list[str]:
    *others, last = stream(tokens)
    return [*others[:-1], others[-1] + last, ""] if others else [last]


def streams(rng: np.random.Generator) -> Iterator[tuple[list[bytes]]]:
    yield ([],)
    yield ([b"To ", b"be"],)
    yield ([b"\xe5", b"\x86", b"\xac", "天".encode()],)
    yield ([b"a\xf0\x9f", b"\x98\x80b", b"\xc3"],)  # ends in the middle of a character
    yield ([b"a", b"\xff", b"b", b"c"],)  # no UTF-8 at all, then text goes on
    yield ([b"\xff\xe5", b"\x86\xac", b"!"],)  # no UTF-8, and half of a character behind it
    yield ([b"\xe5", b"a", b"b"],)  # the character never becomes whole
    data = "né 中文 😀!".encode()
    for _ in range(3):
        cuts = sorted(rng.choice(np.arange(1, len(data)), size=5, replace=False).tolist())
        yield ([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)],)


# measure: tokens that no text has


@cache
def trained_on_hamlet() -> tuple[BPETokenizer, str]:
    text = next(play.text for play in load_shakespeare("train") if play.slug == "hamlet")
    return train_bpe([text], 1024), text


def unused(also_bytes: bool = False, also_special: bool = False) -> int:
    tokenizer, text = trained_on_hamlet()
    used = set(tokenizer.encode(text))
    special = set(tokenizer.special_tokens.values())
    return sum(
        i not in used and (len(token) > 1 or also_bytes) and (i not in special or also_special)
        for i, token in enumerate(tokenizer.vocab)
    )


QUESTIONS = (
    Predict(
        "tokenizer.flops_per_byte",
        points=1,
        reference=flops_per_byte,
        cases=models,
        factor=1.02,
        note="Twice the vocabulary pays only while it saves more steps than it adds to each.",
        mistakes=(
            Mistake(
                "multiplied",
                lambda n_body, d_model, vocab_size, bytes_per_token: (
                    2 * (n_body + vocab_size * d_model) * bytes_per_token
                ),
                "You multiply by the bytes of a token; a token that covers more bytes makes each "
                "byte cheaper.",
            ),
            Mistake(
                "per token",
                lambda n_body, d_model, vocab_size, bytes_per_token: (
                    2 * (n_body + vocab_size * d_model)
                ),
                "That is the cost of a token; a token covers several bytes.",
            ),
            Mistake(
                "body only",
                lambda n_body, d_model, vocab_size, bytes_per_token: 2 * n_body / bytes_per_token,
                "You leave the comparison with all rows of the vocabulary out.",
            ),
            Mistake(
                "multiplications only",
                lambda n_body, d_model, vocab_size, bytes_per_token: (
                    (n_body + vocab_size * d_model) / bytes_per_token
                ),
                "You count multiplications; each comes with an addition, so FLOPs are twice that.",
            ),
            Mistake(
                "both tables",
                lambda n_body, d_model, vocab_size, bytes_per_token: (
                    2 * (n_body + 2 * vocab_size * d_model) / bytes_per_token
                ),
                "You count the table twice; to look a row up at the input takes no arithmetic.",
            ),
        ),
    ),
    Implement(
        "tokenizer.learn",
        points=3,
        reference=learn,
        forbid=("tokenizer.learn_merges", "tokenizer.train_bpe"),
        cases=texts,
        mistakes=(
            Mistake(
                "unweighted",
                lambda words, n_merges: merges_of(words, n_merges, weigh=False),
                "You count each word once; it weighs as often as it occurs.",
            ),
            Mistake(
                "first found",
                lambda words, n_merges: merges_of(
                    words, n_merges, tie=lambda best: next(iter(best))
                ),
                "Among equal counts you take the pair found first; wanted the smallest pair.",
            ),
            Mistake(
                "largest pair",
                lambda words, n_merges: merges_of(words, n_merges, tie=lambda best: max(best)),
                "Among equal counts you take the largest pair; wanted the smallest.",
            ),
            Mistake(
                "rarest",
                lambda words, n_merges: merges_of(
                    words, n_merges, rank=lambda counts: min(counts.values())
                ),
                "You join the rarest pair; wanted the most frequent.",
            ),
            Mistake(
                "across words",
                across_words,
                "Your pairs cross from one word into the next; no token may.",
            ),
            Mistake(
                "counted once",
                counted_once,
                "You rank the pairs of letters once; after each merge there are new pairs, and "
                "old ones are rarer.",
            ),
            Mistake(
                "one place a word",
                lambda words, n_merges: merges_of(words, n_merges, join=joined_once),
                "In each word you join one place only; join every place where the pair stands.",
            ),
            Mistake(
                "joined strings",
                lambda words, n_merges: [a + b for a, b in learn(words, n_merges)],
                "You return the joined tokens; wanted the pairs, since a token alone does not say "
                "what it was joined from.",
            ),
            Mistake(
                "past a neighbour",
                lambda words, n_merges: merges_of(words, n_merges, join=joined_and_skipped),
                "Of two pairs in a row, as in `abab`, you join only the first: the next begins "
                "right after the symbol you have made.",
            ),
            Mistake(
                "as text",
                lambda words, n_merges: merges_of(words, n_merges, join=joined_as_text),
                "You replace in a string with spaces, so `a b` is found in `ba b` too; compare "
                "whole symbols.",
            ),
            Mistake(
                "overlapping joins",
                lambda words, n_merges: merges_of(words, n_merges, join=joined_twice),
                "In `aaa` you join both pairs, so the middle letter is used twice.",
            ),
            Mistake(
                "once a word",
                lambda words, n_merges: merges_of(words, n_merges, pairs=pairs_once),
                "A pair that stands twice in a word counts twice.",
            ),
            Mistake(
                "without overlap",
                lambda words, n_merges: merges_of(words, n_merges, pairs=pairs_apart),
                "In `aaa` the pair of two `a` stands twice, and you count it once.",
            ),
            Mistake(
                "never joined",
                lambda words, n_merges: merges_of(words, n_merges, join=lambda parts, _: parts),
                "You never join anything: the same pair wins each time.",
            ),
            Mistake(
                "two at least",
                lambda words, n_merges: merges_of(words, n_merges, least=2),
                "You stop at pairs that occur once; go on until no pair is left.",
            ),
            Mistake(
                "ties by the joined string",
                lambda words, n_merges: merges_of(
                    words, n_merges, tie=lambda best: min(best, key=lambda pair: "".join(pair))
                ),
                "You break ties by the joined string; wanted the order of the pairs: first string "
                "against first string.",
            ),
            Mistake(
                "end marks",
                with_end_marks,
                "You put a mark at the end of each word, which brings pairs nobody asked for.",
            ),
        ),
    ),
    Implement(
        "tokenizer.encode",
        points=2,
        reference=encode,
        forbid=("tokenizer.apply_merges", "tokenizer.BPETokenizer"),
        cases=pieces,
        mistakes=(
            Mistake(
                "longest match",
                longest_match,
                "You take the longest token that fits from the left; BPE repeats the merges in "
                "the order in which they were learned.",
            ),
            Mistake(
                "leftmost first",
                leftmost_first,
                "You join the leftmost pair that was learned; wanted the one learned earliest.",
            ),
            Mistake(
                "latest first",
                highest_rank_first,
                "You join the pair that was learned last; wanted the one learned earliest.",
            ),
            Mistake(
                "one place",
                with_join(joined_once),
                "You join a pair in one place only; it may stand in several.",
            ),
            Mistake(
                "from the right",
                with_join(joined_from_the_right),
                "In `aaaaa` you join from the right; training joins from the left.",
            ),
            Mistake(
                "any spelling",
                any_pair_that_spells,
                "You join neighbours that spell a known token; only pairs that were learned are "
                "joined.",
            ),
            Mistake(
                "first merge only",
                lambda piece, merges: joined(list(piece), merges[0]) if merges else list(piece),
                "You apply the first merge and stop.",
            ),
            Mistake(
                "latest first, one place",
                highest_rank_first_one_place,
                "You join the pair that was learned last; wanted the one learned earliest.",
            ),
            Mistake(
                "latest first, one walk",
                lambda piece, merges: encode(piece, merges[::-1]),
                "You walk through the list from its end; wanted the merge learned earliest first.",
            ),
            Mistake(
                "past a neighbour",
                with_join(joined_and_skipped),
                "Of two pairs in a row, as in `abab`, you join only the first: the next begins "
                "right after the symbol you have made.",
            ),
            Mistake(
                "as text",
                with_join(joined_as_text),
                "You replace in a string with spaces, so `a b` is found in `da b` too; compare "
                "whole symbols.",
            ),
            Mistake(
                "overlapping joins",
                with_join(joined_twice),
                "In `aaaaa` you join pairs that overlap, so letters are used twice.",
            ),
            Mistake(
                "whole piece first",
                whole_piece_first,
                "You return a piece that is itself a token at once; the merges may never lead "
                "there.",
            ),
        ),
    ),
    Debug(
        "tokenizer.stream",
        points=3,
        reference=stream,
        forbid=("tokenizer.BPETokenizer.decode",),
        cases=streams,
        mistakes=(
            Mistake(
                "each token alone",
                each_alone,
                "You decode each token alone, so a character that is split over two becomes two "
                "replacement marks.",
            ),
            Mistake(
                "halves dropped",
                halves_dropped,
                "The marks are gone, and so are the characters: halves are dropped, not kept.",
            ),
            Mistake(
                "all at the end",
                all_at_the_end,
                "Right in the end, but nothing is shown before: show what is whole at once.",
            ),
            Mistake(
                "the whole text",
                whole_text,
                "You return all text so far each time; wanted what is new.",
            ),
            Mistake(
                "no last",
                no_last,
                "A stream that ends within a character loses its bytes: show a mark at the end.",
            ),
            Mistake(
                "waits for ever",
                until_it_decodes,
                "One byte that is no UTF-8 blocks all that follows: keep back only what can still "
                "become a character.",
            ),
            Mistake(
                "all out on an error",
                flushed_on_error,
                "A byte that is no UTF-8 makes you give out all you keep, and with it half of the "
                "character that follows in the same token.",
            ),
            Mistake(
                "first byte trusted",
                counted_by_first_byte,
                "You wait for as many bytes as the first one promises; if the next is a letter, "
                "the character will never be whole.",
            ),
            Mistake(
                "marks wait",
                marks_at_the_end_wait,
                "You hold every mark at the end of the text back; a byte that can never become a "
                "character is shown at once.",
            ),
            Mistake(
                "all or nothing",
                all_or_nothing,
                "A token may hold whole characters and then a half: show the whole ones at once.",
            ),
            Mistake(
                "marks deleted",
                marks_deleted,
                "Bytes that are no UTF-8, or that a stream leaves unfinished, vanish without a "
                "mark.",
            ),
            Mistake(
                "last token is the end",
                last_token_is_the_end,
                "You take the last token for the end of the stream; what is left comes as one more "
                "string.",
            ),
        ),
    ),
    Measure(
        "tokenizer.unused",
        points=2,
        reference=unused,
        rtol=0.001,
        note="A model trained on this text never sees them.",
        mistakes=(
            Mistake(
                "bytes too",
                lambda: unused(also_bytes=True),
                "You count single bytes too; they wait for other texts.",
            ),
            Mistake(
                "special tokens too",
                lambda: unused(also_special=True),
                "You count the special token, which stands for no text.",
            ),
            Mistake(
                "bytes and special tokens",
                lambda: unused(also_bytes=True, also_special=True),
                "You count everything that is unused; leave single bytes and the special token "
                "out.",
            ),
        ),
    ),
    Choose(
        "tokenizer.injection",
        points=1,
        right="c",
        because="What a user writes is data: it never turns into a command, and nothing is lost.",
        wrong={
            "a": "The check turns away whoever asks about the token, and does not see a forged "
            "`<|im_end|>`, which ends the user's turn.",
            "b": "That changes what honest users write, and misses what you did not think of.",
            "d": "Whoever writes about chat formats is turned away for nothing.",
        },
    ),
)
