"""Bars: how fast each deployment is, and the parts of a step by cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertlane.report.charts.colours import BASELINE, OF_CAUSE, PROPOSAL
from expertlane.report.charts.encoding import AXIS, Spec, colour, nominal, quantity, tooltip
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import figures, low_high, milliseconds, percent
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord

_BAR_PX = 26
_LEAST_S = 1e-9  # less is a rounding's rest
_SEEN = 0.0005  # of a bar's length; less is left out


@dataclass(frozen=True)
class Bar:
    """One deployment's."""

    name: str
    of: Estimate
    is_baseline: bool = False


def speed_chart(
    title: str,
    unit: str,
    bars: Sequence[Bar],
    *,
    between: str,
    kinds: tuple[str, str] = ("baseline", "proposal"),
) -> Chart:
    """One bar a deployment.

    Args:
        between: what the range of a bar is of, for example `slowest and fastest run`.
        kinds: what baselines and the others are called.
    """
    shown = [
        kind
        for place, kind in enumerate(zip(kinds, (BASELINE, PROPOSAL), strict=True))
        if any(bar.is_baseline is not bool(place) for bar in bars)
    ]
    has_ranges = any(bar.of.low is not None for bar in bars)
    fastest = max(bars, key=lambda bar: bar.of.value)
    values = [
        {
            "deployment": bar.name,
            "value": bar.of.value,
            "low": bar.of.low,
            "high": bar.of.high,
            "kind": kinds[not bar.is_baseline],
            "shown": figures(bar.of),
            "between": low_high(bar.of),
        }
        for bar in bars
    ]
    columns: tuple[Column[Bar], ...] = (
        text("deployment", lambda bar: bar.name),
        text("kind", lambda bar: kinds[not bar.is_baseline]),
        number(unit, lambda bar: bar.of, figures),
        number(between, lambda bar: bar.of, low_high),
    )
    hover = tooltip(deployment="deployment", kind="kind", shown=unit, between=between)
    return Chart(
        title,
        f"Bars of {unit} of {len(bars)} deployments; the longest is {fastest.name}'s, "
        f"{figures(fastest.of)}.",
        {
            "data": {"values": values},
            "height": _BAR_PX * len(bars),
            "layer": _layers(unit, shown, hover, has_ranges=has_ranges),
        },
        Table.of(title, columns, bars),
        legend=tuple(Legend(*kind) for kind in shown) if len(shown) > 1 else (),
        note=f"The line over a bar: {between}." if has_ranges else "",
    )


def _layers(
    unit: str, shown: Sequence[tuple[str, str]], hover: list[Spec], *, has_ranges: bool
) -> list[Spec]:
    y = nominal("deployment")
    colouring = colour("kind", [name for name, _ in shown], [each for _, each in shown])
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "cornerRadiusEnd": 2},
            "encoding": {"y": y, "x": quantity("value", unit) | {"axis": AXIS}, "color": colouring}
            | {"tooltip": hover},
        }
    ]
    if has_ranges:
        x = {"x": quantity("low", unit) | {"axis": AXIS}, "x2": {"field": "high"}}
        layers.append(
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": "--ink"},
                "encoding": x | {"y": y, "tooltip": hover},
            }
        )
    return layers


def causes_chart(title: str, steps: Mapping[str, StepsRecord], *, note: str) -> Chart:
    """A stacked bar a deployment, its causes in the order in which they are kept."""
    seconds = {
        name: {cause: s if s > _LEAST_S else 0.0 for cause, s in step.breakdown_s.items()}
        for name, step in steps.items()
    }
    longest_s = max(sum(each.values()) for each in seconds.values())
    causes = [
        cause
        for cause in dict.fromkeys(cause for each in seconds.values() for cause in each)
        if any(each.get(cause, 0.0) > _SEEN * longest_s for each in seconds.values())
    ]
    values = [
        {
            "deployment": name,
            "cause": cause,
            "place": place,
            "ms": 1e3 * each.get(cause, 0.0),
            "shown": f"{milliseconds(each.get(cause, 0.0))} ms",
            "share": percent(each.get(cause, 0.0) / sum(each.values())),
        }
        for name, each in seconds.items()
        for place, cause in enumerate(causes)
    ]
    in_all: Column[Mapping[str, float]] = number(
        "in all", lambda each: sum(each.values()), milliseconds
    )
    return Chart(
        title,
        "Stacked bars, one a deployment: the milliseconds of a step by what they go to. "
        + " ".join(_largest(name, each) for name, each in seconds.items()),
        {
            "data": {"values": values},
            "height": _BAR_PX * len(seconds),
            "mark": {"type": "bar", "stroke": "--card", "strokeWidth": 1.2},
            "encoding": {
                "y": nominal("deployment"),
                "x": quantity("ms", "ms"),
                "color": colour("cause", causes, [OF_CAUSE[cause] for cause in causes]),
                "order": {"field": "place"},
                "tooltip": tooltip(
                    deployment="deployment", cause="cause", shown="time", share="share"
                ),
            },
        },
        Table.across(
            title,
            [*map(_due_to, causes), in_all],
            list(seconds.items()),
        ),
        legend=tuple(Legend(cause, OF_CAUSE[cause]) for cause in causes),
        note=note,
    )


def _due_to(cause: str) -> Column[Mapping[str, float]]:
    return number(cause, lambda each: each.get(cause, 0.0), milliseconds)


def _largest(name: str, seconds: Mapping[str, float]) -> str:
    cause = max(seconds, key=lambda each: seconds[each])
    return f"{name}: most to {cause}, {percent(seconds[cause] / sum(seconds.values()))}."
