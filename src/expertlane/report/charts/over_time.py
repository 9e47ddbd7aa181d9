"""One quantity over the seconds around a moment, which is marked; below it what a server said."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from expertlane.report.charts.svg import AXIS, Spec, colour, layer, quantity, span, tooltip_of
from expertlane.report.document import Chart, Column, Legend, Table, number
from expertlane.report.numbers import figures

_HEIGHT_PX, _STRIP_PX = 160, 8
_MOST_ROWS = 120  # of the table
_Point = tuple[float, float | None]
_Channel = Callable[[str], Spec]  # the time axis of a field


@dataclass(frozen=True)
class Strip:
    """A period with a colour, below the plot.

    Attributes:
        label: its meaning, one of the chart's legend.
    """

    begin_s: float
    end_s: float
    label: str


def over_time_chart(
    title: str,
    what: str,
    points: Sequence[_Point],
    bin_s: float,
    *,
    colour_name: str,
    moment: str,
    level: float | None = None,
    strips: Sequence[Strip] = (),
    looks: Mapping[str, str] | None = None,
    note: str = "",
) -> Chart:
    """A quantity in bins; a dashed rule stands at 0 s, the moment.

    Args:
        what: the quantity, with its unit.
        points: begin of each bin, and the value there; None for none.
        moment: what happened at 0 s.
        level: value drawn as a dashed line.
        looks: colour of each label of the strips.
    """
    columns: dict[str, Column[_Point]] = {
        "at": number("s after the fault", lambda point: figures(point[0])),
        "value": number(what, lambda point: point[1], figures),
    }
    values = [
        {"begin": at, "y": value, "at": figures(at), "value": figures(value)}
        for at, value in points
        if value is not None
    ]
    until = max((at + bin_s for at, _ in points), default=1.0)
    since = min((at for at, _ in points), default=0.0)
    x = quantity("begin", "seconds after the fault", dict(AXIS), domain=[since, until], nice=False)
    y = quantity("y", what, dict(AXIS) | {"tickCount": 4})

    def at(field: str) -> Spec:
        return x | {"field": field}

    filled: Spec = {"color": {"value": colour_name}, "tooltip": tooltip_of(columns)}
    line = {"type": "line", "interpolate": "step-after", "strokeWidth": 2}
    layers = [layer(line, {"x": at("begin"), "y": y}, filled), *_rules(at, y, level)]
    legend = [Legend(label, look) for label, look in (looks or {}).items()]
    if strips:
        rows = [{"begin": s.begin_s, "end": s.end_s, "said": s.label} for s in strips]
        bar = {"type": "rect", "height": _STRIP_PX}
        place = {"y": {"value": _HEIGHT_PX - _STRIP_PX / 2}}
        layers.append(
            layer(
                bar, span(at, "begin", "end"), place, {"color": colour("said", legend)}, data=rows
            )
        )
    said = [note, f"Dashed, at 0 s: {moment}."]
    shown = [each for each in points if each[1] is not None]
    return Chart(
        title,
        f"{what} over the seconds around {moment}.",
        {"data": {"values": values}, "height": _HEIGHT_PX, "layer": layers},
        Table.of(title, columns.values(), shown[:_MOST_ROWS]),
        legend=legend if strips else (),
        note=" ".join(filter(None, said)),
    )


def _rules(at: _Channel, y: Spec, level: float | None) -> Iterator[Spec]:
    """A dashed line at the moment, and one at a level if there is one."""
    rule = {"type": "rule", "strokeDash": [5, 4], "color": "--ink"}
    yield layer(rule, {"x": at("moment")}, data=[{"moment": 0.0}])
    if level is not None:
        low = {"type": "rule", "strokeDash": [2, 3], "color": "--muted"}
        yield layer(low, {"y": y | {"field": "level"}}, data=[{"level": level}])
