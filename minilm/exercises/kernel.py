"""A fresh Jupyter kernel for code that nobody has read: started, fed cell by cell, and killed."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

__all__ = ["Kernel", "KernelGone"]

POSIX = os.name == "posix"
START_SECONDS = 60.0  # for a kernel to answer; 1 s is usual
GRACE_SECONDS = 3.0  # for an interrupted cell to end before the kernel is killed
QUIET_SECONDS = 1.0  # the cell has replied and nothing more comes: its last message was lost
IPC_LIMIT = 90  # characters; systems allow about 100 in the path of a socket
OUTPUT_LIMIT = 5_000_000  # characters that one cell may print


class KernelGone(Exception):  # noqa: N818  it reports an end, which may be what the code wanted
    """The kernel runs no more cells; the text says why."""


class Kernel:
    """One kernel in a process group of its own, which ends with the `with` block.

    Args:
        folder: An empty folder for the kernel's files; the code runs in `work` inside it.
        environment: Added to the environment variables of this process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def __enter__(self) -> "Kernel":
        work = self.folder / "work"
        work.mkdir()
        sockets = str(self.folder / "socket")
        ipc = POSIX and len(sockets) < IPC_LIMIT  # a file is no port that another could take
        file, _ = write_connection_file(
            str(self.folder / "kernel.json"),
            transport="ipc" if ipc else "tcp",
            ip=sockets if ipc else "127.0.0.1",
            key=os.urandom(16).hex().encode(),
        )
        environment = os.environ | self.environment | {"IPYTHONDIR": str(self.folder / "ipython")}
        if POSIX:
            environment["JPY_PARENT_PID"] = str(os.getpid())  # the kernel ends when we are killed
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ipykernel_launcher", "-f", file],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=POSIX,
        )
        self.client: Any = BlockingKernelClient(connection_file=file)
        self.client.load_connection_file()
        self.client.start_channels(stdin=False, hb=False)
        try:
            self._wait_for_start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the kernel and what it started, and nothing else."""
        self.client.stop_channels()
        if POSIX:  # the kernel's process id is also the id of its process group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif self.process.poll() is None:
            command = ["taskkill", "/T", "/F", "/PID", str(self.process.pid)]
            subprocess.run(command, check=False, capture_output=True)
        self.process.wait()

    def run(self, code: str, timeout: float) -> str:
        """Run one cell.

        A cell that takes too long or prints too much is interrupted. If it ends then, the kernel
        is ready for the next one; if not, the kernel is killed.

        Returns:
            "" or what went wrong, to follow "code cell 3 ".

        Raises:
            KernelGone: If the kernel has ended or had to be killed.
        """
        request = self.client.execute(code, allow_stdin=False, stop_on_error=False)
        deadline = time.monotonic() + timeout
        error = ""
        printed = 0
        replied_at = None
        while True:
            now = time.monotonic()
            if now > deadline:
                return self._interrupt(request, f"ran longer than {timeout:g} s")
            if printed > OUTPUT_LIMIT:
                return self._interrupt(request, f"printed more than {OUTPUT_LIMIT:,} characters")
            message = self._next("iopub", 0.1)
            if message is None:
                if self.process.poll() is not None:
                    raise KernelGone("ended the kernel")
                if replied_at is None and self._replied(request):
                    replied_at = now
                if replied_at is not None and now - replied_at > QUIET_SECONDS:
                    return error
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return error
            if message["msg_type"] == "error":
                error = f"raised {content['ename']}: {content['evalue']}".strip(": ")
            printed += len(content.get("text", "")) + len(str(content.get("data", "")))

    def _next(self, channel: str, timeout: float) -> dict[str, Any] | None:
        get = self.client.get_iopub_msg if channel == "iopub" else self.client.get_shell_msg
        with contextlib.suppress(queue.Empty):
            message: dict[str, Any] = get(timeout=timeout)
            return message
        return None

    def _replied(self, request: str) -> bool:
        while (message := self._next("shell", 0.0)) is not None:
            if message["parent_header"].get("msg_id") == request:
                return True
        return False

    def _interrupt(self, request: str, reason: str) -> str:
        if POSIX:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGINT)
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and self.process.poll() is None:
                if self._replied(request):
                    return reason
                self._next("iopub", 0.05)  # let it speak, so that it can end
        raise KernelGone(reason)

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            self.client.kernel_info()
            if self._next("iopub", 0.2) is not None:  # and so we hear all that comes
                return
        raise KernelGone("did not start: is ipykernel installed?")
