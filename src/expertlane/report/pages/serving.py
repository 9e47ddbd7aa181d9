"""The plots of a load on an engine."""

from collections.abc import Sequence

from expertlane.report.charts.curves import Axis, Curve, curves_chart
from expertlane.report.charts.curves import Point as Place
from expertlane.report.document import Chart, PageSection
from expertlane.report.serving import load_name, verdict
from expertlane.results.serving import Point, ServingResults

_MS_PER_S = 1e3


def headline(results: ServingResults) -> str:
    """What gave most output, in a sentence."""
    return verdict(results)[0]


def sections(results: ServingResults) -> tuple[PageSection, ...]:
    """All plots; everything was measured."""
    by_layout: dict[str, list[Point]] = {}
    for point in results.points:
        by_layout.setdefault(str(point.layout.layout), []).append(point)
    charts = [_throughput(by_layout)]
    if any(point.tpot_s is not None for point in results.points):
        charts += [_latency(by_layout), _trade(by_layout)]
    return (PageSection("Throughput and latency, measured", tuple(charts)),)


def _load_axis(points: Sequence[Point]) -> Axis:
    is_closed = points[0].batch is not None
    return Axis("requests at once" if is_closed else "requests a second", "log")


def _load(point: Point) -> float:
    return point.rate or 0.0 if point.batch is None else float(point.batch)


def _throughput(by_layout: dict[str, list[Point]]) -> Chart:
    return curves_chart(
        "Output tokens a second by load",
        _load_axis(next(iter(by_layout.values()))),
        Axis("output tokens/s"),
        [
            Curve(layout, tuple(Place(_load(each), each.output_tps) for each in points))
            for layout, points in by_layout.items()
        ],
        note="",
    )


def _latency(by_layout: dict[str, list[Point]]) -> Chart:
    return curves_chart(
        "TPOT by load",
        _load_axis(next(iter(by_layout.values()))),
        Axis("TPOT, ms"),
        [
            Curve(
                layout,
                tuple(
                    Place(
                        _load(each),
                        _MS_PER_S * each.tpot_s.p50,
                        _MS_PER_S * each.tpot_s.p50,
                        _MS_PER_S * each.tpot_s.p95,
                    )
                    for each in points
                    if each.tpot_s is not None
                ),
            )
            for layout, points in by_layout.items()
        ],
        note="Medians over requests; the lines up from them go to the 95th percentile.",
    )


def _trade(by_layout: dict[str, list[Point]]) -> Chart:
    return curves_chart(
        "Tokens a second against TPOT",
        Axis("TPOT, ms"),
        Axis("output tokens/s"),
        [
            Curve(
                layout,
                tuple(
                    Place(_MS_PER_S * each.tpot_s.p50, each.output_tps, words=load_name(each))
                    for each in points
                    if each.tpot_s is not None
                ),
            )
            for layout, points in by_layout.items()
        ],
        note="Up and left is better. TPOT is the median over requests.",
    )
