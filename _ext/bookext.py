"""What YAML cannot say of the book: MathJax from a package, no Thebe, links to the source."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

# A link of the sidebar, and the arrow behind it.
TOGGLE = re.compile(r"(<a [^>]*>([^<]*)</a><details[^>]*><summary)(>)")

# A page that has its chapter's number in its name.
NUMBERED = re.compile(r"(?:chapters|exercises)/(\d\d)_")

# The parts of MathJax 3 that a page can ask for: TeX in, HTML out, and speech in English.
MATHJAX = ("tex-chtml.js", "input/tex/extensions", "output/chtml", "a11y", "sre")


def copy_mathjax(app: Sphinx) -> None:
    """Put MathJax beside the pages, so that opening one asks no other site for it."""
    if app.builder.format != "html":
        return
    spec = importlib.util.find_spec("mathjax")
    if spec is None or not spec.submodule_search_locations:
        raise ExtensionError("MathJax is not installed; run: pip install django-static-mathjax")
    source = Path(spec.submodule_search_locations[0]) / "static" / "mathjax" / "es5"
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Leave Thebe's scripts out: the book runs no code in the page, and they name another site."""
    context["script_files"][:] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', {}).get('body', '')}".lower()
    ]


def name_toggles(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Say in words what the sidebar's arrows unfold; the theme leaves them without a name."""
    make = context.get("generate_toctree_html")
    if make is None:
        return

    def named(*args: Any, **options: Any) -> Any:
        return TOGGLE.sub(r'\1 aria-label="Sections of \2"\3', str(make(*args, **options)))

    context["generate_toctree_html"] = named


def number_by_name(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Give a chapter the number of its file, 18 to `18_decoding`, though 17 is not there yet."""
    for document, numbers in env.toc_secnumbers.items():
        match = NUMBERED.match(document)
        if not match:
            continue

        def renumbered(number: list[int] | None, chapter: int = int(match[1])) -> Any:
            return number and type(number)((chapter, *number[1:]))

        numbers.update({anchor: renumbered(number) for anchor, number in numbers.items()})
        title = env.titles[document]
        title["secnumber"] = renumbered(title.get("secnumber"))
        for link in env.tocs[document].findall(nodes.reference):
            if "secnumber" in link:
                link["secnumber"] = renumbered(link["secnumber"])
    return []


def source_link(domain: str, info: dict[str, str]) -> str | None:
    """The lines on GitHub that define a documented object (called by sphinx.ext.linkcode)."""
    if domain != "py" or not info["module"].startswith("minilm"):
        return None
    thing: Any = importlib.import_module(info["module"])
    package = Path(importlib.import_module("minilm").__file__ or "").resolve().parents[1]
    try:
        for name in info["fullname"].split("."):
            thing = getattr(thing, name)
        thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
        path = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(package)
        lines, first = inspect.getsourcelines(thing)
    except (AttributeError, OSError, TypeError, ValueError):  # data has no source lines
        return None
    return f"{REPOSITORY}/blob/main/{path.as_posix()}#L{first}-L{first + len(lines) - 1}"


def use_source_links(app: Sphinx, config: Config) -> None:
    config.linkcode_resolve = source_link


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", use_source_links)
    app.connect("builder-inited", copy_mathjax)
    app.connect("env-get-updated", number_by_name, priority=900)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", name_toggles, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
