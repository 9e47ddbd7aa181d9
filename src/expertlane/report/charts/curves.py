"""Curves and points: latency against context, batch and load; throughput against size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expertlane.report.charts.colours import SERIES, SHAPES
from expertlane.report.charts.encoding import Spec, colour, quantity, tooltip
from expertlane.report.document import Chart, Legend, Table, number, text
from expertlane.report.numbers import NONE, figures

_HEIGHT_PX = 280


@dataclass(frozen=True)
class Point:
    """A value at a place, with what it may lie between, and more to say on hovering."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    words: str = ""

    @property
    def between(self) -> str:
        """`1.2–3.4`."""
        if self.low is None or self.high is None:
            return NONE
        return f"{figures(self.low)}–{figures(self.high)}"


@dataclass(frozen=True)
class Curve:
    """Points of one name, joined by a line or not."""

    name: str
    points: tuple[Point, ...]
    is_joined: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    name: str
    scale: Literal["linear", "log"] = "linear"

    def encoding(self, of: str) -> Spec:
        """Of a field."""
        if self.scale == "log":
            return quantity(of, self.name, type="log", nice=False) | {
                "axis": {"format": "~s", "labelOverlap": True}
            }
        return quantity(of, self.name) | {"axis": {"format": "~s"}}


def curves_chart(title: str, x: Axis, y: Axis, curves: Sequence[Curve], *, note: str) -> Chart:
    """Curves over each other, each with a colour and a mark of its own."""
    names = [curve.name for curve in curves]
    colours = [SERIES[place % len(SERIES)] for place in range(len(curves))]
    shapes = [SHAPES[place % len(SHAPES)] for place in range(len(curves))]
    values = [
        {
            "curve": curve.name,
            "x": point.x,
            "y": point.y,
            "low": point.low,
            "high": point.high,
            "at": f"{point.x:,.6g}",
            "shown": figures(point.y),
            "between": point.between,
            "words": point.words or NONE,
        }
        for curve in curves
        for point in curve.points
    ]
    colouring = colour("curve", names, colours)
    shape = {"field": "curve", "scale": {"domain": names, "range": shapes}, "legend": None}
    titles = {"curve": "deployment", "at": x.name, "shown": y.name, "between": "low–high"}
    if any(point.words for curve in curves for point in curve.points):
        titles["words"] = "with"
    position = {"x": x.encoding("x"), "y": y.encoding("y"), "color": colouring}
    joined = [curve.name for curve in curves if curve.is_joined]
    layers: list[Spec] = [
        {
            "transform": [{"filter": {"field": "curve", "oneOf": joined}}],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": position,
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": position | {"shape": shape, "tooltip": tooltip(**titles)},
        },
    ]
    if any(point.low is not None for curve in curves for point in curve.points):
        layers.insert(
            1,
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 1, "opacity": 0.6},
                "encoding": position | {"y": y.encoding("low"), "y2": {"field": "high"}},
            },
        )
    return Chart(
        title,
        f"{y.name} against {x.name}, {len(curves)} of them: {', '.join(names)}.",
        {"data": {"values": values}, "height": _HEIGHT_PX, "layer": layers},
        _table(title, x, y, curves),
        legend=tuple(
            Legend(name, each, shape)
            for name, each, shape in zip(names, colours, shapes, strict=True)
        ),
        note=note,
    )


def _table(title: str, x: Axis, y: Axis, curves: Sequence[Curve]) -> Table:
    has_words = any(point.words for curve in curves for point in curve.points)
    return Table(
        title,
        (
            text("deployment"),
            number(x.name),
            number(y.name),
            number("low–high"),
            *([text("with")] if has_words else []),
        ),
        tuple(
            (
                curve.name,
                f"{point.x:,.6g}",
                figures(point.y),
                point.between,
                *([point.words or NONE] if has_words else []),
            )
            for curve in curves
            for point in curve.points
        ),
    )
