"""The built pages, read as files: warnings, links, alternative texts, stray formulas."""

import importlib
import inspect
import pkgutil
import re
import shutil
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

import minilm
from minilm.results import load_result

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for pattern in ("chapters/[0-9]*.ipynb", "exercises/[0-9]*.ipynb", "appendix/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
]
RAW_LATEX = re.compile(r"\$[^$\n]+\$|\\(?:[a-z]+\{|mid\b|sum\b|log\b|ln\b|[()\[\]])")


@cache
def read_anchors(path: Path) -> set[str]:
    return anchors(parse(path))


@cache
def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(folder: Path) -> dict[str, BeautifulSoup]:
    """Every page of the book by its path, without the sources that lie beside them."""
    found = (p for p in folder.rglob("*.html") if "_static" not in p.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): parse(path) for path in sorted(found)}


def anchors(page: BeautifulSoup) -> set[str]:
    return {tag["id"] for tag in page.find_all(id=True)} | {
        tag["name"] for tag in page.find_all("a", attrs={"name": True})
    }


def dead_links(folder: Path) -> list[str]:
    """Links and pictures of the pages that lead to no file, or to no place on a page."""
    dead = []
    for name, page in pages(folder).items():
        for tag, attribute in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")):
            for element in page.find_all(tag, attrs={attribute: True}):
                url = urlsplit(element[attribute])
                if url.scheme or url.netloc:
                    continue
                target = (folder / name).parent / unquote(url.path) if url.path else folder / name
                lost = not target.is_file() or (
                    url.fragment
                    and target.suffix == ".html"
                    and unquote(url.fragment) not in read_anchors(target.resolve())
                )
                dead += [f"{name}: {element[attribute]}"] if lost else []
    return dead


def requested(page: BeautifulSoup) -> list[str]:
    """Addresses of other sites that opening a page would ask for something."""
    tags = page.find_all(["script", "img", "iframe", "source", "video", "audio"], src=True)
    links = [
        link
        for link in page.find_all("link", href=True)
        if not {"canonical", "author", "license"} & set(link.get("rel", []))
    ]
    urls = [tag["src"] for tag in tags] + [link["href"] for link in links]
    return [url for url in urls if urlsplit(url).netloc]


def prose(page: BeautifulSoup) -> str:
    """What a page says outside formulas and code."""
    copy = BeautifulSoup(str(page.find("article") or ""), "html.parser")
    for element in copy.select("pre, code, script, style, .math, .sig"):
        element.decompose()
    return copy.get_text(" ")


def test_the_build_has_no_warning(book):
    lines = [line for line in book.log.splitlines() if re.search(r"WARNING|ERROR|SEVERE", line)]
    assert lines == []
    assert book.returncode == 0, book.log[-2000:]


def test_every_notebook_is_a_page(book):
    assert len(NOTEBOOKS) >= 5
    assert [name for name in NOTEBOOKS if f"{name}.html" not in pages(book.html)] == []


def test_links_and_anchors_lead_somewhere(book):
    assert dead_links(book.html) == []


def test_a_chapter_has_the_number_of_its_file(book):
    for name in NOTEBOOKS:
        if name.startswith("chapters/"):
            page = parse(book.html / f"{name}.html")
            number = str(int(Path(name).name[:2]))
            heading = page.select_one("article h1").get_text()
            current = page.select_one("nav.bd-links li.current.active > a").get_text().strip()
            assert heading.startswith(f"{number}. ") and current.startswith(f"{number}. "), name


def test_the_speed_page_draws_each_committed_benchmark(book):
    page = parse(book.html / "appendix" / "speed.html")
    assert len(page.select("article table")) == 4
    for name in ("tokenizer", "speedrun", "decode"):
        made = load_result(name)["made"]
        assert made["command"] in page.get_text() and made["commit"] in page.get_text()


def test_a_dead_link_and_a_dead_anchor_are_found(book, tmp_path):
    for name in ("index.html", "appendix/ledger.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(book.html / name, tmp_path / name)
    planted = ("gone.html", "appendix/ledger.html#gone", "#gone")
    with (tmp_path / "index.html").open("a", encoding="utf-8") as page:
        page.writelines(f'<a href="{url}">a</a>' for url in planted)
    dead = dead_links(tmp_path)
    for url in planted:
        assert f"index.html: {url}" in dead
    assert "index.html: appendix/ledger.html" not in dead


def test_every_figure_has_alternative_text(book):
    poor = [
        f"{name}: {image['src']}: {image.get('alt')!r}"
        for name, page in pages(book.html).items()
        for image in page.select("article img")
        if len(image.get("alt", "")) < 20 or re.search(r"\.(png|svg)$|/", image["alt"])
    ]
    assert poor == []
    assert parse(book.html / "index.html").select("article img")


def test_no_formula_is_left_raw(book):
    raw = {name: RAW_LATEX.findall(prose(page)) for name, page in pages(book.html).items()}
    assert {name: found for name, found in raw.items() if found} == {}


@pytest.mark.parametrize("text", ["a $x^2$ b", r"\(x\)", r"\frac{1}{2}", r"p(a \mid b)"])
def test_a_raw_formula_is_found(text):
    page = BeautifulSoup(f"<article><p>{text}</p><pre>$ ls $HOME</pre></article>", "html.parser")
    assert RAW_LATEX.findall(prose(page))


def test_no_page_names_something_of_another_site_to_load(book):
    asked = {name: requested(page) for name, page in pages(book.html).items()}
    assert {name: urls for name, urls in asked.items() if urls} == {}
    planted = BeautifulSoup('<script src="https://cdn.example/x.js"></script>', "html.parser")
    assert requested(planted)
    assert "unpkg.com" not in (book.html / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_can_be_opened_on_colab_and_downloaded(book, name):
    links = {a["href"] for a in parse(book.html / f"{name}.html").find_all("a", href=True)}
    colab = [url for url in links if url.startswith("https://colab.research.google.com/github/")]
    assert len(colab) == 1 and colab[0].endswith(f"/blob/main/{name}.ipynb")
    sources = [url for url in links if url.endswith(f"{Path(name).name}.ipynb")]
    assert any("_sources" in url for url in sources)


def test_every_public_name_is_in_the_reference_with_its_source(book):
    page = parse(book.html / "appendix" / "api.html")
    public = [
        f"{info.name}.{name}"
        for info in pkgutil.walk_packages(minilm.__path__, "minilm.")
        if not re.search(r"\.(_|c\d\d_)", info.name)  # a chapter's questions are no reference
        for module in [importlib.import_module(info.name)]
        for name in getattr(module, "__all__", ())
        if inspect.isclass(vars(module)[name]) or inspect.isroutine(vars(module)[name])
        if vars(module)[name].__module__ == info.name  # not another name for a type of NumPy
    ]
    assert "minilm.ngram.kneser_ney" in public
    entries = {name: page.find(id=name) for name in public}
    assert [name for name, entry in entries.items() if entry is None] == []
    source = 'a[href*="/blob/main/minilm/"]'
    assert [name for name, entry in entries.items() if not entry.select(source)] == []


def test_the_search_index_knows_the_chapters(book):
    assert "Kneser" in (book.html / "searchindex.js").read_text(encoding="utf-8")
