"""Bars: how fast each deployment is, and the parts of a step by cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertlane.report.charts.colours import BASELINE, OF_CAUSE, PROPOSAL
from expertlane.report.charts.encoding import AXIS, Spec, colour, nominal, quantity, tooltip
from expertlane.report.document import Chart, Legend, Table, number, text
from expertlane.report.numbers import NONE, figures, milliseconds, percent

_BAR_PX = 26
_LEAST_S = 1e-9  # less is a rounding's rest
_SEEN = 0.0005  # of a bar's length; less is left out


@dataclass(frozen=True)
class Bar:
    """A value, and what it may lie between where that is known."""

    name: str
    value: float
    is_baseline: bool
    low: float | None = None
    high: float | None = None

    @property
    def between(self) -> str:
        """`1.2–3.4`."""
        if self.low is None or self.high is None:
            return NONE
        return f"{figures(self.low)}–{figures(self.high)}"


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
    has_ranges = any(bar.low is not None for bar in bars)
    fastest = max(bars, key=lambda bar: bar.value)
    return Chart(
        title,
        f"Bars of {unit} of {len(bars)} deployments; the longest is {fastest.name}'s, "
        f"{figures(fastest.value)}.",
        _speed_spec(unit, bars, between, kinds, shown, has_ranges=has_ranges),
        Table(
            title,
            (text("deployment"), text("kind"), number(unit), number(between)),
            tuple(
                (bar.name, kinds[not bar.is_baseline], figures(bar.value), bar.between)
                for bar in bars
            ),
        ),
        legend=tuple(Legend(*kind) for kind in shown) if len(shown) > 1 else (),
        note=f"The line over a bar: {between}." if has_ranges else "",
    )


def _speed_spec(
    unit: str,
    bars: Sequence[Bar],
    between: str,
    kinds: tuple[str, str],
    shown: Sequence[tuple[str, str]],
    *,
    has_ranges: bool,
) -> Spec:
    values = [
        {
            "deployment": bar.name,
            "value": bar.value,
            "low": bar.low,
            "high": bar.high,
            "kind": kinds[not bar.is_baseline],
            "shown": figures(bar.value),
            "between": bar.between,
        }
        for bar in bars
    ]
    y = nominal("deployment")
    hover = tooltip(deployment="deployment", kind="kind", shown=unit, between=between)
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
    return {"data": {"values": values}, "height": _BAR_PX * len(bars), "layer": layers}


def causes_chart(title: str, seconds: Mapping[str, Mapping[str, float]], *, note: str) -> Chart:
    """A stacked bar a deployment.

    Args:
        seconds: by deployment and cause, in the order in which they are stacked.
    """
    seconds = {
        name: {cause: s if s > _LEAST_S else 0.0 for cause, s in each.items()}
        for name, each in seconds.items()
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
        Table(
            title,
            (text("ms"), *(number(name) for name in seconds)),
            (
                *(
                    (cause, *(milliseconds(each.get(cause, 0.0)) for each in seconds.values()))
                    for cause in causes
                ),
                ("in all", *(milliseconds(sum(each.values())) for each in seconds.values())),
            ),
        ),
        legend=tuple(Legend(cause, OF_CAUSE[cause]) for cause in causes),
        note=note,
    )


def _largest(name: str, seconds: Mapping[str, float]) -> str:
    cause = max(seconds, key=lambda each: seconds[each])
    return f"{name}: most to {cause}, {percent(seconds[cause] / sum(seconds.values()))}."
