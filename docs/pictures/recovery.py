"""Draw where the time of a recovery goes, as `recovery.svg` beside this script.

    python benchmarks/bench_recovery.py | tail -1 > recovery.json
    python docs/pictures/recovery.py recovery.json

A bar is what the clients of unaffected requests wait for in the median, from a token to the next:
the medians of each state, and what is left: the step before the death, until it is noticed, and the
time until the next token is there.
"""

import json
import sys
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from expertlane.report.charts.bars import stacked
from expertlane.report.charts.colours import on, style_sheet
from expertlane.report.charts.svg import WIDE_PX, colour, svg
from expertlane.report.document import Chart, Legend, Table
from expertlane.report.numbers import figures, milliseconds

HERE = Path(__file__).parent
LEGEND_PX = 26
REST = "noticing, and the next step"
LEGEND = (
    Legend(REST, "--waiting-3"),
    Legend("fencing", "--communication-1"),
    Legend("replacing", "--overhead-1"),
    Legend("loading", "--compute-1"),
    Legend("replaying", "--compute-3"),
)


def parts(result: dict[str, Any]) -> dict[str, float]:
    """Seconds by part."""
    states = {each.label: result["state_s"].get(each.label, 0.0) for each in LEGEND[1:]}
    gaps = result["gaps_s"]["unaffected"] or result["gaps_s"]["lost"]
    return {REST: max(0.0, median(gaps) - sum(states.values()))} | states


def picture(chart: Chart) -> str:
    """The chart as a file of its own: names of the parts above it, colours inside it."""
    drawn = str(svg(chart.spec, "recovery", WIDE_PX))
    width, height = map(float, drawn.split('"')[1].split()[2:])  # of its view box
    names = "".join(
        f'<tspan fill="var({each.colour})">■ </tspan>{escape(each.label)}\u2003'
        for each in chart.legend
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
        f'viewBox="0 0 {width:g} {height + LEGEND_PX:g}">'
        f"<style>{style_sheet()}svg{{background:var(--card)}}</style>"
        f'<text x="8" y="16" font-size="13" fill="var(--ink)">{names}</text>'
        f'{drawn.replace("<svg ", f"""<svg y="{LEGEND_PX}" height="{height:g}" """, 1)}</svg>\n'
    )


def main() -> None:
    """Write the picture."""
    results = json.loads(Path(sys.argv[1]).read_text("utf-8"))["results"]
    seconds = {f"{each['layout']}, {each['harm']}": parts(each) for each in results}
    rows = {
        name: (
            f"{milliseconds(sum(of_part.values()))} ms",
            [
                {"cause": part, "size": 1e3 * each_s, "shown": figures(1e3 * each_s)}
                for part, each_s in of_part.items()
            ],
        )
        for name, of_part in seconds.items()
    }
    words = colour("cause", [replace(each, colour=on(each.colour)) for each in LEGEND])
    spec = stacked(rows, {}, {"color": colour("cause", LEGEND)}, words)
    table = Table.across("ms", [], [])
    chart = Chart("Where the time of a recovery goes", "", spec, table, legend=LEGEND, note="")
    (HERE / "recovery.svg").write_text(picture(chart), "utf-8")


if __name__ == "__main__":
    main()
