"""How long a report takes to make and to open, and how large it is.

Made: `expertlane report`, from its start to its end. Opened: headless Chromium, from going to the
page until every plot that can be seen has its picture. Run it with nothing else on the machine:

    python benchmarks/bench_report.py results/paper-small [more folders]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

from expertlane import __version__

ROUNDS = 5
DRAWN = """() => {
    const plots = [...document.querySelectorAll(".plot")].filter(each => each.checkVisibility());
    const seen = svg => svg.checkVisibility() && svg.getBoundingClientRect().height > 0;
    return plots.length > 0 && plots.every(each => [...each.querySelectorAll("svg")].some(seen));
}"""


def made_s(results: Path, out: Path) -> float:
    begin_s = time.perf_counter()
    command = [sys.executable, "-m", "expertlane", "report", str(results), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin_s


def opened_s(browser: Browser, page: Path) -> tuple[float, float]:
    """Until the page is loaded, and until all plots are drawn."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    begin_s = time.perf_counter()
    tab.goto(page.as_uri())
    loaded_s = time.perf_counter() - begin_s
    tab.wait_for_function(DRAWN)
    drawn_s = time.perf_counter() - begin_s
    tab.close()
    return loaded_s, drawn_s


def measure(browser: Browser, results: Path, out: Path) -> dict[str, object]:
    made = [made_s(results, out) for _ in range(ROUNDS)]
    page = out / "report.html"
    opened = [opened_s(browser, page) for _ in range(ROUNDS)]
    return {
        "results": results.name,
        "bytes": page.stat().st_size,
        "made_s": median(made),
        "loaded_s": median(each for each, _ in opened),
        "drawn_s": median(each for _, each in opened),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="folders with a results.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        rows = [measure(browser, each, Path(folder)) for each in arguments.results]
        browser.close()
    table = Table("results", "MB", "made s", "loaded s", "all drawn s")
    for row in rows:
        seconds = [f"{row[name]:.2f}" for name in ("made_s", "loaded_s", "drawn_s")]
        table.add_row(str(row["results"]), f"{row['bytes'] / 1e6:.2f}", *seconds)
    Console().print(table)
    print(json.dumps({"benchmark": "report", "version": __version__, "rows": rows}))


if __name__ == "__main__":
    main()
