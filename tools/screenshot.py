"""Take full-page pictures of the built book: desktop and phone, light and dark.

python tools/screenshot.py index chapters/01_language_as_probability --out /tmp/pictures
"""

import argparse
from itertools import product
from pathlib import Path

from browser import DESKTOP, PHONE, chromium, open_page, serve, settle

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", metavar="PAGE", help="as in _toc.yml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--book", type=Path, default=ROOT / "_build" / "html", help="built pages")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with serve(arguments.book) as address, chromium() as browser:
        for name, width, dark in product(arguments.pages, (DESKTOP, PHONE), (False, True)):
            page = open_page(browser, width, dark)
            page.goto(f"{address}/{name}.html")
            settle(page)
            device, scheme = "phone" if width == PHONE else "desktop", "dark" if dark else "light"
            path = arguments.out / f"{name.replace('/', '-')}-{device}-{scheme}.png"
            page.screenshot(path=path, full_page=True, animations="disabled")
            print(path)
            page.context.close()


if __name__ == "__main__":
    main()
