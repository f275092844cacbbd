"""Decoding, in the order chapter 18 explains it.

A model gives probabilities; what is written depends on how ids are chosen from them. `Sampling`
describes the choice, `next_token_probs` changes the probabilities accordingly, `sample_ids` draws.
`generate` reads the prompts once (prefill), then one id a row and step (decode), with a `KVCache`.
`stream` does the same for one text and yields it as it comes.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilm.cache import KVCache
from minilm.errors import ConfigError
from minilm.model import Transformer, pad_left

__all__ = [
    "GREEDY",
    "Sampling",
    "TextStream",
    "beam_search",
    "decode",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "next_token_probs",
    "penalize_repetition",
    "sample_ids",
    "stream",
]

Logits: TypeAlias = Float[Tensor, "batch vocab"]


# How ids are chosen


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. The steps follow one another in this order.

    Attributes:
        repetition_penalty: Ids that have come before get their logit divided by this where it is
            positive, multiplied where it is negative; 1: no penalty.
        temperature: Logits are divided by it: below 1 prefers the probable, above 1 evens out; 0
            takes the most probable id, and what follows has no effect.
        top_k: Only the so many most probable ids may come; None: all.
        top_p: Only the fewest most probable ids whose probabilities reach this sum; None: all.
        min_p: Only ids with at least this part of the largest probability; None: all.
        seed: Equal seeds give equal ids. Row i of a batch draws with `seed + i`, from a source of
            its own, so that what a row says does not depend on its neighbours.

    Raises:
        ConfigError: If a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"temperature={self.temperature}, repetition_penalty={self.repetition_penalty}; "
                "wanted a temperature from 0 up and a penalty above 0 (1 for none)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}; use at least 1, or None for all ids")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}={value}; wanted above 0, up to 1, or None for all ids")


GREEDY = Sampling(temperature=0.0)


def penalize_repetition(logits: Logits, seen: Sequence[Sequence[int]], penalty: float) -> Logits:
    """Make ids that have come before less probable.

    Args:
        logits: Of the next id.
        seen: The ids of each row so far, its prompt included.
        penalty: Above 1; positive logits are divided by it, negative ones multiplied.

    Example:
        >>> penalize_repetition(torch.tensor([[3.0, -1.0, 2.0]]), [[0, 1, 0]], penalty=2.0)
        tensor([[ 1.5000, -2.0000,  2.0000]])

    Source:
        Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    logits = logits.clone()
    for i, ids in enumerate(seen):
        index = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits.device)
        old = logits[i, index]
        logits[i, index] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits of each row, and set the others to -inf. Ties are kept together.

    Example:
        >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
        tensor([[-inf, 3., 2.]])
    """
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest most probable ids whose probabilities sum to p; the others get -inf.

    The id that makes the sum reach p is kept, so at least one is.

    Example:
        >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), p=0.6).exp()
        tensor([[0.5000, 0.3000, 0.0000]])

    Source:
        Holtzman et al. 2019, https://arxiv.org/abs/1904.09751
    """
    ordered, ids = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probs.cumsum(dim=-1) - probs  # the sum of what is more probable
    return logits.masked_fill(torch.zeros_like(before).scatter(-1, ids, before) >= p, -math.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep the ids that are at least p times as probable as the most probable one.

    Example:
        >>> keep_min_p(torch.tensor([[0.6, 0.3, 0.1]]).log(), p=0.4).exp()
        tensor([[0.6000, 0.3000, 0.0000]])

    Source:
        Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
    """
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def next_token_probs(
    logits: Logits, sampling: Sampling, seen: Sequence[Sequence[int]] | None = None
) -> Logits:
    """Return the probabilities that the next id is drawn from.

    Args:
        logits: Of the model.
        sampling: What to change.
        seen: The ids of each row so far; needed where there is a penalty for repetition.

    Returns:
        Probabilities, float32. At temperature 0 all is on the largest logit.

    Raises:
        ConfigError: If there is a penalty, but no `seen`.

    Example:
        >>> next_token_probs(torch.tensor([[0.0, 1.0, 2.0]]), Sampling(temperature=0.5, top_k=2))
        tensor([[0.0000, 0.1192, 0.8808]])
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ConfigError("a penalty for repetition needs to know the ids so far: pass seen")
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def sample_ids(probs: Logits, generators: Sequence[torch.Generator]) -> Int[Tensor, " batch"]:
    """Draw an id for each row: where the running sum of its probabilities passes a random number.

    Args:
        probs: Of the next id, on the CPU. They need not sum to one.
        generators: A source of randomness for each row.

    Example:
        >>> sample_ids(torch.tensor([[0.0, 1.0, 0.0]]), [torch.Generator()])
        tensor([1])
    """
    sums = probs.double().cumsum(dim=-1)
    random = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    return torch.searchsorted(sums, random * sums[:, -1:], right=True)[:, 0]


# Prefill, then decode

Finished: TypeAlias = Callable[[int, int], bool]


@torch.no_grad()
def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    finished: Finished | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue each prompt; yield, after each call of the model, the rows with their new ids.

    The first call reads the prompts (prefill), each later one reads the one new id of each row.

    Args:
        model: What predicts, in eval mode; a `minilm.decoder.Decoder` is quickest.
        prompts: Rows of ids, of any lengths, each at least one.
        max_new_tokens: How many ids to add to a row at most.
        sampling: How to choose them.
        finished: Called with the number of a row and its new id; True ends the row.
        cache: One that holds the first ids of each prompt already: they are not read again. It
            keeps the rows that have not ended. Default: an empty one of the size that is needed.

    Raises:
        ConfigError: If a prompt is empty, has an id that the model does not know, or is too long
            for the cache together with the new ids.
    """
    rows = [list(prompt) for prompt in prompts]
    cache = _checked_cache(model, rows, max_new_tokens, cache)
    device = next(model.norm.parameters()).device
    active = list(range(len(rows)))
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in active]
    new = [row[n:] for row, n in zip(rows, cache.lengths.tolist(), strict=True)]
    for _ in range(max_new_tokens):
        ids, positions = pad_left(new)
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
        positions = torch.where(positions < 0, -1, positions + cache.lengths[:, None])
        last = model.states(ids.to(device), positions.to(device), cache)[:, -1]
        texts = [rows[i] for i in active]
        chosen = _choose(model.logits(last).cpu(), sampling, texts, generators)
        for i, token in zip(active, chosen, strict=True):
            rows[i].append(token)
        yield list(zip(active, chosen, strict=True))
        if finished is not None:
            ended = [finished(i, token) for i, token in zip(active, chosen, strict=True)]
            kept = [place for place, end in enumerate(ended) if not end]
            if not kept:
                break
            if len(kept) < len(active):
                cache.select(kept)
                active = [active[place] for place in kept]
                generators = [generators[place] for place in kept]
        new = [rows[i][-1:] for i in active]


def _checked_cache(
    model: Transformer, rows: Sequence[Sequence[int]], max_new_tokens: int, cache: KVCache | None
) -> KVCache:
    """Refuse what cannot be decoded, and make a cache where there is none."""
    lengths = [len(row) for row in rows]
    if not rows or not all(lengths) or max_new_tokens < 0:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, lengths of prompts {lengths}; wanted prompts of at "
            "least one id, such as [model.begin_id], and no negative number"
        )
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= model.config.vocab_size:
        raise ConfigError(
            f"ids run from {low} to {high}, wanted 0 to {model.config.vocab_size - 1}; "
            "encode the text with the model's own tokenizer"
        )
    room = model.config.max_seq_len if cache is None else cache.max_len
    if max(lengths) + max_new_tokens > room:
        raise ConfigError(
            f"the longest prompt has {max(lengths)} ids, and {max_new_tokens} new ones are wanted, "
            f"but there is room for {room}; shorten the prompt or ask for fewer"
        )
    if cache is None:
        gain = next(model.norm.parameters())  # of the stream's dtype, and where the stream is
        room = max(lengths) + max_new_tokens
        return KVCache(model.config, len(rows), room, gain.dtype, gain.device)
    held = cache.lengths.tolist()
    if len(held) != len(rows) or any(n >= len(row) for n, row in zip(held, rows, strict=True)):
        raise ConfigError(
            f"the cache holds {held} ids for prompts of {lengths}; it must leave at least the last "
            "id of each prompt to be read"
        )
    return cache


def _choose(
    logits: Logits,
    sampling: Sampling,
    seen: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next id of each row."""
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:  # as below, but quicker
        return logits.argmax(dim=-1).tolist()
    return sample_ids(next_token_probs(logits, sampling, seen), generators).tolist()


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int | str] = (),
    cache: KVCache | None = None,
) -> list[list[int]]:
    """Continue each prompt and return the new ids.

    Args:
        model: As in `decode`.
        prompts: As in `decode`.
        max_new_tokens: As in `decode`.
        sampling: As in `decode`.
        stop: Ids and texts that end a row. The id that does so is the last of the row. A text may
            begin in one token and end in another; it must lie in the new ids.
        cache: As in `decode`.

    Returns:
        The new ids of each row, without its prompt.

    Raises:
        ConfigError: As `decode`; or if `stop` has an empty text.
    """
    new: list[list[int]] = [[] for _ in prompts]
    stop_ids = {each for each in stop if isinstance(each, int)}
    stop_texts = [each for each in stop if isinstance(each, str)]
    texts = [TextStream(stop_texts) for _ in prompts]

    def finished(row: int, token: int) -> bool:
        if stop_texts:
            texts[row].feed(_bytes_of(model, token))
        return token in stop_ids or texts[row].stopped

    for step in decode(model, prompts, max_new_tokens, sampling, finished, cache):
        for row, token in step:
            new[row].append(token)
    return new


# Text, as it comes


class TextStream:
    """Turns the bytes of tokens into text that may be shown at once, and ends before a stop text.

    A token may end in the middle of a character, and a stop text may begin in one token and end in
    another. So what could still become one of these is held back until it is clear.

    Args:
        stop: The text ends before the first of these that is complete.

    Attributes:
        stopped: Whether one of them has come.

    Raises:
        ConfigError: If a stop text is empty.

    Example:
        >>> text = TextStream(stop=["END"])
        >>> text.feed(b"caf\\xc3"), text.feed(b"\\xa9 E"), text.feed(b"N"), text.feed(b"Ds here")
        ('caf', 'é ', '', '')
        >>> text.stopped
        True
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ConfigError("a stop text is empty, which would end every text; leave it out")
        self.stop, self.stopped = tuple(stop), False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """Take the bytes of a token, return the text that is certain now; "" once stopped."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back: no more bytes come."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop]
        found = [(end, start) for end, start in found if start >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # of the one that is complete first
        beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    cache: KVCache | None = None,
) -> Iterator[str]:
    """Continue a prompt and yield the text piece by piece, as soon as each is certain.

    Ends before the first special token, which stands for no text, and before a stop text.

    Args:
        model: As in `decode`, with a tokenizer.
        prompt: Ids, at least one.
        max_new_tokens: As in `decode`.
        sampling: As in `decode`.
        stop: As in `TextStream`.
        cache: As in `decode`.

    Raises:
        ConfigError: As `decode` and `TextStream`.
    """
    text, ends = TextStream(stop), _special_ids(model)
    for [(_, token)] in decode(model, [prompt], max_new_tokens, sampling, cache=cache):
        if token in ends:
            break
        yield text.feed(_bytes_of(model, token))
        if text.stopped:
            return
    yield text.finish()


def _special_ids(model: Transformer) -> set[int]:
    """Ids that stand for no text."""
    return {model.begin_id, *getattr(model.tokenizer, "special_tokens", {}).values()}


def _bytes_of(model: Transformer, token: int) -> bytes:
    return b"" if token in _special_ids(model) else model.tokenizer.token_bytes(token)


# Several continuations at once


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    n_beams: int = 4,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> list[tuple[list[int], float]]:
    """Look for the most probable continuation: keep the best `n_beams` beginnings at each step.

    Args:
        model: As in `decode`.
        prompt: Ids, at least one.
        max_new_tokens: As in `decode`.
        n_beams: How many beginnings to keep. 1 is greedy decoding; as many as there are texts finds
            the most probable one for certain.
        length_penalty: A text's log-probability is divided by its length to this power: 0 compares
            sums, 1 means.
        stop_ids: Ids that end a text.

    Returns:
        At most `n_beams` texts (new ids, the stop id included) with their scores, best first.

    Raises:
        ConfigError: As `decode`, or if `n_beams` is below 1.

    Source:
        As `transformers` does with `num_beams` and `early_stopping=False`.
    """
    if n_beams < 1:
        raise ConfigError(f"n_beams={n_beams}; use at least 1")
    cache = _checked_cache(model, [prompt], max_new_tokens, None)
    device = next(model.norm.parameters()).device
    done: list[tuple[list[int], float]] = []
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    new = [list(prompt)]

    def normalized(ids: list[int], total: float) -> tuple[list[int], float]:
        return ids, total / max(len(ids), 1) ** length_penalty

    for _ in range(max_new_tokens):
        positions = torch.arange(len(new[0])) + cache.lengths[:, None]
        ids = torch.tensor(new, device=device)
        last = model.states(ids, positions.to(device), cache)[:, -1]
        log_probs = model.logits(last).float().log_softmax(dim=-1).cpu()
        totals = (log_probs + torch.tensor([total for _, total in beams])[:, None]).flatten()
        best = totals.topk(min(n_beams * (1 + len(stop_ids)), len(totals)))
        going: list[tuple[int, list[int], float]] = []
        for rank, (total, place) in enumerate(zip(*map(Tensor.tolist, best), strict=True)):
            parent, token = divmod(place, log_probs.shape[1])
            text = [*beams[parent][0], token]
            if token not in stop_ids:
                going.append((parent, text, total))
            elif rank < n_beams:
                done.append(normalized(text, total))
        going = going[:n_beams]
        beams = [(text, total) for _, text, total in going]
        done = sorted(done, key=lambda each: -each[1])[:n_beams]
        if not beams or (len(done) == n_beams and done[-1][1] >= normalized(*beams[0])[1]):
            break
        cache.select([parent for parent, _, _ in going])
        new = [text[-1:] for text, _ in beams]
    else:
        done += [normalized(*beam) for beam in beams]
    return sorted(done, key=lambda each: -each[1])[:n_beams]
