"""Other roads than summing gradients in each step: to average now and then, or not to wait.

`LocalSGD` and `parameter_server` are here to be compared with data parallelism. Both send less, or
wait less, and both compute something else than one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from minilm.distributed.collectives import all_reduce
from minilm.distributed.communication import Communicator
from minilm.distributed.data_parallel import NaiveDataParallel
from minilm.errors import ConfigError
from minilm.model import Transformer
from minilm.optim import OptimizerConfig

__all__ = ["LocalSGD", "average_weights", "parameter_server"]


def average_weights(communicator: Communicator, model: nn.Module) -> None:
    """Replace the weights of all ranks by their mean.

    Args:
        communicator: Of this rank.
        model: Of the same form on all ranks; changed in place.
    """
    with torch.no_grad():
        for p in model.parameters():
            all_reduce(communicator, p.div_(communicator.world_size))


class LocalSGD(NaiveDataParallel):
    """Each rank takes steps of its own; every so many steps, all take the mean of their weights.

    With `every=1` and plain SGD this is data parallelism. With as many as the run has steps it is
    the average of models that were trained independently, but from the same first weights.

    A checkpoint is of rank 0's weights: let `checkpoint_every` and `eval_every` of a run be
    multiples of `every`. State of optimizers, such as momentum, stays with its rank.

    Args:
        communicator: Of this rank.
        every: Steps between two averages.
        device: Where to compute; default: the CPU.

    Raises:
        ConfigError: If `every` is not at least 1.

    Source:
        Stich 2019, https://arxiv.org/abs/1805.09767
    """

    def __init__(
        self, communicator: Communicator, every: int, device: torch.device | None = None
    ) -> None:
        super().__init__(communicator, device)
        if every < 1:
            raise ConfigError(f"every={every}; use at least 1 step between two averages")
        self.every, self.steps = every, 0

    def optimizer(self, model: Transformer, config: OptimizerConfig) -> Optimizer:
        """Build the optimizer of this rank, and average after every so many of its steps."""
        optimizer = super().optimizer(model, config)

        def after_step(*_: object) -> None:
            self.steps += 1
            if self.steps % self.every == 0:
                average_weights(self.communicator, model)

        optimizer.register_step_post_hook(after_step)
        return optimizer

    def reduce_gradients(self, model: nn.Module) -> None:
        """Make of this rank's part of the mean over all tokens the mean over its own.

        Exactly so if all ranks have as many tokens; if not, weights count by tokens in the average.
        """
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= self.world_size

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
        """Clip this rank's gradients; return the mean norm, so that all or none take the step."""
        return self.sum(super().clip_gradients(model, max_norm)) / self.world_size


def parameter_server(
    communicator: Communicator,
    model: nn.Module,
    optimizer: Optimizer,
    backward: Callable[[nn.Module, int], None],
    updates: int,
) -> list[int]:
    """Rank 0 keeps the weights; each of the others sends it gradients, and waits for nobody else.

    The server steps with each gradient that comes in, and answers with the weights as they are
    then. Meanwhile the other workers compute with older ones: their gradients are stale. A real
    server takes the gradient that comes first. This one takes the workers' in turns, so that a run
    can be repeated; a gradient is then `workers - 1` updates old, except for the first ones.

    Args:
        communicator: Of this rank; at least two ranks.
        model: Of the same form and with the same weights on all ranks. Rank 0's is trained.
        optimizer: Of `model`; only rank 0's is used.
        backward: Computes on a worker: called with the model and the number of the update, it
            leaves gradients in the parameters, which have none before.
        updates: How many steps the server takes.

    Returns:
        On rank 0, how many updates old the weights of each gradient were; elsewhere, nothing.

    Raises:
        ConfigError: If there is no worker.

    Source:
        Dean et al. 2012, https://papers.nips.cc/paper/4687-large-scale-distributed-deep-networks
    """
    rank, workers = communicator.rank, communicator.world_size - 1
    if workers < 1:
        raise ConfigError("a parameter server on 1 rank has no worker; use at least 2 ranks")
    params = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in params]
    flat = torch.cat([p.detach().view(-1) for p in params])  # a message
    staleness, seen = [], [0] * (workers + 1)  # updates in each worker's weights
    for update in range(updates):
        worker = 1 + update % workers
        if rank == worker:
            optimizer.zero_grad()
            backward(model, update)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            communicator.send(torch.cat([g.reshape(-1) for g in gradients]), 0)
            communicator.receive(flat, 0)
            with torch.no_grad():
                for p, piece in zip(params, flat.split_with_sizes(sizes), strict=True):
                    p.copy_(piece.view_as(p))
        elif rank == 0:
            communicator.receive(flat, worker)
            for p, piece in zip(params, flat.split_with_sizes(sizes), strict=True):
                p.grad = piece.view_as(p)
            optimizer.step()
            communicator.send(torch.cat([p.detach().view(-1) for p in params]), worker)
            staleness.append(update - seen[worker])
            seen[worker] = update + 1
    return staleness
