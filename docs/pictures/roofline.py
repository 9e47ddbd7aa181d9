"""Draw kernels under the roofs of each instruction set, as `roofline.svg` beside this script.

    python benchmarks/bench_kernels.py | tail -1 > kernels.json
    python docs/pictures/roofline.py kernels.json

A point is a product in bfloat16: FLOPs for each byte that it reads, and the FLOP/s that it reaches.
A line is the roof of a set: what its bytes take to be read, then the peak of its multiply-adds.
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from expertlane.report.charts.colours import style_sheet
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.svg import WIDE_PX, svg
from expertlane.report.document import Chart
from expertlane.results.estimate import Estimate

HERE = Path(__file__).parent
GIGA, LEGEND_PX = 1e9, 26
DTYPE = "bfloat16"
READ = "read"  # the benchmark's loop over as many bytes
INTENSITY, SPEED = "FLOPs for each byte read", "GFLOP/s"


def roof(name: str, peak: float, reads: float, intensities: list[float]) -> Curve:
    """The most FLOP/s of a set at each number of FLOPs a byte, bending at its ridge.

    Args:
        peak: FLOP/s.
        reads: bytes per second.
    """
    places = sorted({min(intensities), peak / reads, max(*intensities, peak / reads)})
    points = [Point(x, Estimate(value=min(peak, x * reads) / GIGA)) for x in places]
    return Curve(f"roof of {name}", tuple(points), role="back")


def kernels(name: str, rows: list[dict[str, Any]]) -> Curve:
    """What our kernels of a set reach."""
    points = [
        Point(
            row["flops_per_s"] / row["bytes_per_s"],
            Estimate(value=row["flops_per_s"] / GIGA),
            row["what"],
        )
        for row in rows
        if row["variant"] == name
    ]
    return Curve(name, tuple(points), is_joined=False)


def roofline(found: dict[str, Any]) -> Chart:
    """Roofs in grey, kernels in front, from the benchmark's JSON."""
    rows = [row for row in found["rows"] if row["dtype"].endswith(DTYPE)]
    peaks = {
        key.split()[0]: peak
        for key, peak in found["peak_flops_per_s"].items()
        if key.endswith(DTYPE)
    }
    reads = max(row["bytes_per_s"] for row in rows if row["variant"] == READ)
    front = [kernels(name, rows) for name in peaks]
    intensities = [point.x for curve in front for point in curve.points]
    roofs = [roof(name, peak, reads, intensities) for name, peak in peaks.items()]
    return curves_chart(
        "Kernels under their roofs",
        Axis(INTENSITY, "log"),
        Axis(SPEED, "log"),
        [*roofs, *front],
        note="",
    )


def picture(chart: Chart) -> str:
    """The chart as a file of its own: names of the sets above it, colours inside it."""
    drawn = str(svg(chart.spec, "roofline", WIDE_PX))
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
    chart = roofline(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    (HERE / "roofline.svg").write_text(picture(chart), "utf-8")


if __name__ == "__main__":
    main()
