"""The book, built once for all tests of this folder."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class Book:
    """The built pages and what the build printed."""

    html: Path
    log: str
    returncode: int


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Book:
    """Build the book outside the repository. Workers of pytest-xdist share one build."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "book"
    log, code = folder / "log", folder / "returncode"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker builds
        deadline = time.monotonic() + BUILD_TIMEOUT_S
        while not code.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        jupyter_book = Path(sys.executable).with_name("jupyter-book")
        command = [jupyter_book, "build", ROOT, "--path-output", folder]
        done = subprocess.run(
            [*command, "-W", "-n", "--keep-going"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        log.write_text(done.stdout, encoding="utf-8")
        code.with_suffix(".part").write_text(str(done.returncode))
        code.with_suffix(".part").replace(code)
    html = folder / "_build" / "html"
    return Book(html, log.read_text(encoding="utf-8"), int(code.read_text()))
