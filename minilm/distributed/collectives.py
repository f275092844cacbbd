"""What all ranks do together, made of messages from one to one.

All functions work in place, on tensors that are contiguous and have the same shape and dtype on
all ranks, and must be called by all ranks in the same order.
"""

from __future__ import annotations

from torch import Tensor

from minilm.distributed.communication import Communicator
from minilm.errors import ConfigError

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_at_root",
    "broadcast",
    "chunks",
    "reduce_scatter",
]


def chunks(tensor: Tensor, n: int) -> list[Tensor]:
    """Cut a tensor into `n` flat parts that differ by one number at most; some may be empty.

    Returns:
        Views: to write into them is to write into the tensor.

    Raises:
        ConfigError: If the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not "
            "contiguous; use tensor.contiguous()"
        )
    return list(tensor.detach().view(-1).tensor_split(n))


def broadcast(communicator: Communicator, tensor: Tensor, root: int = 0) -> None:
    """Give all ranks the tensor of one, as a tree.

    In each round every rank that has the tensor sends it to one that has not: with 8 ranks all
    have it after 3 rounds. Together they send (ranks - 1) times its bytes.

    Args:
        communicator: Of this rank.
        tensor: What to send; on the other ranks, where to write it.
        root: The rank that has it.
    """
    n = communicator.world_size
    place = (communicator.rank - root) % n  # the root is at place 0
    reach = 1  # the places that have it
    while reach < n:
        if place < reach and place + reach < n:
            communicator.send(tensor, (place + reach + root) % n)
        elif reach <= place < 2 * reach:
            communicator.receive(tensor, (place - reach + root) % n)
        reach *= 2


def all_reduce_at_root(communicator: Communicator, tensor: Tensor, root: int = 0) -> None:
    """Sum a tensor over all ranks the plain way: all send to one, which adds and sends back.

    Together the ranks send 2 (ranks - 1) times its bytes, all of which pass through the root.

    Args:
        communicator: Of this rank.
        tensor: What to add; afterwards, the sum.
        root: The rank that adds.
    """
    others = [rank for rank in range(communicator.world_size) if rank != root]
    if communicator.rank != root:
        communicator.send(tensor, root)
        communicator.receive(tensor, root)
        return
    total, message = tensor.detach(), tensor.detach().clone()
    for rank in others:
        communicator.receive(message, rank)
        total += message
    for rank in others:
        communicator.send(total, rank)


def reduce_scatter(communicator: Communicator, tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, and leave each rank one chunk of the sum.

    The ranks are a ring. In each of `ranks - 1` rounds every rank sends one chunk to the right,
    and adds the one from the left to its own; the chunk it has just added to, it sends next.

    Args:
        communicator: Of this rank.
        tensor: What to add. Afterwards its chunk number `rank` is the sum; the others are not
            of use any more.

    Returns:
        That chunk, flat.

    Source:
        Patarasuk & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002
    """
    rank, n = communicator.rank, communicator.world_size
    parts = chunks(tensor, n)
    for step in range(1, n):
        outgoing, incoming = parts[(rank - step) % n], parts[(rank - step - 1) % n]
        message = incoming.clone()
        exchange(communicator, outgoing, message)
        incoming += message
    return parts[rank]


def all_gather(communicator: Communicator, tensor: Tensor) -> None:
    """Give all ranks all chunks of a tensor of which each rank has one.

    Around the same ring: what came from the left in one round goes to the right in the next.

    Args:
        communicator: Of this rank.
        tensor: Chunk number `rank` is this rank's; the others are written.
    """
    rank, n = communicator.rank, communicator.world_size
    parts = chunks(tensor, n)
    for step in range(n - 1):
        exchange(communicator, parts[(rank - step) % n], parts[(rank - step - 1) % n])


def exchange(communicator: Communicator, outgoing: Tensor, incoming: Tensor) -> None:
    """One round of the ring: send to the right, receive from the left. Empty chunks stay home."""
    rank, n = communicator.rank, communicator.world_size
    if outgoing.numel():
        communicator.send(outgoing, (rank + 1) % n)
    if incoming.numel():
        communicator.receive(incoming, (rank - 1) % n)


def all_reduce(communicator: Communicator, tensor: Tensor) -> None:
    """Sum a tensor over all ranks, around a ring.

    Together the ranks send exactly 2 (ranks - 1) times its bytes, each nearly as many as any
    other. All end with the same bits, for each number of the sum is made once and then copied.

    Args:
        communicator: Of this rank.
        tensor: What to add; afterwards, the sum.

    Example:
        >>> import torch
        >>> from minilm.distributed.communication import simulate
        >>> def work(communicator):
        ...     numbers = torch.arange(5.0) * communicator.rank
        ...     all_reduce(communicator, numbers)
        ...     return numbers.tolist()
        >>> simulate(work, 3).results[1]
        [0.0, 3.0, 6.0, 9.0, 12.0]
    """
    reduce_scatter(communicator, tensor)
    all_gather(communicator, tensor)
