"""Ranks, and the messages between them.

A function that is written for a `Communicator` runs on threads in a notebook (`simulate`) and in
processes on any number of machines (`TorchCommunicator` under torchrun), without a change.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from minilm.errors import ConfigError, DataError

__all__ = [
    "Communicator",
    "Simulation",
    "TorchCommunicator",
    "Traffic",
    "simulate",
]


@runtime_checkable
class Communicator(Protocol):
    """What a process needs to work with others. One thread at a time may use it.

    Attributes:
        rank: Which process this is, from 0.
        world_size: How many processes there are.
    """

    rank: int
    world_size: int

    def send(self, tensor: Tensor, to: int) -> None:
        """Send what a tensor holds now. It is copied: the tensor may change at once."""

    def receive(self, tensor: Tensor, source: int) -> None:
        """Wait for the next message of a rank, and write it into a tensor of the same shape."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""


def check_peer(communicator: Communicator, peer: int) -> None:
    """Raise `ConfigError` unless a rank can exchange messages with `peer`."""
    rank, world_size = communicator.rank, communicator.world_size
    if not 0 <= peer < world_size or peer == rank:
        raise ConfigError(
            f"rank {rank} of {world_size} has no peer {peer}; use another of 0 to "
            f"{world_size - 1}, such as (rank + 1) % world_size"
        )


# Ranks in a notebook: threads


@dataclass(frozen=True, eq=False)
class Traffic:
    """What went over a network.

    Attributes:
        bytes: Of the messages from each rank (row) to each (column).
        messages: How many there were.
    """

    bytes: Int64[np.ndarray, "ranks ranks"]
    messages: Int64[np.ndarray, "ranks ranks"]

    @property
    def total(self) -> int:
        """Bytes that all ranks together sent."""
        return int(self.bytes.sum())

    @property
    def sent(self) -> list[int]:
        """Bytes that each rank sent."""
        return [int(n) for n in self.bytes.sum(axis=1)]

    @property
    def received(self) -> list[int]:
        """Bytes that were sent to each rank."""
        return [int(n) for n in self.bytes.sum(axis=0)]


@dataclass(frozen=True, eq=False)
class Simulation:
    """How a simulation ended.

    Attributes:
        results: What the function returned, by rank.
        traffic: What went over the network.
    """

    results: list[Any]
    traffic: Traffic


class Stopped(BaseException):
    """Ends a simulated rank, because another one has failed."""


class Network:
    """The mail between simulated ranks: who sent what to whom, and who waits.

    Args:
        ranks: How many.
        latency: Seconds that each message takes, besides its bytes.
        bandwidth: Bytes a second that a rank can send; and as many that it can receive.
    """

    def __init__(self, ranks: int, latency: float = 0.0, bandwidth: float = float("inf")) -> None:
        self.ranks, self.latency, self.bandwidth = ranks, latency, bandwidth
        self.lock = threading.Lock()  # guards all that follows
        self.bells = [threading.Condition(self.lock) for _ in range(ranks + 1)]  # to wake each one
        self.mail: dict[tuple[int, int], deque[tuple[float, Tensor]]] = defaultdict(deque)
        self.free: dict[tuple[str, int], float] = defaultdict(float)  # when a line is
        self.waiting: dict[int, tuple[str, Callable[[], bool]]] = {}
        self.begun: set[int] = set()
        self.ended: set[int] = set()
        self.arrived: set[int] = set()  # at the barrier
        self.barriers = 0  # that all have passed
        self.failures: dict[int, BaseException] = {}
        self.problem = ""  # that no rank is to blame for alone
        self.traffic = Traffic(
            np.zeros((ranks, ranks), np.int64), np.zeros((ranks, ranks), np.int64)
        )

    @property
    def stopped(self) -> bool:
        """Whether all must end, because one has failed or none can go on."""
        return bool(self.failures or self.problem)

    def wake_all(self) -> None:
        """Let everybody look again whether what they wait for is there; `lock` must be held."""
        for bell in self.bells:
            bell.notify_all()

    def begin(self, rank: int) -> None:
        """Before a rank's first message: wait until all ranks are about to send their first."""
        with self.lock:
            if rank not in self.begun:
                self.begun.add(rank)
                self.wake_all()
                self.bells[rank].wait_for(
                    lambda: self.stopped or len(self.begun | self.ended) == self.ranks
                )

    def post(self, source: int, to: int, message: Tensor) -> None:
        """Take a message from a rank; when it arrives depends on what else is on the two lines."""
        with self.lock:
            if self.stopped:
                raise Stopped
            begin = max(time.monotonic(), self.free["from", source], self.free["to", to])
            arrival = begin + self.latency + message.nbytes / self.bandwidth
            self.free["from", source] = self.free["to", to] = arrival
            self.mail[source, to].append((arrival, message))
            self.traffic.bytes[source, to] += message.nbytes
            self.traffic.messages[source, to] += 1
            self.bells[to].notify_all()

    def take(self, source: int, to: int) -> Tensor:
        """Wait for the next message from a rank to another."""
        with self.lock:
            mail = self.mail[source, to]
            self.wait(to, f"a message from rank {source}", lambda: bool(mail))
            arrival, message = mail.popleft()
            if arrival > time.monotonic():  # still on its way
                self.bells[to].wait_for(lambda: self.stopped, arrival - time.monotonic())
            return message

    def meet(self, rank: int) -> None:
        """Wait at the barrier."""
        with self.lock:
            self.arrived.add(rank)
            passed = self.barriers
            if len(self.arrived) == self.ranks:
                self.arrived.clear()
                self.barriers += 1
                self.wake_all()
            self.wait(rank, "all others at the barrier", lambda: self.barriers > passed)

    def wait(self, rank: int, what: str, ready: Callable[[], bool]) -> None:
        """Wait until something is ready, or can never be; `lock` must be held."""
        if rank in self.waiting:
            raise ConfigError(f"two threads of rank {rank} wait for messages; use one")
        self.waiting[rank] = what, ready
        self.look_for_deadlock()
        self.bells[rank].wait_for(lambda: self.stopped or ready())
        del self.waiting[rank]
        if self.stopped:
            raise Stopped

    def look_for_deadlock(self) -> None:
        """Stop all if every rank has ended or waits for what nobody is left to send."""
        blocked = {rank for rank, (_, ready) in self.waiting.items() if not ready()}
        if blocked and not self.stopped and len(blocked | self.ended) == self.ranks:
            self.problem = "; ".join(
                f"rank {rank} waits for {self.waiting[rank][0]}"
                if rank in blocked
                else f"rank {rank} has ended"
                for rank in range(self.ranks)
            )
            self.wake_all()

    def watch(self, ranks: set[int], enough: set[int], deadline: float) -> None:
        """Wait until ranks have ended, or are among `enough`; after the deadline, stop all."""
        with self.lock:
            self.bells[-1].wait_for(
                lambda: self.stopped or ranks <= self.ended | enough, deadline - time.monotonic()
            )
            late = ranks - self.ended - enough
            if late and not self.stopped:
                busy = min(late - set(self.waiting), default=min(late))
                self.problem = f"the time is over, and rank {busy} has not ended"
                self.wake_all()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self.lock:
            if len(self.ended) < self.ranks:
                self.problem = self.problem or "it was interrupted"
            self.wake_all()

    def end(self, rank: int, failure: BaseException | None) -> None:
        """Note that a rank has returned or failed."""
        with self.lock:
            if failure is not None and not isinstance(failure, Stopped):
                self.failures[rank] = failure
            self.ended.add(rank)
            self.look_for_deadlock()
            self.wake_all()


class SimulatedCommunicator:
    """The `Communicator` of one thread of a simulation.

    Args:
        network: Of the simulation.
        rank: Of the thread.
    """

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank, self.world_size = network, rank, network.ranks

    def send(self, tensor: Tensor, to: int) -> None:
        """Send what a tensor holds now, without waiting.

        Raises:
            ConfigError: If there is no such rank, or it is this one.
        """
        check_peer(self, to)
        self.network.begin(self.rank)
        self.network.post(self.rank, to, tensor.detach().clone())

    def receive(self, tensor: Tensor, source: int) -> None:
        """Wait for the next message of a rank, and write it into a tensor.

        Raises:
            ConfigError: If there is no such rank, or shape or dtype are not the message's.
        """
        check_peer(self, source)
        self.network.begin(self.rank)
        message = self.network.take(source, self.rank)
        if (tensor.shape, tensor.dtype) != (message.shape, message.dtype):
            raise ConfigError(
                f"rank {source} sent {message.dtype} of shape {tuple(message.shape)}, rank "
                f"{self.rank} receives {tensor.dtype} of shape {tuple(tensor.shape)}; make them "
                "equal"
            )
        with torch.no_grad():
            tensor.copy_(message)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.network.begin(self.rank)
        self.network.meet(self.rank)


def simulate(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 30.0,
    latency: float = 0.0,
    bandwidth: float = float("inf"),
) -> Simulation:
    """Run a function once for each rank, on threads that exchange messages.

    Each rank computes with one thread of PyTorch. Threads share PyTorch's generator of random
    numbers. Until its first message each rank runs alone, in the order of ranks, so that weights
    that are drawn from a seed there are the seed's. What is drawn later, such as dropout, depends
    on who comes first; processes do not have this problem, and `torch.Generator` avoids it.
    The generator is afterwards what it was before.

    Args:
        fn: Called as `fn(communicator, *args)`.
        ranks: How many.
        args: The same objects for all ranks: copy what a rank changes.
        timeout: Seconds that the whole may take.
        latency: Seconds that each message takes, besides its bytes; 0: none.
        bandwidth: Bytes a second that each rank can send, and receive; default: no limit.

    Raises:
        ConfigError: If a number makes no sense.
        DataError: If a rank raises an error, which is then the cause; if no rank can go on,
            at once; if not all have ended in time. A rank that computes without end cannot be
            stopped from outside: its thread goes on until its next message.

    Example:
        >>> def ring(communicator):
        ...     rank, n = communicator.rank, communicator.world_size
        ...     communicator.send(torch.tensor(rank), (rank + 1) % n)
        ...     communicator.receive(left := torch.tensor(0), (rank - 1) % n)
        ...     return int(left)
        >>> done = simulate(ring, 3)
        >>> done.results, done.traffic.sent
        ([2, 0, 1], [8, 8, 8])
    """
    if ranks < 1 or timeout <= 0 or latency < 0 or not bandwidth > 0:
        raise ConfigError(
            f"ranks={ranks}, timeout={timeout}, latency={latency}, bandwidth={bandwidth}; use at "
            "least 1 rank, a time-out and a bandwidth above 0 and a latency of at least 0"
        )
    network = Network(ranks, latency, bandwidth)
    results: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        failure: BaseException | None = None
        torch.set_num_threads(1)
        try:
            results[rank] = fn(SimulatedCommunicator(network, rank), *args)
        except BaseException as error:  # noqa: BLE001  whatever it is, all must end
            failure = error
        network.end(rank, failure)

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(ranks)
    ]
    n_threads, deadline = torch.get_num_threads(), time.monotonic() + timeout
    torch.set_num_threads(1)  # what a rank's own threads begin with
    with torch.random.fork_rng(devices=[]):
        try:
            for rank, thread in enumerate(threads):
                thread.start()
                network.watch({rank}, network.begun, deadline)
            network.watch(set(range(ranks)), set(), deadline)
        finally:  # also after Ctrl-C
            network.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline + 1 - time.monotonic()))
            torch.set_num_threads(n_threads)
    if network.failures:
        rank, error = min(network.failures.items())
        raise DataError(
            f"rank {rank} of {ranks} failed: {type(error).__name__}: {error}"
        ) from error
    if network.problem:
        raise DataError(f"{ranks} ranks cannot go on: {network.problem}")
    return Simulation(results, network.traffic)


# Ranks that are processes


class TorchCommunicator:
    """The `Communicator` of this process among those that `torch.distributed` knows.

    Messages go from memory to memory of the machines (gloo), also those of tensors on a GPU: this
    is for understanding and for small things. What NCCL moves from GPU to GPU is
    `minilm.distributed.data_parallel.TorchDataParallel`'s.

    Before a process ends, it must call `barrier()`, so that its last messages are delivered.

    Raises:
        ConfigError: If there is no process group.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "there is no process group; start with torchrun and use "
                "minilm.distributed.launch.strategy_from_environment"
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.sending: dict[int, tuple[dist.Work | None, Tensor]] = {}

    def send(self, tensor: Tensor, to: int) -> None:
        """Send what a tensor holds now; wait only until an earlier message to that rank is taken.

        Raises:
            ConfigError: If there is no such rank, or it is this one.
        """
        check_peer(self, to)
        self.await_delivery(to)
        message = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.sending[to] = dist.isend(message, to), message

    def receive(self, tensor: Tensor, source: int) -> None:
        """Wait for the next message of a rank, and write it into a tensor.

        Raises:
            ConfigError: If there is no such rank, or it is this one.
            DataError: If it is gone, or sends nothing within the time-out of the process group.
        """
        check_peer(self, source)
        message = torch.empty(tensor.shape, dtype=tensor.dtype)
        try:
            dist.recv(message, source)
        except RuntimeError as error:
            raise DataError(f"rank {self.rank} waits for rank {source} in vain: {error}") from error
        with torch.no_grad():
            tensor.copy_(message)

    def barrier(self) -> None:
        """Wait until all ranks are here, and this one's messages are delivered."""
        for to in list(self.sending):
            self.await_delivery(to)
        dist.barrier()

    def await_delivery(self, to: int) -> None:
        """Wait until a rank has received what was sent to it."""
        work, _ = self.sending.pop(to, (None, None))
        if work is not None:
            work.wait()
