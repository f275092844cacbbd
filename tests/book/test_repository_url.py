"""The address of the repository stands once, in pyproject.toml; every other mention agrees."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWNER, NAME = PROJECT["urls"]["Repository"].removeprefix("https://github.com/").split("/")
MENTIONS = (
    # github.com/OWNER/NAME, also inside a Colab link or behind git+
    re.compile(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+)/([\w.-]+)"),
    # OWNER.github.io/NAME
    re.compile(r"([\w-]+)\.github\.io/([\w.-]+)"),
)


def mentions(text: str) -> set[tuple[str, str]]:
    """Every (owner, name) of this project's pages that a text mentions, right or wrong."""
    found = {match.groups() for pattern in MENTIONS for match in pattern.finditer(text)}
    clean = {(owner, name.rstrip(".").removesuffix(".git")) for owner, name in found}
    return {(owner, name) for owner, name in clean if NAME in (owner, name) or owner == OWNER}


def tracked() -> list[Path]:
    """The files of the repository, tracked or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_every_mention_is_the_one_of_pyproject():
    wrong, right = [], set()
    for path in tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture, an archive
            continue
        for found in mentions(text):
            if found == (OWNER, NAME):
                right.add(path.relative_to(ROOT).as_posix())
            else:
                wrong.append(f"{path.relative_to(ROOT)}: {'/'.join(found)}")
    assert wrong == []
    assert {"_config.yml", "README.md", "index.md"} <= right  # the search does find mentions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install git+https://github.com/else/NAME", ("else", "NAME")),
        ("[x](https://github.com/OWNER/old.git)", ("OWNER", "old")),
        ("https://colab.research.google.com/github/else/NAME/blob/main/a.ipynb", ("else", "NAME")),
        ("see https://else.github.io/NAME/index.html.", ("else", "NAME")),
    ],
)
def test_a_wrong_mention_is_found(text, found):
    def real(words):
        return words.replace("OWNER", OWNER).replace("NAME", NAME)

    assert mentions(real(text)) == {tuple(map(real, found))}


def test_other_projects_are_left_alone():
    assert mentions("https://github.com/numpy/numpy and https://pages.github.io/x") == set()
