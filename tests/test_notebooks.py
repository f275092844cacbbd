"""The committed notebooks: what each promises, and that every check can fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import check_notebooks
import common
import ledger as ledger_tool
import nbformat
import pytest
import sync_code

NOTEBOOKS = common.notebooks()
CHAPTERS = common.chapters()
INFRASTRUCTURE = {"errors", "files", "assets", "device", "plotting", "ledger", "native", "results"}
ABOVE = {"cli", "exercises", "__init__", "__main__"}


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    """A copy of chapter 01 beside the exercises that it links to."""
    for folder in ("chapters", "exercises", "appendix"):
        shutil.copytree(common.ROOT / folder, tmp_path / folder)
    return tmp_path / "chapters" / CHAPTERS[0].name


def edit(path: Path, wanted, change) -> None:
    """Apply `change` to the first cell for which `wanted` holds."""
    notebook = common.read(path)
    cell = next(cell for cell in notebook.cells if wanted(cell))
    change(cell)
    nbformat.write(notebook, path)


def has_figure(cell) -> bool:
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_notebook_holds_what_the_book_promises(path):
    assert check_notebooks.complaints(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_shown_code_is_package_code(path):
    assert sync_code.check(path, fix=False) == []


def test_the_ledger_is_what_the_chapters_recorded():
    assert json.loads(ledger_tool.TARGET.read_text()) == ledger_tool.collect(CHAPTERS)


def public_names() -> dict[str, list[str]]:
    """For each chapter module: the public names, with the public methods of each class."""
    import importlib
    import inspect

    names: dict[str, list[str]] = {}
    for path in sorted((common.ROOT / "minilm").rglob("*.py")):
        module = ".".join(path.relative_to(common.ROOT / "minilm").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        if module.split(".")[0] in INFRASTRUCTURE | ABOVE:
            continue
        loaded = importlib.import_module(f"minilm.{module}")
        for name in loaded.__all__:
            own = vars(getattr(loaded, name)) if inspect.isclass(getattr(loaded, name)) else {}
            public = [value for m, value in own.items() if m[0] != "_" and callable(value)]
            # `sum = _sum` in a class is shown where `_sum` is
            names[f"{module}.{name}"] = [f"{module}.{value.__qualname__}" for value in public]
    return names


def homeless(paths: list[Path]) -> list[str]:
    """Public names that no chapter shows: neither whole, nor all their public methods."""
    told = {name for path in paths for cell in common.read(path).cells
            for name, _ in common.shown(cell)}  # fmt: skip
    return [
        name
        for name, methods in public_names().items()
        if name not in told and not (methods and told.issuperset(methods))
    ]


def test_every_public_name_has_a_home_chapter():
    assert homeless(CHAPTERS) == []


def test_a_name_without_a_chapter_is_found():
    assert "ngram.kneser_ney" in homeless([]) and "corpus.load_shakespeare" in homeless([])


# Each check can fail: one character, one alternative text, one digit, one import.


def test_one_changed_character_in_a_shown_cell_is_found(chapter):
    def change(cell):
        cell.source = cell.source[:-1] + " " + cell.source[-1]

    edit(chapter, common.shown, change)
    assert any("differs from the package" in line for line in sync_code.check(chapter, fix=False))


def test_write_brings_the_package_back_into_the_cell(chapter):
    def change(cell):
        cell.source = "x = 1"

    edit(chapter, common.shown, change)
    sync_code.check(chapter, fix=True)
    assert sync_code.check(chapter, fix=False) == []


def test_a_figure_without_alternative_text_is_found(chapter):
    def change(cell):
        del cell.metadata["mystnb"]["image"]["alt"]

    edit(chapter, has_figure, change)
    assert any("no alternative text" in line for line in check_notebooks.complaints(chapter))


def test_one_changed_digit_in_the_ledger_is_found(chapter, tmp_path, monkeypatch):
    wrong = tmp_path / "ledger.json"
    rows = ledger_tool.collect(CHAPTERS)
    rows[-1]["bits_per_byte"] += 0.001
    wrong.write_text(json.dumps(rows))
    monkeypatch.setattr(ledger_tool, "TARGET", wrong)
    assert ledger_tool.main([]) == 1


@pytest.mark.parametrize(
    ("blemish", "complaint"),
    [
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "stderr"),
        ({"output_type": "stream", "name": "stdout", "text": "saved in /home/me/x"}, "a path"),
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "an error"),
    ],
)
def test_a_blemished_output_is_found(chapter, blemish, complaint):
    def change(cell):
        cell.outputs.append(nbformat.from_dict(blemish))

    edit(chapter, lambda cell: cell.cell_type == "code", change)
    assert any(complaint in line for line in check_notebooks.complaints(chapter))


def test_too_many_exempt_outputs_are_found(chapter):
    notebook = common.read(chapter)
    for cell in notebook.cells:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "nbval-ignore-output"]
    nbformat.write(notebook, chapter)
    assert any("exempt" in line for line in check_notebooks.complaints(chapter))


def test_an_edited_label_is_found(chapter):
    def change(cell):
        cell.source = cell.source.replace("*Runs in ", "*Runs in 1")

    edit(chapter, lambda cell: cell.cell_type == "markdown", change)
    assert any("label line" in line for line in check_notebooks.complaints(chapter))


def test_a_link_that_leads_nowhere_is_found(chapter):
    def change(cell):
        cell.source += "\n[gone](../chapters/00_gone.ipynb)"

    edit(chapter, lambda cell: cell.cell_type == "markdown", change)
    assert any("leads nowhere" in line for line in check_notebooks.complaints(chapter))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", "pyproject.toml", "--no-cache"]
    env = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_layers_hold_and_an_import_of_a_later_chapter_is_found(tmp_path):
    shutil.copytree(common.ROOT / "minilm", tmp_path / "minilm")
    shutil.copy(common.ROOT / "pyproject.toml", tmp_path)
    good = lint_imports(tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    with (tmp_path / "minilm" / "ngram.py").open("a") as module:
        module.write("\nfrom minilm.autograd import Tensor\n")
    bad = lint_imports(tmp_path)
    assert bad.returncode == 1
    assert "minilm.ngram" in bad.stdout


def test_a_planted_broken_notebook_makes_the_run_fail(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    notebook.cells[0].execution_count = 1
    result = {"output_type": "execute_result", "execution_count": 1, "metadata": {}}
    for shown, code in (("2", 0), ("3", 1)):
        data = {"text/plain": shown}
        notebook.cells[0].outputs = [nbformat.from_dict({**result, "data": data})]
        nbformat.write(notebook, tmp_path / "planted.ipynb")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval"]
        command += ["--nbval-current-env", "planted.ipynb"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
