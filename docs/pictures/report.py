"""Draw parts of a report as pictures for the README and these pages.

    expertlane compare paper --project
    python docs/pictures/report.py results/paper

Takes headless Chromium to the folder's report.html and writes, beside this script, a picture of
each part below, in light colours.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

HERE = Path(__file__).parent
WIDTH = 1000
STYLE = """
.timeline:not([open]), .zoom, details.numbers, .timeline .note { display: none }
.inside > *, .first { padding: 14px; background: var(--card) }
"""
# By the picture's name, the words that a section's heading begins with, and its part.
PARTS = {
    "report-causes": ("Where the time goes", ".chart >> nth=0"),
    "report-timelines": ("One step, rank by rank", ".timelines >> nth=0"),
    "report-latency": ("Context and batch", ".chart >> nth=0"),
    "report-front": ("Throughput against latency", ".chart >> nth=0"),
}


def part(page: Page, heading: str, selector: str) -> Locator:
    """Of the section whose heading has these words."""
    section = page.locator("details.part", has=page.locator("h2", has_text=heading)).first
    section.evaluate("each => { each.open = true; }")
    return section.locator(selector).first


def main() -> None:
    """Draw all of them."""
    report = Path(sys.argv[1]) / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, device_scale_factor=1.5)
        page.goto(report.absolute().as_uri())
        page.add_style_tag(content=STYLE)
        for name, (heading, selector) in PARTS.items():
            path = HERE / f"{name}.png"
            part(page, heading, selector).screenshot(path=path)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
