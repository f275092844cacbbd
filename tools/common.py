"""What the small tools share: where things are, and how a notebook is read and written."""

import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def chapters() -> list[Path]:
    """The chapters, in order."""
    return sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))


def notebooks() -> list[Path]:
    """Every notebook with committed outputs: chapters, appendix, solutions of the exercises."""
    others = [*(ROOT / "appendix").glob("*.ipynb"), *(ROOT / "exercises/solutions").glob("*.ipynb")]
    return [*chapters(), *sorted(others)]


def chosen(arguments: list[str], default: list[Path]) -> list[Path]:
    """The notebooks named on the command line, or the default ones."""
    return [Path(a) for a in arguments if not a.startswith("-")] or default


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook of format 4."""
    return nbformat.read(path, 4)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook with a temporary file, so that an interruption leaves the old one."""
    temporary = path.with_suffix(".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def shown(cell: nbformat.NotebookNode) -> list[tuple[str, bool]]:
    """What a cell shows of the package: (dotted name below minilm, with its docstring?)."""
    kinds = {"minilm": True, "minilm-nodoc": False}
    split = [tag.split(":", 1) for tag in tags(cell) if ":" in tag]
    return [(name, kinds[kind]) for kind, name in split if kind in kinds]


def repository() -> str:
    """The address of the repository, from the one place where it stands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])
