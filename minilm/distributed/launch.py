"""Real processes: what torchrun starts, and starting it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from minilm.distributed.data_parallel import TorchDataParallel
from minilm.errors import ConfigError, DataError, MinilmError
from minilm.training import SingleProcess, Strategy

__all__ = ["launch", "strategy_from_environment"]

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def read_environment(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """What torchrun says in the environment: rank and world size; None if it says nothing.

    Raises:
        ConfigError: If it is not complete, or makes no sense.
    """
    if not {"RANK", "WORLD_SIZE"} & set(environment):
        return None
    known = {name: environment[name] for name in (*NUMBERS, "MASTER_ADDR") if name in environment}
    said = ", ".join(f"{name}={value}" for name, value in known.items())
    missing = [name for name in (*NUMBERS, "MASTER_ADDR") if name not in known]
    if missing:
        raise ConfigError(
            f"the environment says {said}, but not {', '.join(missing)}; start with torchrun, "
            "which sets all of them, or unset RANK and WORLD_SIZE to run one process"
        )
    if not all(known[name].isdecimal() for name in NUMBERS):
        raise ConfigError(f"the environment says {said}; {', '.join(NUMBERS)} must be numbers")
    rank, world_size, port = (int(known[n]) for n in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not rank < world_size or not 0 < port < 65536:
        raise ConfigError(
            f"the environment says {said}; wanted RANK below WORLD_SIZE and MASTER_PORT from 1 to "
            "65535"
        )
    return rank, world_size


@contextmanager
def strategy_from_environment(timeout: float = 600.0) -> Iterator[Strategy]:
    """Within the block, this process is one of those that torchrun started; or it is alone.

    Without torchrun: `SingleProcess()`. With it: `TorchDataParallel()`, over gloo between CPUs and
    over NCCL between GPUs (which was not run here: there was no GPU). Errors say the rank.

    Args:
        timeout: Seconds that a rank waits for the others, before it gives up.

    Raises:
        ConfigError: If the environment names a rank, but not all that it needs.
        DataError: If the other ranks do not answer, or are gone.

    Example:
        >>> from minilm.training import PRESETS, train
        >>> with strategy_from_environment() as strategy:
        ...     strategy.world_size
        1
    """
    found = read_environment(os.environ)
    if found is None:
        yield SingleProcess()
        return
    where = f"rank {found[0]} of {found[1]}"
    limit = timedelta(seconds=timeout)
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit)
        else:
            dist.init_process_group("gloo", timeout=limit)
        yield TorchDataParallel()
        dist.barrier()  # nobody leaves while another still needs it
    except MinilmError as error:
        raise type(error)(f"{where}: {error}") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DataError(
            f"{where} has lost the others, or they did not answer within {timeout:g} s: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(arguments: Sequence[str], processes: int, timeout: float = 600.0) -> str:
    """Run a Python script or module in several processes on this machine, under torchrun.

    Args:
        arguments: As after `python`: ("-m", "minilm", "train", ...), or ("script.py", ...).
        processes: How many.
        timeout: Seconds that all may take; then they are ended.

    Returns:
        What the processes printed.

    Raises:
        ConfigError: If `processes` or `timeout` make no sense.
        DataError: If a process fails or is killed: with its rank, and the end of what it said. If
            the time is over. No process is left in any case.
    """
    if processes < 1 or timeout <= 0:
        raise ConfigError(f"processes={processes}, timeout={timeout}; use at least 1, and above 0")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(processes), *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    ) as torchrun:
        try:
            printed, errors = torchrun.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"{processes} processes have not ended within {timeout:g} s and were stopped; "
                "look for a rank that waits for a message which nobody sends, or allow more time"
            ) from error
        finally:
            end(torchrun)
    if torchrun.returncode != 0:
        raise DataError(failure(errors, processes))
    return printed


def end(torchrun: subprocess.Popen[str], patience: float = 40.0) -> None:
    """End torchrun if it still runs. It ends its processes first, with SIGKILL after 30 s."""
    if torchrun.poll() is None:
        torchrun.terminate()
        try:
            torchrun.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            torchrun.kill()


def failure(errors: str, processes: int) -> str:
    """Say which rank failed first, from what torchrun and the processes wrote to stderr."""
    ended = re.findall(r"rank +: (\d+) \(local_rank.*\n +exitcode +: (-?\d+)", errors)
    codes = [(int(rank), int(code)) for rank, code in ended]  # the last one is the first to fail
    killed = [(rank, code) for rank, code in codes if code < 0 and code != -signal.SIGTERM]
    own = re.split(r"^[EW]\d{4} .*torch/distributed/", errors, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in own.splitlines() if line.strip()]
    if killed:
        rank, code = killed[0]
        return f"rank {rank} of {processes} was killed by {signal.Signals(-code).name}"
    if not codes:
        return f"torchrun failed: {(errors.strip().splitlines() or ['it said nothing'])[-1]}"
    rank, code = codes[-1]
    its_own = [line for line in lines if f"rank {rank} of" in line or f"[rank{rank}]:" in line]
    words = (its_own or lines or ["it said nothing"])[-1]
    return f"rank {rank} of {processes} failed with exit code {code}: {words}"
