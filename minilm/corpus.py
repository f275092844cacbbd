"""The one text of the book: Shakespeare's 38 plays, split by whole plays (chapter 01)."""

import json
import lzma
from dataclasses import dataclass
from functools import cache

from minilm.assets import read_asset
from minilm.errors import ConfigError

__all__ = ["Play", "Scene", "load_shakespeare"]


@dataclass(frozen=True)
class Scene:
    """Where a scene stands in its play. `start` and `end` count bytes of the play's UTF-8 text."""

    act: str
    title: str
    start: int
    end: int


@dataclass(frozen=True)
class Play:
    """One play: who speaks and what is said, as `NAME:`, the lines of the speech, an empty line."""

    slug: str
    title: str
    genre: str
    split: str
    text: str
    scenes: tuple[Scene, ...]

    @property
    def data(self) -> bytes:
        """The text as UTF-8 bytes."""
        return self.text.encode("utf-8")


@cache
def load_shakespeare(split: str | None = None) -> tuple[Play, ...]:
    """Load the plays of one split, or all 38.

    The split is by whole plays, so that no scene of a held-out play is seen in training:
    32 plays train; *Twelfth Night*, *Henry V*, *Othello* are for validation; *A Midsummer
    Night's Dream*, *Richard III*, *Macbeth* for the test.

    Args:
        split: "train", "validation", "test", or None for all.

    Returns:
        The plays in alphabetical order of their slugs.

    Raises:
        ConfigError: If there is no such split.

    Example:
        >>> [play.title for play in load_shakespeare("test")]
        ["A Midsummer Night's Dream", 'Macbeth', 'Richard III']
    """
    splits = ("train", "validation", "test")
    if split not in (None, *splits):
        raise ConfigError(f"split={split!r}; use one of {', '.join(splits)}, or None for all plays")
    records = json.loads(lzma.decompress(read_asset("shakespeare.json.xz")))
    return tuple(
        Play(**{**record, "scenes": tuple(Scene(**scene) for scene in record["scenes"])})
        for record in records
        if split in (None, record["split"])
    )
