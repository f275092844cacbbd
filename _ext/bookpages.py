"""Directives whose content is computed at build time: from the chapters, the ledger, the package.

Each directive writes Markdown, and the page's own parser reads it. Labels that they link to come
from the chapters themselves: `term-...` where a word is first set in bold, `code-...` where a cell
shows a definition of the package, `cell-...` for each cell.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from myst_parser.mdit_to_docutils.base import default_slugify
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"minilm(?:-nodoc)?:(\S+)")  # the tag of a cell that shows the package's code


@dataclass(frozen=True)
class Chapter:
    """A chapter's notebook, as far as other pages tell of it."""

    path: Path
    cells: list[dict[str, Any]]

    @property
    def document(self) -> str:
        return f"chapters/{self.path.stem}"

    @property
    def opening(self) -> list[str]:
        """The paragraphs of the first cell: title, promise, label line, and more."""
        return re.split(r"\n\s*\n", "".join(self.cells[0]["source"]).strip())

    @property
    def title(self) -> str:
        return self.opening[0].removeprefix("#").strip()

    @property
    def promise(self) -> str:
        return " ".join(self.opening[1].split())

    @property
    def label(self) -> str:
        """What a run takes, as the refresh tool wrote it."""
        lines = [p for p in self.opening if p.startswith("*Runs in")]
        return " ".join(lines[0].strip("*").split()) if lines else ""

    @property
    def shown(self) -> list[str]:
        """The names of the package's definitions that the chapter shows, in order."""
        return [match[1] for tag in self.tags() if (match := SHOWN.fullmatch(tag))]

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(module_of(name) for name in self.shown))

    def tags(self) -> Iterator[str]:
        for cell in self.cells:
            yield from cell["metadata"].get("tags", [])


@cache
def chapters() -> tuple[Chapter, ...]:
    """Every chapter, in order."""
    paths = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
    return tuple(Chapter(p, json.loads(p.read_text(encoding="utf-8"))["cells"]) for p in paths)


def layers() -> list[str]:
    """The package's layers, from the infrastructure up, as import-linter holds them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    names = (name.strip() for line in reversed(contract["layers"]) for name in line.split("|"))
    return [name.strip("()").removeprefix("minilm.") for name in names]


@cache
def modules() -> dict[str, Any]:
    """Every public module by its name below `minilm`, lower layers first; no lists of questions."""
    package = importlib.import_module("minilm")
    found = (m.name for m in pkgutil.walk_packages(package.__path__, "minilm."))
    public = (name for name in found if not re.search(r"\.(_|c\d\d_)", name))
    loaded = {name.removeprefix("minilm."): importlib.import_module(name) for name in public}
    order = layers()
    return {
        name: loaded[name]
        for name in sorted(loaded, key=lambda name: (order.index(name.split(".")[0]), name))
        if getattr(loaded[name], "__all__", ())
    }


def module_of(name: str) -> str:
    """The module of a dotted name: `ngram` of `ngram.KneserNey.log_probs`."""
    parts = name.split(".")
    longest = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((module for module in longest if module in modules()), parts[0])


def label(kind: str, text: str) -> str:
    """The anchor of a term or of a definition; a page has typographic apostrophes."""
    return f"{kind}-{nodes.make_id(text.replace('’', chr(39)))}"


def slug(title: str) -> str:
    """The anchor that MyST gives to a heading."""
    return default_slugify(re.sub(r"[*`]", "", title).strip())


def cell_label(document: str, index: int) -> str:
    return f"cell-{document}-{index}"


def printed(cell: dict[str, Any]) -> str:
    """What a code cell printed or evaluated to, without pictures."""
    parts = (
        output.get("text", output.get("data", {}).get("text/plain", ""))
        for output in cell["outputs"]
        if "image/png" not in output.get("data", {})
    )
    return "".join("".join(part) for part in parts).rstrip()


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(*head: str) -> list[str]:
    return [row(*head), row(*("---" for _ in head))]


class Computed(SphinxDirective):
    """A directive that stands for the Markdown its `markdown` returns."""

    def markdown(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        for chapter in chapters():
            self.env.note_dependency(str(chapter.path))
        self.env.note_dependency(__file__)
        box = nodes.container()
        text = StringList(self.markdown().splitlines(), source=self.get_source_info()[0])
        self.state.nested_parse(text, self.content_offset, box, match_titles=True)
        return box.children


class ChapterMap(Computed):
    """The chapters that exist: what a reader can do after each, and the module it builds."""

    def markdown(self) -> str:
        lines = table("Chapter", "What you have at its end", "It builds")
        for chapter in chapters():
            built = ", ".join(f"{{py:mod}}`~minilm.{name}`" for name in chapter.modules)
            lines.append(row(f"{{doc}}`/{chapter.document}`", chapter.promise, built))
        return "\n".join(lines)


class ChapterTimes(Computed):
    """What each chapter takes on 2 cores, and its exercises."""

    def markdown(self) -> str:
        lines = table("Chapter", "A run of it", "Exercises")
        for chapter in chapters():
            exercises = f"{{doc}}`/exercises/{chapter.path.stem}`"
            lines.append(row(f"{{doc}}`/{chapter.document}`", chapter.label, exercises))
        return "\n".join(lines)


class Terms(Computed):
    """Lines of `term | Chinese | definition`, in alphabetical order, linked to the chapters.

    A chapter that sets another form of the term in bold is met by `term = that form`.
    """

    has_content = True

    def markdown(self) -> str:
        blocks = []
        for line in sorted(filter(str.strip, self.content), key=str.lower):
            parts = [part.strip() for part in line.split("|", 2)]
            if len(parts) != 3:
                raise self.error(f"got {line!r}, wanted 'term | Chinese | definition'")
            names, chinese, definition = parts
            term, _, bold = names.partition(" = ")
            where = f"Defined in: {{ref}}`{label('term', bold or term)}`."
            blocks.append(f"{term} [{chinese}]{{.language-zh}}\n: {definition} {where}")
        return "{.terms}\n" + "\n\n".join(blocks)


class CellOutput(Computed):
    """What the cells of a chapter's section printed, and links to them.

    The argument is written like a link: `../chapters/NN_name.ipynb#the-section`.
    """

    required_arguments = 1

    def markdown(self) -> str:
        path, _, wanted = self.arguments[0].partition("#")
        document = Path(path).stem
        (chapter,) = (c for c in chapters() if c.path.stem == document)
        depth, blocks = 0, []
        for index, cell in enumerate(chapter.cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                for marks, title in re.findall(r"^(#+) (.+)$", source, flags=re.MULTILINE):
                    if slug(title) == wanted:
                        depth = len(marks)
                    elif depth and len(marks) <= depth:
                        depth = 0
            elif depth and (text := printed(cell)):
                cell_link = f"{{ref}}`this cell <{cell_label(document, index)}>`"
                where = f"Printed by {cell_link} of [](<{self.arguments[0]}>)."
                blocks.append(f"```text\n{text}\n```\n\n{where}")
        if not blocks:
            raise self.error(f"no cell of {self.arguments[0]} printed anything")
        return "\n\n".join(blocks)


class LedgerTable(Computed):
    """The ledger, a row for each model."""

    def markdown(self) -> str:
        from minilm import ledger

        return ledger.table(ledger.rows())


class LedgerFigure(SphinxDirective):
    """The ledger's curve, drawn for this build."""

    def run(self) -> list[nodes.Node]:
        from minilm import ledger, plotting

        rows = sorted(ledger.rows(), key=lambda row: -row.bits_per_byte)
        worst, best = (f"{row.model} with {row.bits_per_byte:.3f}" for row in (rows[0], rows[-1]))
        plotting.use_style()
        path = Path(self.env.app.doctreedir).parent / "computed" / "ledger.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger.figure(rows).savefig(path, dpi=200, bbox_inches="tight", transparent=True)
        image = nodes.image(
            uri="/" + Path(os.path.relpath(path, self.env.srcdir)).as_posix(),
            alt=f"Bits per byte of {len(rows)} models on the test plays, from {worst} to {best}",
            classes=["dark-light", "ledger"],
        )
        return [image]


class PackageMap(Computed):
    """The modules of the package: what each is for, and where it is explained."""

    def markdown(self) -> str:
        homes = {name: chapter for chapter in reversed(chapters()) for name in chapter.modules}
        lines = table("Module", "What it is for", "Explained in")
        for name, module in modules().items():
            home = f"{{doc}}`/{homes[name].document}`" if name in homes else ""
            summary = (module.__doc__ or "").strip().splitlines()[0]
            lines.append(row(f"{{py:mod}}`{name} <minilm.{name}>`", summary, home))
        return "\n".join(lines)


class PackageReference(Computed):
    """Every public name of every module, from its docstring."""

    def markdown(self) -> str:
        return "\n\n".join(
            f"## `minilm.{name}`\n\n"
            f"```{{eval-rst}}\n.. automodule:: minilm.{name}\n   :members:\n```"
            for name in modules()
        )


def add_labels(app: Sphinx, document: nodes.document) -> None:
    """Label what other pages link to: a chapter's bold terms, and its tagged cells."""
    name = app.env.docname
    if not name.startswith("chapters/"):
        return
    standard = app.env.get_domain("std")

    def add(label: str, node: nodes.Element) -> None:
        if label in standard.labels and standard.labels[label][0] <= name:
            return  # an earlier place, of this chapter or of one before, is the one to link to
        section = node
        while section.parent is not None and not isinstance(section, nodes.section):
            section = section.parent
        title = section.next_node(nodes.title)
        node["ids"].append(label)
        standard.anonlabels[label] = name, label
        standard.labels[label] = name, label, title.astext() if title else name

    for strong in document.findall(nodes.strong):
        add(label("term", strong.astext()), strong)
    for cell in document.findall(nodes.container):
        if "cell_index" in cell:
            add(cell_label(Path(name).name, cell["cell_index"]), cell)
        for tag in cell.get("cell_metadata", {}).get("tags", []):
            if match := SHOWN.fullmatch(tag):
                add(label("code", match[1]), cell)


def finish_docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Link a docstring to the chapter that shows its code; keep a module's manual as laid out."""
    short = name.removeprefix("minilm.")
    if any(short in chapter.shown for chapter in chapters()):
        lines += ["", f"Shown in the chapter: :ref:`{label('code', short)}`.", ""]
    if what == "module" and any(line.startswith("    ") for line in lines):
        manual = ["   " + line for line in lines[1:]]
        lines[1:] = ["", ".. code-block:: text", "", *manual, ""]


def forget(app: Sphinx) -> None:
    """Read the notebooks anew in each build."""
    chapters.cache_clear()
    if not chapters():
        raise ExtensionError(f"no chapters in {ROOT / 'chapters'}")


def setup(app: Sphinx) -> dict[str, Any]:
    for directive in (
        ChapterMap,
        ChapterTimes,
        Terms,
        CellOutput,
        LedgerTable,
        LedgerFigure,
        PackageMap,
        PackageReference,
    ):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", directive.__name__).lower()
        app.add_directive(name, directive)
    app.connect("builder-inited", forget)
    app.connect("doctree-read", add_labels)
    app.connect("autodoc-process-docstring", finish_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
