"""Questions of chapter 13: bytes, reduce-scatter, ring all-reduce, buckets, a mean, a timeline."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from minilm.distributed.collectives import all_reduce as package_all_reduce
from minilm.distributed.communication import Communicator, simulate
from minilm.errors import DataError
from minilm.exercises.engine import Choose, Debug, Implement, Mistake, Predict

__all__ = ["QUESTIONS"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
COLLECTIVES = tuple(
    f"distributed.collectives.{name}"
    for name in (
        *("all_reduce", "reduce_scatter", "all_gather", "all_reduce_at_root", "broadcast"),
        "exchange",
    )
)
TIMEOUT = 20.0  # seconds; ranks that wait for each other are found at once


# ranks on threads


class StuckError(Exception):
    """The ranks did not come to an end."""


def on_ranks(work: Callable[[Communicator], Any], ranks: int) -> dict[str, Any]:
    """Run a function on each rank: results, and what went over the network.

    Raises:
        StuckError: If the ranks wait for each other, or have not ended in time.
    """
    try:
        ran = simulate(work, ranks, timeout=TIMEOUT)
    except DataError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise StuckError(str(error)) from None
    return {
        "results": ran.results,
        "bytes sent by all": ran.traffic.total,
        "bytes sent by the busiest rank": max(ran.traffic.sent),
        "ranks that a rank sends to": int((ran.traffic.bytes > 0).sum(axis=1).max()),
    }


# predict: bytes of a step


def step_bytes(parameters: int, ranks: int, number_bytes: int, micro_batches: int) -> float:
    return 2 * (ranks - 1) / ranks * parameters * number_bytes


def clusters(rng: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    for ranks, number_bytes, micro_batches in ((2, 4, 1), (8, 2, 4), (5, 4, 3), (64, 2, 1)):
        yield int(rng.integers(10**5, 10**9)) * ranks, ranks, number_bytes, micro_batches
    yield 10**6, 1, 4, 2


# implement: reduce-scatter


def reduce_scatter(communicator: Communicator, chunks: list[Tensor]) -> Tensor:
    rank, n = communicator.rank, communicator.world_size
    for step in range(1, n):
        outgoing, incoming = (rank - step) % n, (rank - step - 1) % n
        communicator.send(chunks[outgoing], (rank + 1) % n)
        message = torch.empty_like(chunks[incoming])
        communicator.receive(message, (rank - 1) % n)
        chunks[incoming] += message
    return chunks[rank]


def scattered(
    first: int = 1,
    fewer: int = 0,
    add: bool = True,
    moves: bool = True,
    returned: int = 0,
    mean: bool = False,
    receive_first: bool = False,
) -> Callable[[Communicator, list[Tensor]], Tensor]:
    """`reduce_scatter`, with one thing done otherwise."""

    def wrong(communicator: Communicator, chunks: list[Tensor]) -> Tensor:
        rank, n = communicator.rank, communicator.world_size
        for step in range(first, first + max(n - 1 - fewer, 0)):
            place = step if moves else first
            incoming = (rank - place - 1) % n
            message = torch.empty_like(chunks[incoming])
            if receive_first:
                communicator.receive(message, (rank - 1) % n)
            communicator.send(chunks[(rank - place) % n], (rank + 1) % n)
            if not receive_first:
                communicator.receive(message, (rank - 1) % n)
            chunks[incoming] += message if add else message - chunks[incoming]
        return chunks[(rank + returned) % n] / (n if mean else 1)

    return wrong


def scattered_directly(communicator: Communicator, chunks: list[Tensor]) -> Tensor:
    rank, n = communicator.rank, communicator.world_size
    others = [other for other in range(n) if other != rank]
    for other in others:
        communicator.send(chunks[other], other)
    for other in others:
        message = torch.empty_like(chunks[rank])
        communicator.receive(message, other)
        chunks[rank] += message
    return chunks[rank]


def scattered_whole(communicator: Communicator, chunks: list[Tensor]) -> Tensor:
    whole = torch.stack(chunks)
    passed_on(communicator, whole)
    return whole[communicator.rank]


def run_scatter(answer: Any, tensors: Array) -> dict[str, Any]:
    """`tensors` has a row for each rank, which is cut into as many chunks."""

    def work(communicator: Communicator) -> Any:
        row = torch.tensor(tensors[communicator.rank])
        return answer(communicator, list(row.chunk(communicator.world_size)))

    return on_ranks(work, len(tensors))


def even_tensors(rng: np.random.Generator) -> Iterator[tuple[Array]]:
    for ranks, chunk in ((1, 3), (2, 2), (3, 1), (4, 2), (5, 3)):
        yield (rng.integers(1, 100, size=(ranks, ranks * chunk)).astype(np.float64),)


# implement: all-reduce


def ring_all_reduce(communicator: Communicator, tensor: Tensor) -> None:
    rank, n = communicator.rank, communicator.world_size
    chunks = list(tensor.tensor_split(n))
    reduce_scatter(communicator, chunks)
    for step in range(n - 1):
        communicator.send(chunks[(rank - step) % n], (rank + 1) % n)
        communicator.receive(chunks[(rank - step - 1) % n], (rank - 1) % n)


def reduced(
    gather: bool = True,
    add_twice: bool = False,
    begin: int = 0,
    fewer: int = 0,
    mean: bool = False,
    on_copy: bool = False,
    scatter: Callable[..., Any] = reduce_scatter,
    drop: bool = False,
) -> Callable[[Communicator, Tensor], Any]:
    """`ring_all_reduce`, with one thing done otherwise."""

    def wrong(communicator: Communicator, tensor: Tensor) -> Any:
        rank, n = communicator.rank, communicator.world_size
        tensor = tensor.clone() if on_copy else tensor
        even = tensor[: len(tensor) // n * n] if drop else tensor
        chunks = list(even.tensor_split(n))
        scatter(communicator, chunks)
        for step in range(begin, begin + max(n - 1 - fewer, 0)) if gather else ():
            communicator.send(chunks[(rank - step) % n], (rank + 1) % n)
            incoming = chunks[(rank - step - 1) % n]
            message = torch.empty_like(incoming)
            communicator.receive(message, (rank - 1) % n)
            incoming += message if add_twice else message - incoming
        if mean:
            tensor /= n
        return tensor if on_copy else None

    return wrong


def through_root(communicator: Communicator, tensor: Tensor) -> None:
    others = range(1, communicator.world_size)
    message = torch.empty_like(tensor)
    if communicator.rank:
        communicator.send(tensor, 0)
        communicator.receive(tensor, 0)
        return
    for other in others:
        communicator.receive(message, other)
        tensor += message
    for other in others:
        communicator.send(tensor, other)


def passed_on(communicator: Communicator, tensor: Tensor) -> None:
    rank, n = communicator.rank, communicator.world_size
    passing = tensor.clone()
    for _ in range(n - 1):
        communicator.send(passing, (rank + 1) % n)
        communicator.receive(passing, (rank - 1) % n)
        tensor += passing


def padded(communicator: Communicator, tensor: Tensor) -> None:
    n = communicator.world_size
    room = -(-len(tensor) // n) * n
    longer = torch.cat([tensor, tensor.new_zeros(room - len(tensor))])
    ring_all_reduce(communicator, longer)
    tensor.copy_(longer[: len(tensor)])


def to_everybody(communicator: Communicator, tensor: Tensor) -> None:
    rank, n = communicator.rank, communicator.world_size
    others = [other for other in range(n) if other != rank]
    for other in others:
        communicator.send(tensor, other)
    for other in others:
        message = torch.empty_like(tensor)
        communicator.receive(message, other)
        tensor += message


def run_all_reduce(answer: Any, tensors: Array) -> dict[str, Any]:
    """`tensors` has a row for each rank."""

    def work(communicator: Communicator) -> Tensor:
        row = torch.tensor(tensors[communicator.rank])
        answer(communicator, row)
        return row

    return on_ranks(work, len(tensors))


def odd_tensors(rng: np.random.Generator) -> Iterator[tuple[Array]]:
    for ranks, size in ((1, 3), (2, 5), (3, 7), (4, 4), (4, 2), (5, 13), (3, 0)):
        numbers = rng.integers(1, 100, size=(ranks, size))
        yield (numbers.astype(np.float32 if ranks == 4 else np.float64),)


# implement: buckets


def reduce_in_buckets(
    gradients: list[Array], bucket_bytes: int, all_reduce: Callable[[Array], Array]
) -> list[Array]:
    buckets: list[list[int]] = []
    for place in reversed(range(len(gradients))):
        held = sum(gradients[k].nbytes for k in buckets[-1]) if buckets else bucket_bytes
        if held + gradients[place].nbytes > bucket_bytes:
            buckets.append([])
        buckets[-1].append(place)
    return exchanged(gradients, buckets, all_reduce)


def exchanged(
    gradients: list[Array], buckets: list[list[int]], all_reduce: Callable[[Array], Array]
) -> list[Array]:
    """The sums of all gradients, exchanged in given groups; what is in none stays as it is."""
    results = list(gradients)
    for bucket in buckets:
        total = all_reduce(np.concatenate([gradients[k].ravel() for k in bucket]))
        for k in bucket:
            results[k] = total[: gradients[k].size].reshape(gradients[k].shape)
            total = total[gradients[k].size :]
    return results


def bucketed(
    order: Callable[[int], list[int]] = lambda n: list(reversed(range(n))),
    closes: Callable[[int, int, int], bool] = lambda held, size, limit: held + size > limit,
    size_of: Callable[[Array], int] = lambda gradient: gradient.nbytes,
    last: bool = True,
) -> Callable[..., list[Array]]:
    """`reduce_in_buckets`, with one thing done otherwise."""

    def wrong(gradients: list[Array], bucket_bytes: int, all_reduce: Any) -> list[Array]:
        buckets: list[list[int]] = [[]]
        held = 0
        for place in order(len(gradients)):
            size = size_of(gradients[place])
            if buckets[-1] and closes(held, size, bucket_bytes):
                buckets.append([])
                held = 0
            buckets[-1].append(place)
            held += size
        return exchanged(gradients, buckets if last else buckets[:-1], all_reduce)

    return wrong


def in_wrong_places(gradients: list[Array], bucket_bytes: int, all_reduce: Any) -> list[Array]:
    results = reduce_in_buckets(gradients, bucket_bytes, all_reduce)
    flat, placed = np.concatenate([each.ravel() for each in reversed(results)]), []
    for each in gradients:
        placed.append(flat[: each.size].reshape(each.shape))
        flat = flat[each.size :]
    return placed


def shapeless(gradients: list[Array], bucket_bytes: int, all_reduce: Any) -> list[Array]:
    return [each.ravel() for each in reduce_in_buckets(gradients, bucket_bytes, all_reduce)]


def run_buckets(answer: Any, gradients: list[Array], bucket_bytes: int) -> dict[str, Any]:
    """All three ranks have the same gradients, so that a sum is three times its term."""
    calls: list[int] = []

    def all_reduce(flat: Array) -> Array:
        if np.ndim(flat) != 1:
            raise ValueError(f"all_reduce takes a flat array, got one of shape {np.shape(flat)}")
        calls.append(len(flat))
        return flat * 3

    results = answer(gradients, bucket_bytes, all_reduce)
    return {"numbers in each call of all_reduce": calls, "gradients": results}


def layers(rng: np.random.Generator) -> Iterator[tuple[list[Array], int]]:
    for shapes, bucket_bytes in (
        ([(4, 3), (3,), (3, 5), (5,)], 80),
        ([(2,), (2,), (2,), (2,), (2,)], 16),
        ([(3, 3), (30,), (2, 2), (1,)], 40),
        ([(2, 3)], 1000),
    ):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        yield grads, bucket_bytes


# debug: the mean of means


def global_gradient(communicator: Communicator, gradient: Tensor, count: int) -> Tensor:
    both = torch.cat([gradient, torch.tensor([count], dtype=gradient.dtype)])
    package_all_reduce(communicator, both)
    return both[:-1] / both[-1]


def averaged(
    how: Callable[[Tensor, int, Tensor, Tensor, int], Tensor],
) -> Callable[[Communicator, Tensor, int], Tensor]:
    """What `how` makes of the own sum and count, the global sum and count, and the ranks."""

    def wrong(communicator: Communicator, gradient: Tensor, count: int) -> Tensor:
        total, counts = gradient.clone(), torch.tensor([float(count)], dtype=gradient.dtype)
        package_all_reduce(communicator, total)
        package_all_reduce(communicator, counts)
        return how(gradient, count, total, counts, communicator.world_size)

    return wrong


def summed_means(divide: bool, least: int = 0) -> Callable[[Communicator, Tensor, int], Tensor]:
    """The sum of the ranks' means, or their mean."""

    def wrong(communicator: Communicator, gradient: Tensor, count: int) -> Tensor:
        mean = gradient / max(count, least)
        package_all_reduce(communicator, mean)
        return mean / communicator.world_size if divide else mean

    return wrong


def run_global(answer: Any, gradients: Array, counts: list[int]) -> list[Any]:
    """A row and a count for each rank; only what the ranks return counts, not their traffic."""

    def work(communicator: Communicator) -> Any:
        rank = communicator.rank
        return answer(communicator, torch.tensor(gradients[rank]), counts[rank])

    results: list[Any] = on_ranks(work, len(counts))["results"]
    return results


def uneven_ranks(rng: np.random.Generator) -> Iterator[tuple[Array, list[int]]]:
    for counts in ([7], [4, 4], [9, 2], [30, 1, 6], [5, 8, 3, 11]):
        yield rng.standard_normal((len(counts), 3)), counts
    gradients = rng.standard_normal((3, 2))
    gradients[1] = 0  # this rank has padding alone
    yield gradients, [6, 0, 2]


QUESTIONS = (
    Predict(
        "distributed.step_bytes",
        points=1,
        reference=step_bytes,
        forbid=(),
        cases=clusters,
        factor=1.000001,
        note="Below twice the gradient for any number of ranks, and the batch has no part in it.",
        mistakes=(
            Mistake(
                "all ranks",
                lambda p, n, width, pieces: 2 * (n - 1) * p * width,
                "That is what all ranks together send; wanted what one of them sends.",
            ),
            Mistake(
                "reduce-scatter alone",
                lambda p, n, width, pieces: (n - 1) / n * p * width,
                "That is the reduce-scatter alone; the sums must get back to everybody.",
            ),
            Mistake(
                "the limit",
                lambda p, n, width, pieces: 2 * p * width,
                "Twice the gradient is what it comes near with many ranks; wanted the exact "
                "number for `ranks`.",
            ),
            Mistake(
                "every micro-batch",
                lambda p, n, width, pieces: 2 * (n - 1) / n * p * width * pieces,
                "Micro-batches add up on each rank; gradients are exchanged once, after the last.",
            ),
            Mistake(
                "four bytes",
                lambda p, n, width, pieces: 2 * (n - 1) / n * p * 4,
                "You count 4 bytes for each number, whatever `number_bytes` says.",
            ),
            Mistake(
                "numbers",
                lambda p, n, width, pieces: 2 * (n - 1) / n * p,
                "You count numbers; wanted bytes.",
            ),
            Mistake(
                "a chunk a round, n rounds",
                lambda p, n, width, pieces: 2 * p * width * (n + 1) / n,
                "There are N - 1 rounds in each half: what a rank has itself, nobody sends it.",
            ),
            Mistake(
                "once",
                lambda p, n, width, pieces: p * width,
                "A ring passes each chunk on: a rank sends more than its gradient once.",
            ),
        ),
    ),
    Implement(
        "distributed.reduce_scatter",
        points=2,
        reference=reduce_scatter,
        forbid=COLLECTIVES,
        cases=even_tensors,
        run=run_scatter,
        note="Half of a ring all-reduce.",
        mistakes=(
            Mistake(
                "replaced",
                scattered(add=False),
                "You put the chunk that comes in the place of your own; add it.",
            ),
            Mistake(
                "one round too few",
                scattered(fewer=1),
                "One round is missing: N ranks need N - 1, so that each has added its part.",
            ),
            Mistake(
                "one round too many",
                scattered(fewer=-1),
                "One round too many: after N - 1 the chunk has come round to who began it, and is "
                "added a second time.",
            ),
            Mistake(
                "the next chunk",
                scattered(first=0, returned=1),
                "You return a finished sum, of chunk rank + 1; rank r is to have chunk r, so begin "
                "with another one.",
            ),
            Mistake(
                "an unfinished chunk",
                scattered(first=0),
                "You return a chunk that not all ranks have added to; which one is finished "
                "depends on the one you begin with.",
            ),
            Mistake(
                "receive before send",
                scattered(receive_first=True),
                "All ranks receive before they send: each waits for the one on its left.",
            ),
            Mistake(
                "always the same chunk",
                scattered(moves=False),
                "You send the same chunk in each round; pass on the one that you have just added "
                "to.",
            ),
            Mistake(
                "mean",
                scattered(mean=True),
                "You return the mean over the ranks; wanted the sum.",
            ),
            Mistake(
                "directly",
                scattered_directly,
                "The sums are right, but each rank sends to all others; in a ring it sends to one.",
            ),
            Mistake(
                "whole tensors",
                scattered_whole,
                "The sums are right, but whole tensors go round the ring; send one chunk a round.",
            ),
        ),
    ),
    Implement(
        "distributed.all_reduce",
        points=3,
        reference=ring_all_reduce,
        forbid=COLLECTIVES,
        cases=odd_tensors,
        run=run_all_reduce,
        note="To the byte what PyTorch's backends send for large tensors.",
        mistakes=(
            Mistake(
                "not gathered",
                reduced(gather=False),
                "After the reduce-scatter each rank has one finished chunk; the other ranks do not "
                "have it yet.",
            ),
            Mistake(
                "added again",
                reduced(add_twice=True),
                "In the all-gather the chunk that comes is finished: it replaces yours, you add "
                "it.",
            ),
            Mistake(
                "one round too few",
                reduced(fewer=1),
                "One round of the all-gather is missing: each rank lacks one finished chunk.",
            ),
            Mistake(
                "gather begins elsewhere",
                reduced(begin=1),
                "Your all-gather begins with a chunk that is not finished: rank r has finished "
                "chunk r.",
            ),
            Mistake(
                "last numbers left out",
                reduced(drop=True),
                "The last numbers are not summed where the size is no multiple of the ranks; "
                "chunks may differ by one number.",
            ),
            Mistake(
                "on a copy",
                reduced(on_copy=True),
                "The caller's tensor is as it was: write the sum into it.",
            ),
            Mistake(
                "mean",
                reduced(mean=True),
                "You leave the mean over the ranks; wanted the sum.",
            ),
            Mistake(
                "receive before send",
                reduced(scatter=scattered(receive_first=True)),
                "All ranks receive before they send: each waits for the one on its left.",
            ),
            Mistake(
                "through one rank",
                through_root,
                "The sums are right and so is the total of bytes, but rank 0 sends and receives "
                "half of them: that is no ring.",
            ),
            Mistake(
                "whole tensors round the ring",
                passed_on,
                "The sums are right, but whole tensors go round the ring: cut them into chunks.",
            ),
            Mistake(
                "padded",
                padded,
                "The sums are right, but you pad the tensor, and the padding travels as well: "
                "chunks need not be of equal size.",
            ),
            Mistake(
                "to everybody",
                to_everybody,
                "The sums are right, but each rank sends its whole tensor to all others.",
            ),
        ),
    ),
    Implement(
        "distributed.buckets",
        points=2,
        reference=reduce_in_buckets,
        forbid=(),
        cases=layers,
        run=run_buckets,
        mistakes=(
            Mistake(
                "one call for each",
                bucketed(closes=lambda held, size, limit: True),
                "You call all_reduce once for each gradient; those that fit together share a call.",
            ),
            Mistake(
                "one call for all",
                bucketed(closes=lambda held, size, limit: False),
                "You call all_reduce once for everything: nothing could be sent before the "
                "backward pass has ended.",
            ),
            Mistake(
                "first to last",
                bucketed(order=lambda n: list(range(n))),
                "You begin with the first parameter, whose gradient is ready last; begin with the "
                "last one.",
            ),
            Mistake(
                "too full",
                bucketed(closes=lambda held, size, limit: held >= limit),
                "Your buckets hold more than `bucket_bytes`: look whether a gradient still fits "
                "before you put it in.",
            ),
            Mistake(
                "never quite full",
                bucketed(closes=lambda held, size, limit: held + size >= limit),
                "A gradient that fills a bucket exactly still fits.",
            ),
            Mistake(
                "numbers for bytes",
                bucketed(size_of=lambda gradient: gradient.size),
                "You count numbers where bytes are meant: a float32 takes four.",
            ),
            Mistake(
                "last bucket not sent",
                bucketed(last=False),
                "Your last bucket is never sent: it is not full when the gradients end.",
            ),
            Mistake(
                "in wrong places",
                in_wrong_places,
                "The sums come back in the order in which you sent them, and you give them to the "
                "parameters in another.",
            ),
            Mistake(
                "flat",
                shapeless,
                "You return flat arrays; each sum has the shape of its gradient.",
            ),
        ),
    ),
    Debug(
        "distributed.global_mean",
        points=2,
        reference=global_gradient,
        forbid=(),
        cases=uneven_ranks,
        run=run_global,
        note="One all-reduce is enough: the count can travel with the gradient.",
        mistakes=(
            Mistake(
                "mean of means",
                summed_means(divide=True),
                "You average the ranks' means, so that a token on a rank with few counts for more "
                "than one on a rank with many.",
            ),
            Mistake(
                "sum of means",
                summed_means(divide=False),
                "You add up as many means as there are ranks.",
            ),
            Mistake(
                "mean of means without the zero",
                summed_means(divide=True, least=1),
                "You only avoid the division by zero; means over unequal numbers of tokens cannot "
                "be averaged.",
            ),
            Mistake(
                "own count",
                averaged(lambda own, count, total, counts, n: total / count),
                "The gradient is summed over all ranks, the count is your own: the ranks end with "
                "different gradients.",
            ),
            Mistake(
                "divided by the ranks, too",
                averaged(lambda own, count, total, counts, n: total / counts / n),
                "The global count has the tokens of all ranks in it already: do not divide by the "
                "number of ranks as well.",
            ),
            Mistake(
                "mean count",
                averaged(lambda own, count, total, counts, n: total / (counts / n)),
                "You divide by the mean number of tokens on a rank; wanted all of them.",
            ),
            Mistake(
                "gradient not summed",
                averaged(lambda own, count, total, counts, n: own / counts),
                "The count is summed over all ranks, the gradient is not: each rank has its own.",
            ),
            Mistake(
                "ranks for tokens",
                averaged(lambda own, count, total, counts, n: total / n),
                "You divide by the number of ranks alone; wanted the number of tokens.",
            ),
            Mistake(
                "not divided",
                averaged(lambda own, count, total, counts, n: total),
                "That is the gradient of the sum over all tokens; wanted that of the mean.",
            ),
        ),
    ),
    Choose(
        "distributed.timeline",
        points=1,
        right="c",
        because="The line can work while the ranks compute: what fits behind the backward pass "
        "costs nothing.",
        wrong={
            "a": "Fewer rows make the computing shorter and leave the bytes as they are: the line "
            "takes a larger share.",
            "b": "A larger latency could be paid less often with larger buckets, but here there is "
            "one bucket already.",
            "d": "Through a server passes what all workers send: with 8 of them its line is the "
            "busiest of all.",
        },
    ),
)
