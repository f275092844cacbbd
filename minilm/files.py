"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minilm.errors import DataError

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path`; what was written there takes the name at the end.

    The bytes are on the disk before the name changes, so that whoever opens `path`, even after a
    power cut, finds the old file or the whole new one. After an error the temporary file is gone
    and `path` is what it was.

    Args:
        path: The file to make or to replace. Its folder must exist.

    Raises:
        DataError: If the file cannot be written: a full disk, no permission, no such folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomically(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "note.txt").read_text()
        'whole'
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
