"""Data parallelism: every process has the whole model and a part of each batch.

Three strategies for `minilm.training.train`: one that a page explains, one that is fast, and
PyTorch's. All of them *sum* gradients, because the loop divides each loss by the number of tokens
in the global batch. So it does not matter which process has how many of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from minilm.device import default_device
from minilm.distributed.collectives import all_reduce, broadcast
from minilm.distributed.communication import Communicator
from minilm.errors import ConfigError
from minilm.model import Transformer
from minilm.optim import OptimizerConfig, build_optimizer, clip_gradients

__all__ = [
    "DataParallel",
    "NaiveDataParallel",
    "TorchDataParallel",
    "make_buckets",
    "sum_gradients",
]

BUCKET_BYTES = 1 << 20


def sum_gradients(communicator: Communicator, params: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of some parameters by their sums over all ranks, in one message.

    A rank on which a parameter has no gradient contributes zeros. A parameter that has none on
    any rank keeps none, as in one process: the zeros are negative ones, and in IEEE 754 a sum is
    -0.0 only if all its terms are.

    Args:
        communicator: Of this rank.
        params: The same ones on all ranks, of one dtype and device.
    """
    flat = torch.cat(
        [
            torch.full_like(p, -0.0).reshape(-1) if p.grad is None else p.grad.reshape(-1) + 0.0
            for p in params
        ]
    )
    all_reduce(communicator, flat)
    for p, piece in zip(params, flat.split_with_sizes([p.numel() for p in params]), strict=True):
        unused = bool(((piece == 0) & piece.signbit()).all())
        p.grad = None if unused else piece.view_as(p)


def make_buckets(params: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Group parameters, the last ones first: their gradients are ready first.

    Args:
        params: In the order in which the forward pass uses them.
        bucket_bytes: A bucket is full when it holds so much; the last parameter may exceed it.

    Returns:
        Buckets of one dtype and device each.
    """
    buckets: list[list[nn.Parameter]] = []
    for p in reversed(params):
        last = buckets[-1] if buckets else []
        alike = bool(last) and (last[0].dtype, last[0].device) == (p.dtype, p.device)
        if alike and sum(q.nbytes for q in last) < bucket_bytes:
            last.append(p)
        else:
            buckets.append([p])
    return buckets


class NaiveDataParallel:
    """The strategy in its plainest form: after the backward pass, one sum for each parameter.

    Args:
        communicator: Of this rank.
        device: Where to compute; default: the CPU.
    """

    def __init__(self, communicator: Communicator, device: torch.device | None = None) -> None:
        self.communicator, self.device = communicator, device or torch.device("cpu")
        self.rank, self.world_size = communicator.rank, communicator.world_size

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give all ranks the weights of rank 0; return the model as it is."""
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast(self.communicator, tensor)
        return model

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Optimizer:
        """Build the whole optimizer: all ranks take the same step."""
        return build_optimizer(model, config)

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Do nothing around a micro-batch."""
        return nullcontext()

    def reduce_gradients(self, model: nn.Module) -> None:
        """Sum all gradients over all ranks, one after the other."""
        for p in model.parameters():
            if p.requires_grad:
                sum_gradients(self.communicator, [p])

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
        """Clip all there is: it is the same on all ranks."""
        return clip_gradients(model.parameters(), max_norm)

    def sum(self, numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sum a few numbers over all ranks; a new tensor."""
        total = numbers.detach().clone()
        all_reduce(self.communicator, total)
        return total

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.communicator.barrier()


class DataParallel(NaiveDataParallel):
    """The strategy as it is done: few large messages, while the backward pass goes on.

    Parameters are grouped into buckets. When the last gradient of a bucket is there, a second
    thread sums it over all ranks, and the backward pass goes on with the parameters before it.
    Buckets go out in one fixed order, so that all ranks speak of the same one at the same time,
    whatever order their gradients come in; those that a parameter without a gradient keeps waiting
    go out after the backward pass.

    Args:
        communicator: Of this rank.
        device: Where to compute; default: the CPU.
        bucket_bytes: Of gradients in a message; 0: each parameter alone.
        overlap: Whether to send while the backward pass goes on, or only after it.

    Raises:
        ConfigError: If `bucket_bytes` is negative.

    Source:
        Li et al. 2020, https://arxiv.org/abs/2006.15704
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        overlap: bool = True,
    ) -> None:
        super().__init__(communicator, device)
        if bucket_bytes < 0:
            raise ConfigError(f"bucket_bytes={bucket_bytes}; use at least 0")
        self.bucket_bytes, self.overlap = bucket_bytes, overlap
        self.buckets: list[list[nn.Parameter]] = []
        self.missing: list[int] = []  # gradients that each bucket still waits for
        self.sent: list[Future[None]] = []  # what has become of the first buckets
        self.thread: ThreadPoolExecutor | None = None  # while gradients are exchanged

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give all ranks the weights of rank 0, and be told of each gradient that is ready."""
        super().prepare(model)
        self.buckets = make_buckets(
            [p for p in model.parameters() if p.requires_grad], self.bucket_bytes
        )
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                hook = partial(self.ready, number)
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return model

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around the last micro-batch of a step, exchange gradients as they become ready."""
        return self.exchange() if last else nullcontext()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Within the block, send each bucket when it is ready; at its end, all have been summed."""
        self.missing, self.sent = [len(bucket) for bucket in self.buckets], []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"rank {self.rank} sends")
        try:
            yield
            self.send_buckets(self.thread, len(self.buckets))
            for future in self.sent:
                future.result()
        finally:
            self.thread.shutdown(wait=False, cancel_futures=True)
            self.thread = None

    def ready(self, number: int, param: Tensor) -> None:
        """A bucket's gradient of one more parameter is ready; send all whose turn it is."""
        if self.thread is not None:
            self.missing[number] -= 1
            if self.overlap:
                waiting = (k for k, missing in enumerate(self.missing) if missing)
                self.send_buckets(self.thread, next(waiting, len(self.buckets)))

    def send_buckets(self, thread: ThreadPoolExecutor, end: int) -> None:
        """Have the thread sum the buckets up to number `end`, but for those it already has."""
        for bucket in self.buckets[len(self.sent) : end]:
            self.sent.append(thread.submit(sum_gradients, self.communicator, bucket))

    def reduce_gradients(self, model: nn.Module) -> None:
        """Leave the gradients: the backward pass has summed them."""


class TorchDataParallel:
    """The strategy by PyTorch's `DistributedDataParallel`, over gloo or NCCL.

    Args:
        device: Where to compute; default: GPU number LOCAL_RANK where there is one, else the CPU.
        communication_hook: What exchanges a bucket instead of an all-reduce in its own precision,
            such as `fp16_compress_hook` or `powerSGD_hook` of
            `torch.distributed.algorithms.ddp_comm_hooks`. (`bf16_compress_hook` needs NCCL.)
        hook_state: What the hook is called with, such as a `PowerSGDState`.
        options: Of `DistributedDataParallel`, such as `find_unused_parameters=True`: without it,
            a parameter that gets no gradient is an error in the next step.

    Raises:
        ConfigError: If there is no process group.

    Source:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    def __init__(
        self,
        device: torch.device | None = None,
        communication_hook: Callable[..., Any] | None = None,
        hook_state: object = None,
        **options: Any,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError("there is no process group; use strategy_from_environment")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = local_device() if device is None else device
        self.hook, self.hook_state, self.options = communication_hook, hook_state, options
        self.wrapped: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the model: its backward pass then leaves the mean of the ranks' gradients."""
        self.wrapped = DistributedDataParallel(model, **self.options)
        if self.hook is not None:
            self.wrapped.register_comm_hook(self.hook_state, self.hook)
        return self.wrapped

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Optimizer:
        """Build the whole optimizer: all ranks take the same step."""
        return build_optimizer(model, config)

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Exchange nothing before the last micro-batch of a step."""
        return nullcontext() if last or self.wrapped is None else self.wrapped.no_sync()

    def reduce_gradients(self, model: nn.Module) -> None:
        """Make sums of the means that the backward pass has left."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, self.world_size)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
        """Clip all there is: it is the same on all ranks."""
        return clip_gradients(model.parameters(), max_norm)

    def sum(self, numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sum a few numbers over all ranks; a new tensor."""
        total = numbers.detach().clone()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()


def local_device() -> torch.device:
    """The GPU that is this process's on its machine, else the CPU."""
    device = default_device()
    number = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", number) if device.type == "cuda" else device
