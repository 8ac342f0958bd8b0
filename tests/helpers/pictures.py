"""Takes the README's pictures of a report page.

python tests/helpers/pictures.py runs/demo/report.html
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, HEIGHT = 1100, 760
COLOURS = 128  # of a picture: enough for a page, and less than half of the bytes


def main() -> None:
    page_path = Path(sys.argv[1]).absolute()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, scheme in (("report", "light"), ("report-layer", "dark")):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(page_path.as_uri())
            page.wait_for_selector("#layers.live")
            if name == "report-layer":
                block = page.locator("tr.block button").nth(1)
                block.click()
                page.locator("tr.layer:visible button").nth(1).click()
                block.scroll_into_view_if_needed()
                block.evaluate("element => window.scrollTo(0, element.getBoundingClientRect().top + scrollY - 60)")
            picture = Image.open(BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
            picture.save(DOCS / f"{name}.png", optimize=True)
            print(DOCS / f"{name}.png", (DOCS / f"{name}.png").stat().st_size)
        browser.close()


if __name__ == "__main__":
    main()
