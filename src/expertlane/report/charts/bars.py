"""Bars: how fast each deployment is, and the parts of a step by cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertlane.report.charts.colours import BASELINE, OF_CAUSE, PROPOSAL
from expertlane.report.charts.encoding import (
    AXIS,
    Spec,
    cells,
    colour,
    nominal,
    quantity,
    tooltip,
    tooltip_of,
)
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import figures, low_high, milliseconds, percent
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord

_BAR_PX = 26
_LEAST_S = 1e-9  # less is a rounding's rest
_SEEN = 0.0005  # of a bar's length; less is left out
_KINDS = (Legend("baseline", BASELINE), Legend("proposal", PROPOSAL))


@dataclass(frozen=True)
class Bar:
    """The bar of one deployment."""

    name: str
    of: Estimate
    is_baseline: bool = False

    @property
    def kind(self) -> str:
        """Baseline or proposal."""
        return _KINDS[not self.is_baseline].label


def speed_chart(title: str, unit: str, bars: Sequence[Bar], *, between: str) -> Chart:
    """One bar a deployment.

    Args:
        between: what the range of a bar is of, for example `slowest and fastest run`.
    """
    legend = [each for each in _KINDS if any(bar.kind == each.label for bar in bars)]
    has_ranges = any(bar.of.low is not None for bar in bars)
    fastest = max(bars, key=lambda bar: bar.of.value)
    columns: dict[str, Column[Bar]] = {
        "deployment": text("deployment", lambda bar: bar.name),
        "kind": text("kind", lambda bar: bar.kind),
        "shown": number(unit, lambda bar: bar.of, figures),
        "between": number(between, lambda bar: bar.of, low_high),
    }
    hover = {"y": nominal("deployment"), "tooltip": tooltip_of(columns)}
    x = quantity("value", unit, AXIS)
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "cornerRadiusEnd": 2},
            "encoding": {"x": x, "color": colour("kind", legend)} | hover,
        }
    ]
    if has_ranges:
        layers.append(
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": "--ink"},
                "encoding": {"x": quantity("low", unit, AXIS), "x2": {"field": "high"}} | hover,
            }
        )
    return Chart(
        title,
        f"Bars of {unit}, {len(bars)} deployments; the highest is {fastest.name} with "
        f"{figures(fastest.of)}.",
        {
            "data": {"values": [cells(columns, bar) | vars(bar.of) for bar in bars]},
            "height": _BAR_PX * len(bars),
            "layer": layers,
        },
        Table.of(title, columns.values(), bars),
        legend=legend if len(legend) > 1 else (),
        note=f"The line over a bar: {between}." if has_ranges else "",
    )


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
    legend = [Legend(cause, OF_CAUSE[cause]) for cause in causes]
    in_all: Column[Mapping[str, float]] = number(
        "total", lambda each: sum(each.values()), milliseconds
    )
    return Chart(
        title,
        "Stacked bars, one per deployment: milliseconds per step by cause. "
        + " ".join(_largest(name, each) for name, each in seconds.items()),
        {
            "data": {"values": values},
            "height": _BAR_PX * len(seconds),
            "mark": {"type": "bar", "stroke": "--card", "strokeWidth": 1.2},
            "encoding": {
                "y": nominal("deployment"),
                "x": quantity("ms", "ms"),
                "color": colour("cause", legend),
                "order": {"field": "place"},
                "tooltip": tooltip(
                    deployment="deployment", cause="cause", shown="time", share="share"
                ),
            },
        },
        Table.across(title, [*map(_due_to, causes), in_all], list(seconds.items())),
        legend=legend,
        note=note,
    )


def _due_to(cause: str) -> Column[Mapping[str, float]]:
    return number(cause, lambda each: each.get(cause, 0.0), milliseconds)


def _largest(name: str, seconds: Mapping[str, float]) -> str:
    cause = max(seconds, key=lambda each: seconds[each])
    return f"{name}: largest is {cause}, {percent(seconds[cause] / sum(seconds.values()))}."
