"""Curves and points: latency against context, batch and load; throughput against size."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from expertlane.report.charts.colours import (
    BACKGROUND,
    SERIES,
    SHAPES,
)
from expertlane.report.charts.svg import (
    AXIS,
    LIMIT,
    Spec,
    by_name,
    cells,
    colour,
    layer,
    quantity,
    span,
    tooltip_of,
)
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import NONE, figures, low_high
from expertlane.results.estimate import Estimate

_HEIGHT_PX = 280
_PADDING_PX = 14
_MOST_LABELS, _LONG = 9, 1e5


@dataclass(frozen=True)
class Point:
    """A value on both axes, with words shown on hovering."""

    x: float
    y: Estimate
    words: str = ""


_Named = tuple[str, Point]


@dataclass(frozen=True)
class Curve:
    """A named series of points, joined by a line or not.

    Attributes:
        role: `front` has a colour of its own, `back` is grey like all of its kind.
        is_dashed: draw the line of a baseline dashed.
    """

    name: str
    points: tuple[Point, ...]
    is_joined: bool = True
    role: Literal["front", "back"] = "front"
    is_dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis: its name and scale."""

    name: str
    scale: Literal["linear", "log"] = "linear"

    def encoding(self, of: str, at: Sequence[float] = ()) -> Spec:
        """Vega's encoding of a field; labels at the values themselves where those are few."""
        axis: Spec = dict(AXIS)
        if self.name.endswith("ms"):
            axis["format"] = "~r"  # no `800m`
        if self.scale == "log":
            places = sorted(set(at))
            if 0 < len(places) <= _MOST_LABELS:
                axis |= {"values": places, "format": ",d" if max(places) < _LONG else "~s"}
            return quantity(of, self.name, axis, type="log", nice=False, padding=_PADDING_PX)
        return quantity(of, self.name, axis)


def curves_chart(
    title: str,
    x: Axis,
    y: Axis,
    curves: Sequence[Curve],
    *,
    note: str,
    limit: float | None = None,
) -> Chart:
    """Curves over each other, each in front with a colour and a mark of its own.

    Args:
        limit: value of `y`, drawn as a dashed line.
    """
    looks, columns = _looks(curves), _columns(x, y, curves)
    behind = [curve.name for curve in curves if curve.role == "back"]
    if behind:
        note = f"{note} In grey: {', '.join(behind)}.".strip()
    points = [(curve.name, point) for curve in curves for point in curve.points]
    if limit is not None:
        note = f"{note} Dashed: the limit, {limit:g}.".strip()
    return Chart(
        title,
        f"{y.name} against {x.name}, {len(curves)} of them: "
        f"{', '.join(look.label for look in looks)}.",
        _spec(x, y, curves, looks, columns, limit),
        Table.of(title, columns.values(), points),
        legend=[look for look in looks if look.label not in behind] if len(looks) > 1 else (),
        note=note,
    )


def _looks(curves: Sequence[Curve]) -> list[Legend]:
    """Colour and mark of each curve."""
    in_front = zip(cycle(SERIES), cycle(SHAPES))
    behind = BACKGROUND, "circle"
    return [
        Legend(each.name, *(behind if each.role == "back" else next(in_front))) for each in curves
    ]


def _columns(x: Axis, y: Axis, curves: Sequence[Curve]) -> dict[str, Column[_Named]]:
    """Columns of the table of points, shown on hovering too."""
    columns: dict[str, Column[_Named]] = {
        "curve": text("deployment", lambda named: named[0]),
        "at": number(x.name, lambda named: f"{named[1].x:,.6g}"),
        "shown": number(y.name, lambda named: named[1].y, figures),
        "between": number("low–high", lambda named: named[1].y, low_high),
    }
    if any(point.words for curve in curves for point in curve.points):
        columns["words"] = text("with", lambda named: named[1].words or NONE)
    return columns


def _spec(
    x: Axis,
    y: Axis,
    curves: Sequence[Curve],
    looks: Sequence[Legend],
    columns: dict[str, Column[_Named]],
    limit: float | None,
) -> Spec:
    values = [
        cells(columns, (curve.name, point))
        | {"x": point.x, "y": point.y.value, "low": point.y.low, "high": point.y.high}
        for curve in sorted(curves, key=lambda each: each.role != "back")  # grey ones below
        for point in curve.points
    ]
    shape = by_name("curve", {each.label: each.shape for each in looks})
    width = by_name("curve", {each.name: 2 if each.role == "front" else 1 for each in curves})
    dash = by_name("curve", {each.name: [5, 3] if each.is_dashed else [1, 0] for each in curves})
    position = {
        "x": x.encoding("x", [point.x for curve in curves for point in curve.points]),
        "y": y.encoding("y"),
        "color": colour("curve", looks),
        "detail": {"field": "curve"},
    }
    joined = [curve.name for curve in curves if curve.is_joined]
    front = [curve.name for curve in curves if curve.role == "front"]
    in_front: Spec = {"field": "curve", "oneOf": front}
    has_range = {"and": [in_front, {"field": "low", "valid": True}]}
    range_line = {"type": "rule", "strokeWidth": 1, "opacity": 0.6}
    dot = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    is_joined = {"field": "curve", "oneOf": joined}
    lines = {"strokeDash": dash, "strokeWidth": width}
    layers = [
        layer({"type": "line"}, position, lines, where=is_joined),
        layer(range_line, position, span(y.encoding, "low", "high", "y"), where=has_range),
        layer(dot, position, {"shape": shape, "tooltip": tooltip_of(columns)}, where=in_front),
    ]
    if limit is not None:
        layers.append(layer(LIMIT, {"y": y.encoding("limit")}, data=[{"limit": limit}]))
    return {"data": {"values": values}, "height": _HEIGHT_PX, "layer": layers}
