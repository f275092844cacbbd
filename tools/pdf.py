"""Print the whole book as one PDF: python tools/pdf.py [--out FILE]

Builds the book as a single page, opens it in headless Chromium, opens what is folded, and prints.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import DESKTOP, chromium, open_page, serve, settle

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> Path:
    """Build the book as one page below `folder`; the directory that holds its `index.html`."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", ROOT, "--builder", "singlehtml"]
    subprocess.run([*command, "--path-output", folder, "--quiet"], check=True)
    return folder / "_build" / "singlehtml"


def print_page(folder: Path, target: Path) -> None:
    """Print `index.html` of a folder to a file, which appears whole or not at all."""
    with serve(folder) as address, chromium() as browser:
        page = open_page(browser, DESKTOP, dark=False)
        page.goto(f"{address}/index.html")
        settle(page)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        temporary = target.with_suffix(".part")
        page.pdf(
            path=temporary,
            format="A4",
            margin={"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            print_background=True,
            outline=True,
            tagged=True,
        )
        temporary.replace(target)


def main() -> None:
    """Build, print, and say where the file is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "minilm.pdf")
    target = parser.parse_args().out
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        print_page(build(Path(folder)), target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
