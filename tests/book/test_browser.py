"""The built pages in a real browser: phone and desktop, light and dark."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import DESKTOP, PHONE, chromium, find_chromium, open_page, serve, settle
from common import chapters
from playwright.sync_api import Browser, Page, Route, expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None and not os.environ.get("CI"),
        reason="no Chromium here; install it, or name one in CHROMIUM (in CI this would fail)",
    ),
]
CHAPTERS = tuple(f"chapters/{path.stem}" for path in chapters())
PAGES = ("index", *CHAPTERS, "exercises/01_language_as_probability")
NO_MATH = {"index"}


@dataclass
class View:
    """One page, opened; and what happened while it loaded."""

    page: Page
    name: str
    width: int
    dark: bool
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(book) -> Iterator[str]:
    with serve(book.html) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def listen(page: Page, address: str, complaints: list[str]) -> None:
    """Note errors of the page's scripts, answers that say no, and requests to other sites."""

    def refuse(route: Route) -> None:
        complaints.append(f"off-site: {route.request.url}")
        route.abort()

    page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
    page.on("console", lambda m: m.type == "error" and complaints.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))


@pytest.fixture(
    scope="module",
    params=product(PAGES, (DESKTOP, PHONE), (False, True)),
    ids=lambda p: f"{p[0].replace('/', '-')}-{p[1]}-{'dark' if p[2] else 'light'}",
)
def view(request, browser, address) -> Iterator[View]:
    name, width, dark = request.param
    seen = View(open_page(browser, width, dark), name, width, dark)
    listen(seen.page, address, seen.complaints)
    seen.page.goto(f"{address}/{name}.html")
    settle(seen.page)
    yield seen
    seen.page.context.close()


def test_it_loads_without_error_and_asks_no_other_site(view):
    assert view.complaints == []


def test_it_follows_the_colour_scheme(view):
    scheme = "dark" if view.dark else "light"
    assert view.page.evaluate("document.documentElement.dataset.theme") == scheme


def test_formulas_are_set(view):
    if view.name in NO_MATH:
        assert view.page.locator(".math").count() == 0
        return
    assert view.page.locator(".math").count() > 0
    unset = ".math:not(:has(mjx-container)), mjx-merror"
    assert view.page.locator(unset).count() == 0
    text = view.page.evaluate(
        """() => {
            const copy = document.querySelector("article").cloneNode(true);
            copy.querySelectorAll("pre, code, mjx-container, script").forEach(e => e.remove());
            return copy.textContent;
        }"""
    )
    assert "$" not in text


def test_figures_are_visible(view):
    figures = view.page.evaluate(
        """() => [...document.querySelectorAll("article img")].map(image => ({
            source: image.src,
            drawn: image.naturalWidth > 0 && image.getBoundingClientRect().width > 100,
            background: getComputedStyle(image).backgroundColor,
            filter: getComputedStyle(image).filter,
        }))"""
    )
    assert figures or view.name.startswith("exercises/")
    for figure in figures:
        assert figure["drawn"], figure
        # Mid-grey ink on a transparent picture: in both schemes the page shows through.
        assert figure["background"] == "rgba(0, 0, 0, 0)", figure
        assert figure["filter"] == "none", figure


def test_nothing_sticks_out_of_the_page(view):
    wide = view.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide[0] <= wide[1]


def test_axe_finds_no_serious_violation(view):
    # The contrast of some 10,000 coloured words takes a minute: the first blocks have all colours,
    # and a colour does not depend on the width.
    view.page.evaluate(
        "[...document.querySelectorAll('pre')].slice(8).forEach(e => { e.textContent = 'code'; })"
    )
    options = {
        "resultTypes": ["violations"],
        "rules": {"color-contrast": {"enabled": view.width == DESKTOP}},
    }
    found = Axe().run(view.page, options=options).response["violations"]
    serious = [
        f"{one['id']}: {one['help']}: {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
    assert serious == []


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_search_finds_kneser_and_leads_to_the_chapter(browser, address, width):
    page = open_page(browser, width, dark=False)
    complaints: list[str] = []
    listen(page, address, complaints)
    page.goto(f"{address}/index.html")
    page.locator("button.search-button:visible, button.search-button-field:visible").first.click()
    field_ = page.locator("input[type=search]:visible").first
    field_.fill("Kneser")
    field_.press("Enter")
    hit = page.locator(
        "#search-results li a", has_text=re.compile(r"^[\d. ]*Language as probability$")
    ).first
    hit.click()
    expect(page).to_have_url(re.compile(f"/{CHAPTERS[0]}\\.html"))
    expect(page.locator("article")).to_contain_text("Kneser")
    assert complaints == []
    page.context.close()


def test_the_sidebar_opens_on_a_phone_and_leads_to_a_chapter(browser, address):
    page = open_page(browser, PHONE, dark=False)
    page.goto(f"{address}/index.html")
    link = page.locator(".sidebar-primary__section a:visible", has_text="Backpropagation")
    expect(link).to_have_count(0)
    page.locator("button.primary-toggle:visible").click()
    link.first.click()
    expect(page).to_have_url(re.compile(f"/{CHAPTERS[1]}\\.html"))
    page.context.close()


def test_the_sidebar_is_open_on_a_desktop_and_can_be_closed(browser, address):
    page = open_page(browser, DESKTOP, dark=False)
    page.goto(f"{address}/index.html")
    sidebar = page.locator(".bd-sidebar-primary")
    expect(sidebar.get_by_role("link", name=re.compile(r"^2\. Backpropagation"))).to_be_visible()
    page.locator("button.primary-toggle:visible").click()
    expect(sidebar).not_to_be_in_viewport()
    page.context.close()


def test_a_code_cell_can_be_copied_and_unfolded(browser, address):
    page = open_page(browser, DESKTOP, dark=False)
    page.goto(f"{address}/{CHAPTERS[0]}.html")
    expect(page.locator("button.copybtn").first).to_be_attached()
    hidden = page.locator("details.hide").first
    expect(hidden.locator("pre")).not_to_be_visible()
    hidden.locator("summary").click()
    expect(hidden.locator("pre")).to_be_visible()
    page.context.close()
