"""Committed result, live check: what takes longer than a chapter may is made by a named command.

The command calls `save_result`; the chapter calls `load_result`, redoes a small fixed excerpt live
and asserts that it agrees. The committed file says on what machine, with which versions, from which
commit and by which command it was made.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from minilm.errors import DataError
from minilm.files import write_atomically

__all__ = ["load_result", "machine", "save_result"]

PACKAGES = ("minilm", "numpy", "torch")
NAME = re.compile(r"[a-z0-9_]+")


def machine() -> dict[str, Any]:
    """The machine in words that identify its speed, not its owner: processor, cores, system."""
    name = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"model name\s*:\s*(.+)", cpuinfo)[1]  # type: ignore[index]
    except (OSError, TypeError):
        pass
    return {"processor": name, "cores": os.cpu_count(), "system": platform.system()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the working tree, marked when it has changes; "unknown" outside git.

    Other results do not count as changes: a run makes several, one after another.
    """

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    elsewhere = (":/", ":(top,exclude)minilm/assets/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *elsewhere)
    return f"{commit}-dirty" if changed else commit


def _path(name: str) -> Path:
    if not NAME.fullmatch(name):
        raise DataError(f"result name {name!r}; use lower-case letters, digits and _")
    return Path(str(files("minilm.assets"))) / "results" / f"{name}.json"


def save_result(name: str, payload: Mapping[str, Any], command: str) -> Path:
    """Write a result beside how it was made. Nothing is left half written.

    Args:
        name: Lower-case letters, digits and underscores; the file is `<name>.json`.
        payload: What JSON can hold.
        command: What a reader types to make it again.
    """
    path = _path(name)
    made = {
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": _versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made": made, "result": payload}, indent=1)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def load_result(name: str) -> dict[str, Any]:
    """Read a committed result: `{"made": {...}, "result": ...}`.

    Raises:
        DataError: If there is no such result.
    """
    path = _path(name)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        there = sorted(p.stem for p in path.parent.glob("*.json")) or ["none yet"]
        raise DataError(f"no committed result {name!r}; there are: {', '.join(there)}") from error
