"""Plots of several loads, of an engine or simulated: throughput and latency against load."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from expertlane.report.charts.bars import Spread, spread_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.pareto import Dot, pareto_chart
from expertlane.report.document import Chart, Section
from expertlane.report.loads import LoadPoint, best_of, served, typical_of
from expertlane.report.numbers import figures, times
from expertlane.report.speed import unit_of
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.results import Results
from expertlane.spec.workload import SLO, LatencyMetric

_MS_PER_S = 1e3
_NUM_FIRST = 2  # beside the answer
_LEAST_LOADS = 3  # loads of a layout; fewer are no curve
MOST_SPREADS = 3  # loads whose latencies are drawn one by one; of more, the best alone
_LATENCIES = ("tpot", "ttft")


def by_load(results: Results) -> tuple[Section, ...]:
    """Throughput and latency against load, or the spread of latencies where loads are few."""
    source = results.deployments[0].source
    heading = f"Latency and throughput by load, {source}"
    by_layout: dict[str, list[LoadPoint]] = {}
    for each in served(results):
        if _load(each) is not None:
            by_layout.setdefault(each.record.name, []).append(each)
    by_layout = {name: all_ for name, all_ in by_layout.items() if len(all_) >= _LEAST_LOADS}
    if not by_layout:
        spread = spread_of(results)
        return (Section(heading, (spread,), "first", "answer"),) if spread else ()
    best = best_of([each for of_layout in by_layout.values() for each in of_layout])
    charts = [
        _against_load(by_layout, best, "output tokens/s", lambda each: each.serving.output_tps),
        *_latencies(by_layout, best),
    ]
    if _median_tpot(best) is not None and best.record.layout is not None:
        charts.append(_trade(by_layout, best, unit_of(source)))
    first, more = tuple(charts[:_NUM_FIRST]), tuple(charts[_NUM_FIRST:])
    return (
        Section(heading, first, "first", "answer"),
        Section(heading, more, "plots", "loads"),
    )


def _latencies(by_layout: Mapping[str, Sequence[LoadPoint]], best: LoadPoint) -> Iterator[Chart]:
    """Charts of every statistic with a limit, the decisive one first; of the others, medians."""
    of_best = by_layout[best.record.name]
    slos = [each.slo for each in best.serving.slos]
    for slo in sorted(slos, key=lambda slo: _tightness(slo, of_best), reverse=True):
        value = _objective_ms(slo)
        if all(map(value, of_best)):
            what = f"{slo.metric.upper()} {slo.statistic}, ms"
            yield _against_load(by_layout, best, what, value, _MS_PER_S * slo.limit_s)
    for metric in _LATENCIES:
        has_limit = any(slo.metric == metric for slo in slos)
        if not has_limit and all(map(_median_ms(metric), of_best)):
            yield _against_load(by_layout, best, f"{metric.upper()}, ms", _median_ms(metric))


def spread_of(results: Results) -> Chart | None:
    """Chart of each latency's statistics; None where none is known."""
    found = served(results)
    best = best_of(found)
    shown = found if len(found) <= MOST_SPREADS else [best]
    spreads = [
        Spread(
            metric.upper() if len(shown) == 1 else f"{metric.upper()}, {_called(each, shown)}",
            ms,
            [
                _MS_PER_S * result.slo.limit_s
                for result in each.serving.slos
                if result.slo.metric == metric
            ],
        )
        for metric in get_args(LatencyMetric)
        for each in shown
        if (ms := _statistics_ms(getattr(each.serving, f"{metric}_s"), typical_of(results)))
    ]
    if not spreads:
        return None
    typical = typical_of(results)
    told = {
        metric: figures(ms[typical])
        for metric in _LATENCIES
        if (ms := _statistics_ms(getattr(best.serving, f"{metric}_s"), typical))
    }
    title = f"Latencies at {best.load}"
    if "ttft" in told:
        title = f"The first token comes after {told['ttft']} ms"
        title += f", then one every {told['tpot']} ms" if "tpot" in told else ""
        title += f" ({typical}s{'' if len(shown) == 1 else f', {_called(best, shown)}'})"
    return spread_chart(title, spreads, note="Further right is slower; the axis is logarithmic.")


def _called(each: LoadPoint, shown: Sequence[LoadPoint]) -> str:
    """Name of a load: its deployment, its load, or both, as needed to tell them apart."""
    loads, names = ({one.load for one in shown}, {one.name for one in shown})
    parts = [each.name] * (len(names) > 1) + [each.load] * (len(loads) > 1)
    return ", ".join(parts) or each.load


def _statistics_ms(seconds: Summary | None, first: str) -> dict[str, float]:
    """Milliseconds of each known statistic by name; `first` comes first."""
    known = {
        name: _MS_PER_S * found.value
        for name in (first, "median", "p95", "p99")
        if (found := getattr(seconds, name, None)) is not None and found.value > 0
    }
    return known if first in known else {}


def _tightness(slo: SLO, loads: Sequence[LoadPoint]) -> tuple[int, float]:
    """Sort key: number of loads that miss it, then how near to the limit they come."""
    found = [value.value for each in loads if (value := _objective_ms(slo)(each)) is not None]
    limit_ms = _MS_PER_S * slo.limit_s
    return sum(ms > limit_ms for ms in found), max(found, default=0.0) / limit_ms


def _objective_ms(slo: SLO) -> Callable[[LoadPoint], Estimate | None]:
    """Function that gets an objective's value of a load."""

    def value(each: LoadPoint) -> Estimate | None:
        values = (result.value for result in each.serving.slos if result.slo == slo)
        found = next(values, None)
        return None if found is None else found * _MS_PER_S

    return value


def _load(each: LoadPoint) -> float | None:
    """Batch or rate of a load; None for recorded arrivals."""
    return each.serving.rate if each.serving.batch is None else float(each.serving.batch)


def _load_name(each: LoadPoint) -> str:
    return "requests/s" if each.serving.batch is None else "concurrency"


def _against_load(
    by_layout: Mapping[str, Sequence[LoadPoint]],
    best: LoadPoint,
    what: str,
    value: Callable[[LoadPoint], Estimate | None],
    limit: float | None = None,
) -> Chart:
    """One curve a layout; the title is about the best one."""
    curves = [
        Curve(
            name,
            tuple(
                Point(at, found)
                for each in sorted(of_layout, key=lambda each: _load(each) or 0.0)
                if (at := _load(each)) is not None and (found := value(each)) is not None
            ),
        )
        for name, of_layout in by_layout.items()
    ]
    points = next(curve for curve in curves if curve.name == best.record.name).points
    first, *_, last = points
    load, (name, _, unit) = _load_name(best), what.partition(", ")
    whose = f" of {best.record.name}" * (len(curves) > 1)
    change = f"{'rises' if last.y.value > first.y.value else 'falls'} from {figures(first.y)} to"
    if figures(first.y) == figures(last.y):
        change = "stays at"
    title = (
        f"{name}{whose} {change} {figures(last.y)} {unit} between {load} {first.x:,.6g} and "
        f"{last.x:,.6g}"
    )
    if not unit:
        factor = times(last.y.value / first.y.value)
        title = (
            f"{figures(last.y)} {name}{whose} at {load} {last.x:,.6g}, {factor} those at "
            f"{first.x:,.6g}"
        )
    elif limit is not None:
        title = f"{_kept(points, limit, name + whose, load)} {limit:g} {unit}"
    measured = best.record.source == "measured"
    is_median = bool(unit) and limit is None
    note = "Medians over requests; vertical lines reach up to p95." if is_median else ""
    if not measured:
        note = f"{'Medians over requests. ' if is_median else ''}Vertical lines: low to high."
    return curves_chart(title, Axis(load, "log"), Axis(what), curves, note=note, limit=limit)


def _kept(points: Sequence[Point], limit: float, name: str, load: str) -> str:
    """The load up to which a limit is kept, in words; the title goes on with the limit."""
    kept = [point.x for point in points if point.y.value <= limit]
    if len(kept) == len(points):
        return f"{name} stays within"
    least_missed = min(point.x for point in points if point.y.value > limit)
    below = [x for x in kept if x < least_missed]
    return f"Up to {load} {max(below):,.6g}, {name} is within" if below else f"{name} is over"


def _median_ms(metric: str) -> Callable[[LoadPoint], Estimate | None]:
    """The median; measured: up to the 95th percentile; projected: from low to high."""

    def median(each: LoadPoint) -> Estimate | None:
        seconds: Summary | None = getattr(each.serving, f"{metric}_s")
        if seconds is None or seconds.median is None:
            return None
        if each.record.source != "measured" or seconds.p95 is None:
            return seconds.median * _MS_PER_S
        likely = _MS_PER_S * seconds.median.value
        return Estimate(likely, likely, _MS_PER_S * seconds.p95.value)

    return median


def _median_tpot(each: LoadPoint) -> Estimate | None:
    """The median; None where it is unknown, or 0 since all tokens came at once."""
    median = None if each.serving.tpot_s is None else each.serving.tpot_s.median
    return median if median is not None and min(median.bounds) > 0 else None


def _trade(by_layout: Mapping[str, Sequence[LoadPoint]], best: LoadPoint, unit: str) -> Chart:
    """A device's throughput against what a user sees, load by load."""
    dots = [
        Dot(
            f"{name}, {each.load}",
            median,
            each.serving.output_tps / each.record.num_ranks,
            "chosen" if each.serving is best.serving else "other",
            each.load,
            each.load if len(by_layout) == 1 else f"{name}, {each.load}",
        )
        for name, of_layout in by_layout.items()
        for each in of_layout
        if (median := _median_tpot(each)) is not None
    ]
    limits_s = (each.slo.limit_s for each in best.serving.slos if each.slo.name == "tpot.median")
    chosen = next(dot for dot in dots if dot.role == "chosen")
    return pareto_chart(
        f"At {best.load}, {figures(chosen.device_tps)} tokens/s per {unit}, "
        f"{figures(chosen.user_tps)} per user",
        dots,
        max_tpot_s=next(limits_s, None),
        device=unit,
        note="TPOT is the median over requests.",
    )
