"""The plots of loads on an engine, measured or simulated."""

from collections.abc import Callable, Sequence

from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.document import Chart, Section
from expertlane.report.loads import Served, served
from expertlane.results.estimate import Estimate
from expertlane.results.results import Results

_MS_PER_S = 1e3


def loads(results: Results) -> tuple[Section, ...]:
    """Throughput and latency by load, and against each other; none of a single simulated load."""
    found = served(results)
    if results.kind == "simulation" and len(found) == 1:
        return ()
    charts = _by_load(found) + _against_each_other(found)
    source = results.deployments[0].source
    return (Section(f"Throughput and latency, {source}", tuple(charts), "plots"),)


_OUTPUT, _LATENCY = Axis("output tokens/s"), Axis("TPOT, ms")


def _curves(found: Sequence[Served], point: Callable[[Served], Point | None]) -> list[Curve]:
    """One for each layout, through the points of its loads."""
    by_layout: dict[str, list[Served]] = {}
    for each in found:
        by_layout.setdefault(str(each.record.layout), []).append(each)
    return [
        Curve(layout, tuple(filter(None, map(point, points))))
        for layout, points in by_layout.items()
    ]


def _by_load(found: Sequence[Served]) -> list[Chart]:
    """Recorded arrivals have no size to be drawn by."""
    sizes = [_load(each) for each in found]
    if None in sizes:
        return []
    load = Axis("concurrency" if found[0].serving.batch is not None else "requests/s", "log")
    charts = [
        curves_chart(
            "Output tokens/s by load",
            load,
            _OUTPUT,
            _curves(found, lambda each: Point(_load(each) or 0.0, each.serving.output_tps)),
            note="",
        )
    ]
    if any(map(_tpot_ms, found)):
        charts.append(
            curves_chart(
                "TPOT by load",
                load,
                _LATENCY,
                _curves(
                    found,
                    lambda each: Point(_load(each) or 0.0, ms) if (ms := _tpot_ms(each)) else None,
                ),
                note="Medians over requests; vertical lines reach up to p95.",
            )
        )
    return charts


def _against_each_other(found: Sequence[Served]) -> list[Chart]:
    if not any(map(_tpot_ms, found)):
        return []
    return [
        curves_chart(
            "Tokens/s against TPOT",
            _LATENCY,
            _OUTPUT,
            _curves(
                found,
                lambda each: (
                    Point(ms.value, each.serving.output_tps, each.load)
                    if (ms := _tpot_ms(each))
                    else None
                ),
            ),
            note="Better: up and left. TPOT is the median over requests.",
        )
    ]


def _load(each: Served) -> float | None:
    batch = each.serving.batch
    return each.serving.rate if batch is None else float(batch)


def _tpot_ms(each: Served) -> Estimate | None:
    """The median, up to the 95th percentile."""
    seconds = each.serving.tpot_s
    if seconds is None or seconds.median is None or seconds.p95 is None:
        return None
    median = _MS_PER_S * seconds.median.value
    return Estimate(median, median, _MS_PER_S * seconds.p95.value)
