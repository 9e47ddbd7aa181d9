"""Draw parts of reports as pictures for the README and these pages.

    expertlane compare
    expertlane compare paper --project
    python docs/pictures/report.py results/paper-small results/paper

Takes headless Chromium to the folders' report.html and writes, beside this script, the first screen
of the first and a picture of each part below of the second, in light colours.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

HERE = Path(__file__).parent
WIDTH = 1000
FIRST = {"width": 1280, "height": 640}
STYLE = """
.zoom, details.numbers { display: none !important }
.chart, .timelines { padding: 14px; background: var(--card) }
"""
# By the picture's name, the words that a section's heading begins with, and its part.
PARTS = {
    "report-causes": ("Where the time goes", "figure >> nth=0"),
    "report-timelines": ("One step, rank by rank", ".timelines >> nth=0"),
}


def part(page: Page, heading: str, selector: str) -> Locator:
    """Of the section whose heading has these words."""
    section = page.locator("details.part > section", has=page.locator("h3", has_text=heading))
    return section.first.locator(selector).first


def main() -> None:
    """Draw all of them."""
    measured, projected = (Path(folder, "report.html").absolute() for folder in sys.argv[1:])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        first = browser.new_page(viewport=FIRST)
        first.goto(measured.as_uri())
        first.screenshot(path=HERE / "report-first.png")
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, device_scale_factor=1.5)
        page.goto(projected.as_uri())
        page.add_style_tag(content=STYLE)
        page.evaluate("document.querySelectorAll('details.part').forEach(each => each.open = true)")
        for name, (heading, selector) in PARTS.items():
            part(page, heading, selector).screenshot(path=HERE / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
