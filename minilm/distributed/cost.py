"""What parallel work takes: two laws of speed-up, and the seconds of an all-reduce.

The alpha-beta model: a message takes `alpha` seconds, and `beta` seconds for each of its bytes.

Source:
    Hockney 1994, https://doi.org/10.1016/S0167-8191(06)80021-9
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilm.errors import ConfigError

__all__ = ["amdahl", "fit_alpha_beta", "gustafson", "ring_seconds", "root_seconds"]


def amdahl(serial: float, ranks: int) -> float:
    """How much faster one job is on several processes.

    Args:
        serial: Share of its time on one process that cannot be divided, 0 to 1.
        ranks: Processes.

    Returns:
        Seconds on one process over seconds on all; below `1 / serial` for any number of them.

    Raises:
        ConfigError: If a number makes no sense.

    Source:
        Amdahl 1967, https://doi.org/10.1145/1465482.1465560
    """
    _check(serial, ranks)
    return 1 / (serial + (1 - serial) / ranks)


def gustafson(serial: float, ranks: int) -> float:
    """How much more work several processes do in the same time, if the job grows with them.

    Args:
        serial: Share of the time on all processes that is not divided, 0 to 1.
        ranks: Processes.

    Returns:
        Work over the work of one process.

    Raises:
        ConfigError: If a number makes no sense.

    Source:
        Gustafson 1988, https://doi.org/10.1145/42411.42415
    """
    _check(serial, ranks)
    return serial + (1 - serial) * ranks


def _check(serial: float, ranks: int) -> None:
    if not 0 <= serial <= 1 or ranks < 1:
        raise ConfigError(f"serial={serial}, ranks={ranks}; use 0 <= serial <= 1 <= ranks")


def ring_seconds(size: int | float, ranks: int, alpha: float, beta: float) -> float:
    """Seconds of a ring all-reduce: 2 (ranks - 1) rounds, in each of which chunks move at once.

    For large tensors this is close to `2 * size * beta`, for any number of ranks.

    Args:
        size: Bytes of the tensor.
        ranks: Processes.
        alpha: Seconds of a message, besides its bytes.
        beta: Seconds of a byte: one over the bandwidth.
    """
    return 2 * (ranks - 1) * (alpha + beta * size / ranks)


def root_seconds(size: int | float, ranks: int, alpha: float, beta: float) -> float:
    """Seconds of an all-reduce through one rank, which takes one message after the other.

    As many bytes as around the ring, but all on one line. Arguments as in `ring_seconds`.
    """
    return 2 * (ranks - 1) * (alpha + beta * size)


def fit_alpha_beta(
    sizes: Sequence[int | float], seconds: Sequence[float], ranks: int
) -> tuple[float, float]:
    """Find the alpha and the beta with which `ring_seconds` is closest to what was measured.

    Relative errors count, so that small messages decide on alpha and large ones on beta.

    Args:
        sizes: Bytes of each tensor.
        seconds: What its all-reduce took.
        ranks: Processes, the same for all.

    Returns:
        Alpha in seconds and beta in seconds for a byte, none below 0.

    Raises:
        ConfigError: If there are fewer than two sizes, or one process.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds) or ranks < 2 or min(seconds) <= 0:
        raise ConfigError(
            f"{len(sizes)} sizes, {len(seconds)} times, ranks={ranks}; use at least two different "
            "sizes, a time above 0 for each, and at least two ranks"
        )
    measured = np.asarray(seconds, dtype=np.float64)
    rounds = np.full_like(measured, 2 * (ranks - 1))
    columns = np.stack([rounds, rounds * np.asarray(sizes) / ranks], axis=1) / measured[:, None]
    alpha, beta = np.linalg.lstsq(columns, np.ones_like(measured), rcond=None)[0]
    if min(alpha, beta) < 0:  # the best that is possible has one of them at 0
        only = [float(c.sum() / (c @ c)) for c in columns.T]
        misses = [float(((c * x - 1) ** 2).sum()) for c, x in zip(columns.T, only, strict=True)]
        alpha, beta = (only[0], 0.0) if misses[0] < misses[1] else (0.0, only[1])
    return float(alpha), float(beta)
