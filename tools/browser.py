"""A web server on this machine and a headless Chromium: for pictures, print and browser tests."""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
PHONE, DESKTOP = 390, 1280


def find_chromium() -> str | None:
    """The path of a Chromium: $CHROMIUM, or the first of the usual names. None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of the loopback interface; yields the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser: the system's Chromium, else the one that playwright installed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, width: int, dark: bool) -> Page:
    """A fresh page (own cookies and storage) of a phone or a desktop, in one colour scheme."""
    context = browser.new_context(
        viewport={"width": width, "height": 844 if width == PHONE else 900},
        color_scheme="dark" if dark else "light",
        has_touch=width == PHONE,
    )
    return context.new_page()


def settle(page: Page) -> None:
    """Wait until formulas are set and pictures are loaded, also those further down."""
    page.wait_for_load_state("load")
    page.evaluate(
        """async () => {
            if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
            document.querySelectorAll("img[loading=lazy]").forEach(i => { i.loading = "eager"; });
            await Promise.all([...document.images].map(i => i.decode().catch(() => {})));
            await document.fonts.ready;
        }"""
    )
