"""The plots of a load on an engine."""

from collections.abc import Callable

from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.document import Section
from expertlane.report.loads import Served, served
from expertlane.results.estimate import Estimate
from expertlane.results.results import Results

_MS_PER_S = 1e3


def bench(results: Results) -> tuple[Section, ...]:
    """Plots of a load on an engine; everything was measured."""
    by_layout: dict[str, list[Served]] = {}
    for each in served(results):
        by_layout.setdefault(str(each.record.layout), []).append(each)
    is_closed = served(results)[0].serving.batch is not None
    load = Axis("concurrency" if is_closed else "requests/s", "log")
    output, latency = Axis("output tokens/s"), Axis("TPOT, ms")

    def curves(point: Callable[[Served], Point | None]) -> list[Curve]:
        return [
            Curve(layout, tuple(filter(None, map(point, points))))
            for layout, points in by_layout.items()
        ]

    charts = [
        curves_chart(
            "Output tokens/s by load",
            load,
            output,
            curves(lambda each: Point(_load(each), each.serving.output_tps)),
            note="",
        )
    ]
    if any(_tpot_ms(each) for each in served(results)):
        charts += [
            curves_chart(
                "TPOT by load",
                load,
                latency,
                curves(lambda each: Point(_load(each), ms) if (ms := _tpot_ms(each)) else None),
                note="Medians over requests; vertical lines reach up to p95.",
            ),
            curves_chart(
                "Tokens/s against TPOT",
                latency,
                output,
                curves(
                    lambda each: (
                        Point(ms.value, each.serving.output_tps, each.load)
                        if (ms := _tpot_ms(each))
                        else None
                    )
                ),
                note="Better: up and left. TPOT is the median over requests.",
            ),
        ]
    return (
        Section("measured", tuple(charts[:2]), "first"),
        Section("Throughput against latency, measured", tuple(charts[2:]), "plots"),
    )


def _load(each: Served) -> float:
    batch = each.serving.batch
    return each.serving.rate or 0.0 if batch is None else float(batch)


def _tpot_ms(each: Served) -> Estimate | None:
    """The median, up to the 95th percentile."""
    seconds = each.serving.tpot_s
    if seconds is None or seconds.median is None or seconds.p95 is None:
        return None
    median = _MS_PER_S * seconds.median.value
    return Estimate(median, median, _MS_PER_S * seconds.p95.value)
