"""Files that come with the package, each held to its SHA-256."""

import hashlib
from importlib.resources import files

from minilm.errors import DataError

__all__ = ["SHA256", "read_asset"]

SHA256 = {
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
