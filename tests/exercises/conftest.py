"""The worked example of the engine's docstring, as a chapter 90 that only the tests have."""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from minilm import exercises
from minilm.exercises import engine


def example_source() -> str:
    """The code in the docstring, to the letter."""
    match = re.search(r"^    from collections.*?^    \)\n", engine.__doc__ or "", re.S | re.M)
    assert match
    return textwrap.dedent(match[0])


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as a question module."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "c90_example.py").write_text(example_source(), encoding="utf-8")
    return folder


@pytest.fixture
def example(example_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's module, while it is all that `check` finds."""
    exercises.__path__.append(str(example_folder))
    monkeypatch.setattr(engine, "chapters", lambda: {90: "minilm.exercises.c90_example"})
    engine.questions(90)
    yield sys.modules["minilm.exercises.c90_example"]
    exercises.__path__.remove(str(example_folder))
    del sys.modules["minilm.exercises.c90_example"]


@pytest.fixture(scope="session")
def find_example(example_folder: Path) -> str:
    """The same as code, for a kernel."""
    return (
        "import minilm.exercises\nfrom minilm.exercises import check, engine\n"
        f"minilm.exercises.__path__.append({str(example_folder)!r})\n"
        "engine.chapters = lambda: {90: 'minilm.exercises.c90_example'}\n"
    )
