"""Questions of chapter 05: a cache's bytes, masks, grouped heads, a running softmax, windows."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own pages use
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]


# predict: bytes of a KV cache


def cache_bytes(
    batch: int, tokens: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    return 2 * 2 * batch * tokens * layers * kv_heads * head_dim


def layouts(rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    yield 3, 10, 5, 8, 2, 7
    for _ in range(4):
        kv_heads = int(rng.integers(2, 9))
        sizes = [int(n) for n in rng.integers(3, 100, size=4)]
        yield sizes[0], sizes[1], sizes[2], kv_heads * int(rng.integers(3, 6)), kv_heads, sizes[3]


# implement: who may see whom


def visible(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    distance = queries[:, :, None] - keys[:, None, :]
    return (keys[:, None, :] >= 0) & (distance >= 0) & (distance < window)


def positions(rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    rows = torch.arange(6)[None]
    yield rows, rows, 100
    yield rows, rows, 3
    left = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    yield left, left, 4
    yield left.flip(1), left, 2
    yield torch.tensor([[7], [2]]), torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, -1, -1]]), 3
    yield torch.tensor([[4]]), torch.from_numpy(rng.permutation(8))[None], 2
    yield torch.tensor([[9, 5]]), torch.tensor([[0, 9, 4, 5, -1, 2]]), 5  # keys with gaps
    yield rows, rows, 1


def triangle(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    n, m = queries.shape[1], keys.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(m)[None]
    return ((distance >= 0) & (distance < window)).expand(len(queries), n, m).clone()


def counts_keys(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    seen = visible(queries, keys, 10**6)
    later = keys[:, None, None, :] > keys[:, None, :, None]
    return seen & ((seen[:, :, None, :] & later).sum(dim=-1) < window)


# implement: attention with shared KV heads


def attention_with(
    share: Callable[[Tensor, int], Tensor] = lambda t, times: t.repeat_interleave(times, dim=1),
    scale: Callable[[int], float] = lambda e: 1 / math.sqrt(e),
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Grouped attention in which one part may be another."""

    def right(scores: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, lowest).softmax(dim=-1).masked_fill(~mask, 0.0)

    def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        scores = q @ share(k, times).mT * scale(q.shape[-1])
        return (weigh or right)(scores, mask) @ share(v, times)

    return grouped_attention


def heads(rng: np.random.Generator) -> Iterator[tuple[Tensor, ...]]:
    for batch, n_heads, kv_heads, n, m, e in (
        (2, 4, 2, 5, 5, 6),
        (1, 6, 2, 3, 4, 8),
        (3, 3, 3, 4, 4, 2),
        (2, 4, 1, 1, 6, 4),
    ):
        q = torch.from_numpy(rng.standard_normal((batch, n_heads, n, e))).float()
        k, v = (
            torch.from_numpy(rng.standard_normal((batch, kv_heads, m, e))).float() for _ in "kv"
        )
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        if n == 5:
            mask[2] = False  # a query that may see nothing
        yield q, k, v, mask


def after_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.softmax(dim=-1).masked_fill(~mask, 0.0)


def no_mask(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.softmax(dim=-1)


def wrong_axis(scores: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(dim=-2).masked_fill(~mask, 0.0)


def infinite(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)


def uniform(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)


def hides_the_seen(scores: Tensor, mask: Tensor) -> Tensor:
    return infinite(scores, ~mask).nan_to_num()


def zero_scores(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores * mask).softmax(dim=-1)


def zero_scores_and_weights(scores: Tensor, mask: Tensor) -> Tensor:
    return zero_scores(scores, mask) * mask


OWN_FUNCTION = (
    "PyTorch's own attention function does the work: write scores, mask, softmax and mean yourself."
)


class OwnFunction(TorchFunctionMode):
    """Notes whether PyTorch's own attention was called."""

    called = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = ("scaled_dot_product_attention", "multi_head_attention_forward")
        self.called |= getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


def by_hand(answer: Any, rng: np.random.Generator) -> str | None:
    with OwnFunction() as watch:
        answer(*next(heads(rng)))
    return OWN_FUNCTION if watch.called else None


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num()


# debug: a softmax block by block


def larger(top: Tensor, block: Tensor) -> Tensor:
    return torch.maximum(top, block.amax(dim=1, keepdim=True))


def running_softmax_with(
    out_shrinks: bool = True,
    total_shrinks: bool = True,
    inverted: bool = False,
    maximum: Callable[[Tensor, Tensor], Tensor] = larger,
    start: float = -math.inf,
    whole_blocks: bool = False,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The running softmax, in which one part may be another."""

    def running_softmax(scores: Tensor, values: Tensor, block_size: int) -> Tensor:
        top = torch.full_like(scores[:, :1], start)
        total, out = torch.zeros_like(top), scores.new_zeros(len(scores), values.shape[1])
        end = scores.shape[1] - block_size + 1 if whole_blocks else scores.shape[1]
        for first in range(0, end, block_size):
            block = scores[:, first : first + block_size]
            new_top = maximum(top, block)
            weights = (block - new_top).exp()
            shrink = (new_top - top if inverted else top - new_top).exp()
            total = total * (shrink if total_shrinks else 1) + weights.sum(dim=1, keepdim=True)
            out = out * (shrink if out_shrinks else 1) + weights @ values[first:][:block_size]
            top = new_top
        return out / total

    return running_softmax


def score_blocks(rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    for n, m, e, size, shift in ((3, 6, 2, 2, 0), (1, 7, 3, 3, 0), (2, 5, 4, 1, 0), (2, 4, 1, 9, 0),
                                 (2, 6, 3, 4, -2000), (2, 6, 3, 4, 2000)):  # fmt: skip
        scores = torch.from_numpy(3 * rng.standard_normal((n, m))).float() + shift
        yield scores, torch.from_numpy(rng.standard_normal((m, e))).float(), size
    scores = torch.from_numpy(rng.standard_normal((3, 6))).float()
    scores[0, :3] += 2000  # the first row falls, the second rises, the third stays low
    scores[1, 3:] += 2000
    yield scores, torch.from_numpy(rng.standard_normal((6, 2))).float(), 3


WHOLE_ROWS = (
    "You hold the exponentials of whole rows: no more than `block_size` columns of them may exist "
    "at one time."
)


class WidestBlock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many columns an exponential was taken of, or a matrix product summed over."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.columns = rows, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        tensors = [each for each in args if isinstance(each, Tensor)]
        if name in ("exp", "exp2", "pow", "softmax", "log_softmax", "logsumexp"):
            self.columns = max([self.columns, *(t.numel() // self.rows for t in tensors)])
        elif name in ("mm", "bmm"):
            self.columns = max(self.columns, tensors[0].shape[-1])
        return func(*args, **(kwargs or {}))


def in_blocks(answer: Any, rng: np.random.Generator) -> str | None:
    scores = torch.from_numpy(rng.standard_normal((5, 12))).float()
    with WidestBlock(len(scores)) as watch:
        answer(scores, torch.from_numpy(rng.standard_normal((12, 2))).float(), 3)
    return WHOLE_ROWS if watch.columns > 3 else None


QUESTIONS = (
    Predict(
        "attention.cache_bytes",
        points=1,
        reference=cache_bytes,
        cases=layouts,
        factor=1.01,
        note="Batch and length multiply, so many long texts at once are what fills a GPU.",
        mistakes=(
            Mistake(
                "query heads",
                lambda batch, tokens, layers, heads, kv_heads, head_dim: (
                    4 * batch * tokens * layers * heads * head_dim
                ),
                "You count the query heads. Queries are used once and thrown away.",
            ),
            Mistake(
                "keys only",
                lambda batch, tokens, layers, heads, kv_heads, head_dim: (
                    2 * batch * tokens * layers * kv_heads * head_dim
                ),
                "Half is missing. What besides the keys must be kept, and how many bytes has a "
                "number of 16 bits?",
            ),
            Mistake(
                "one layer",
                lambda batch, tokens, layers, heads, kv_heads, head_dim: (
                    4 * batch * tokens * kv_heads * head_dim
                ),
                "That is one layer's cache. Every layer has keys of its own.",
            ),
            Mistake(
                "32 bits",
                lambda batch, tokens, layers, heads, kv_heads, head_dim: (
                    8 * batch * tokens * layers * kv_heads * head_dim
                ),
                "Twice too much: numbers of 16 bits are 2 bytes each.",
            ),
            Mistake(
                "one text",
                lambda batch, tokens, layers, heads, kv_heads, head_dim: (
                    4 * tokens * layers * kv_heads * head_dim
                ),
                "That is one text's cache. The server decodes `batch` texts at once.",
            ),
        ),
    ),
    Implement(
        "attention.visible",
        points=2,
        reference=visible,
        forbid=("attention.attention_mask",),
        cases=positions,
        mistakes=(
            Mistake(
                "triangle",
                triangle,
                "Your mask depends on places in the array. The arguments are positions: keys may "
                "come in any order, and a row may start with padding.",
            ),
            Mistake(
                "hides itself",
                lambda queries, keys, window: (
                    visible(queries, keys, window) & (queries[:, :, None] != keys[:, None, :])
                ),
                "A query may see its own position: later means strictly later.",
            ),
            Mistake(
                "window off by one",
                lambda queries, keys, window: visible(queries, keys, window + 1),
                "Your window is one too wide: it holds `window` positions, the query's own "
                "included.",
            ),
            Mistake(
                "window too narrow",
                lambda queries, keys, window: visible(queries, keys, window - 1),
                "Your window is one too narrow: it holds `window` positions, the query's own "
                "included.",
            ),
            Mistake(
                "padding is seen",
                lambda queries, keys, window: visible(queries + 1, keys + 1, window),
                "A key of padding (position -1) is visible to some query.",
            ),
            Mistake(
                "not causal",
                lambda queries, keys, window: (
                    (keys[:, None, :] >= 0)
                    & (queries[:, :, None] >= 0)
                    & ((queries[:, :, None] - keys[:, None, :]).abs() < window)
                ),
                "A query sees later positions.",
            ),
            Mistake(
                "no window",
                lambda queries, keys, window: visible(queries, keys, 10**6),
                "Keys that are `window` or more positions back are still visible.",
            ),
            Mistake(
                "what is hidden",
                lambda queries, keys, window: ~visible(queries, keys, window),
                "Your mask is the opposite: True is for what may be seen.",
            ),
            Mistake(
                "counts keys",
                counts_keys,
                "Your window counts keys. It is `window` positions wide, and some of them may have "
                "no key here.",
            ),
            Mistake(
                "asks the query",
                lambda queries, keys, window: (
                    visible(queries + 1, keys + 1, window) & (queries[:, :, None] >= 0)
                ),
                "You ask whether the query is a token. The key must be one too: a token sees "
                "padding here.",
            ),
            Mistake(
                "first token hidden",
                lambda queries, keys, window: visible(queries - 1, keys - 1, window),
                "The first token of a text is hidden: it stands at position 0, padding at -1.",
            ),
        ),
    ),
    Implement(
        "attention.grouped_attention",
        points=3,
        reference=attention_with(),
        forbid=(
            "attention.attend",
            "attention.attention_weights",
            "attention.blockwise_attention",
            "attention.fused_attention",
        ),
        cases=heads,
        probes=(by_hand,),
        rtol=1e-4,
        atol=1e-5,
        mistakes=(
            Mistake(
                "no mask",
                attention_with(weigh=no_mask),
                "Your function gives what it would give without the mask.",
            ),
            Mistake(
                "mask after softmax",
                attention_with(weigh=after_softmax),
                "You mask after the softmax: the hidden scores have already been in the sum that "
                "divides, so the rows no longer sum to one.",
            ),
            Mistake(
                "wrong axis",
                attention_with(weigh=wrong_axis),
                "Your softmax runs over the queries. For each query, the weights of its keys must "
                "sum to one.",
            ),
            Mistake(
                "forgotten scale",
                attention_with(scale=lambda e: 1.0),
                "The scale is missing: scores are divided by the root of the width of a head.",
            ),
            Mistake(
                "scale without the root",
                attention_with(scale=lambda e: 1 / e),
                "You divide by the width; it is its square root that keeps the variance at 1.",
            ),
            Mistake(
                "other groups",
                attention_with(share=lambda t, times: t.repeat(1, times, 1, 1)),
                "Your heads take turns: head 0 and head 1 look at different keys. Neighbouring "
                "query heads share a KV head.",
            ),
            Mistake(
                "NaN",
                attention_with(weigh=infinite),
                "A query that may see nothing gives NaN, 0 divided by 0; it must give zeros.",
            ),
            Mistake(
                "mean of all",
                attention_with(weigh=uniform),
                "A query that may see nothing gives the mean of all values; it must give zeros.",
            ),
            Mistake(
                "mask upside down",
                attention_with(weigh=hides_the_seen),
                "You hide what the mask shows: True is for what may be seen.",
            ),
            Mistake(
                "scores of zero",
                attention_with(weigh=zero_scores),
                "You hide a score by making it 0. But exp(0) is 1: the key still gets its share.",
            ),
            Mistake(
                "scores of zero, then weights",
                attention_with(weigh=zero_scores_and_weights),
                "You make hidden scores 0 before the softmax. But exp(0) is 1, and it stays in the "
                "sum that divides.",
            ),
            Mistake("PyTorch's own", fused, OWN_FUNCTION),
        ),
    ),
    Debug(
        "attention.running_softmax",
        points=3,
        reference=running_softmax_with(),
        forbid=(),
        cases=score_blocks,
        probes=(in_blocks,),
        rtol=1e-3,  # float32 near 2,000 has steps of 1e-4
        atol=1e-4,
        note="This is the loop of FlashAttention.",
        mistakes=(
            Mistake(
                "out is not scaled down",
                running_softmax_with(out_shrinks=False, whole_blocks=True),
                "Two things are still wrong. When a larger maximum turns up, which of the running "
                "sums were made with the old one? And are all scores looked at?",
            ),
            Mistake(
                "only the last block mended",
                running_softmax_with(out_shrinks=False),
                "All scores are seen now. But a larger maximum scales down the sum of weights "
                "alone, and not the sum of values.",
            ),
            Mistake(
                "only the scaling mended",
                running_softmax_with(whole_blocks=True),
                "The sums are right now. But the scores of a last, shorter block are left out.",
            ),
            Mistake(
                "total is not scaled down",
                running_softmax_with(total_shrinks=False),
                "The sum of values is scaled down, the sum of weights is not: both were made with "
                "the old maximum.",
            ),
            Mistake(
                "nothing is scaled down",
                running_softmax_with(total_shrinks=False, out_shrinks=False),
                "Neither sum is scaled down when a larger maximum turns up.",
            ),
            Mistake(
                "scaled up",
                running_softmax_with(inverted=True),
                "You scale by exp(new - old), which is above 1: what was added so far is too "
                "large, not too small.",
            ),
            Mistake(
                "top starts at 0",
                running_softmax_with(start=0.0),
                "Your maximum starts at 0, so scores far below 0 all become exp(-large) = 0.",
            ),
            Mistake(
                "the block's own maximum",
                running_softmax_with(maximum=lambda top, block: block.amax(dim=1, keepdim=True)),
                "Your maximum may fall from one block to the next; then exp(old - new) is above 1, "
                "and overflows when it falls far.",
            ),
            Mistake(
                "one maximum for all rows",
                running_softmax_with(maximum=lambda top, block: torch.maximum(top, block.max())),
                "Each row needs a maximum of its own: under another row's, all its exponentials "
                "may be 0.",
            ),
            Mistake(
                "no maximum",
                running_softmax_with(maximum=lambda top, block: torch.zeros_like(top), start=0.0),
                "You take exponentials without subtracting a maximum: large scores overflow, and "
                "very low ones all become 0.",
            ),
            Mistake(
                "in one piece",
                lambda scores, values, block_size: scores.softmax(dim=1) @ values,
                WHOLE_ROWS,
            ),
        ),
    ),
    Measure(
        "attention.reach",
        points=2,
        reference=10,
        note="One layer adds window - 1 positions: 1 + layers · (window - 1).",
        mistakes=(
            Mistake(
                "one layer", 4, "That is the window of one layer. What did its neighbours see?"
            ),
            Mistake(
                "product",
                12,
                "Layers times window counts twice: the last position of one window is the first "
                "of the next.",
            ),
            Mistake("not itself", 9, "Count the position itself as well."),
            Mistake(
                "window on top",
                13,
                "A window of 4 holds the position itself: a layer adds one less than its window.",
            ),
        ),
    ),
    Choose(
        "attention.traffic",
        points=1,
        right="b",
        because="Only the keys and values are read again for every token.",
        wrong={
            "a": "Blocks spare the matrix of scores when many queries come at once. One new query "
            "still reads every key.",
            "c": "The new query heads read the same keys: not one byte less.",
            "d": "The kind of position changes numbers, not how many are read.",
        },
    ),
)
