"""Plot of a device's throughput against the speed that a user sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from expertlane.report.charts.colours import OTHERS, PROPOSAL, REPORTED, REPORTED_SHAPE, RIVAL
from expertlane.report.charts.encoding import (
    PATHS,
    Spec,
    by_name,
    cells,
    colour,
    quantity,
    tooltip_of,
)
from expertlane.report.charts.labels import CHARACTER_PX, LINE_PX, placed
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import NONE, counted, figures, low_high
from expertlane.results.estimate import Estimate

_HEIGHT_PX = 300
# Widths that a page draws in, without an axis, and up to which it is the narrower one.
_WIDTHS_PX, _NARROW_PX = {"wide": 500, "narrow": 275}, 400
_ROOM = 1.12  # axis end over the largest value
_LIMIT_GAP_PX = 4  # between a limit's line and its words
_USER = "tokens/s per user (1/TPOT)"
Role = Literal["chosen", "front", "other", "reported"]
_LOOKS: dict[Role, Legend] = {
    "chosen": Legend("best", PROPOSAL, "diamond"),
    "front": Legend("Pareto front", RIVAL, "circle"),
    "other": Legend("others", OTHERS, "square"),
    "reported": Legend("reported", REPORTED, REPORTED_SHAPE),
}

_SIZES = {_LOOKS["chosen"].label: 150, _LOOKS["reported"].label: 120}


@dataclass(frozen=True)
class Dot:
    """One deployment under one load.

    Attributes:
        tpot_s: TPOT of every user.
        device_tps: tokens/s of one device.
        words: further words shown on hovering.
        label: text beside it; empty where its name stands there already.
    """

    name: str
    tpot_s: Estimate
    device_tps: Estimate
    role: Role
    words: str = ""
    label: str = ""

    @property
    def user_tps(self) -> Estimate:
        """Tokens a second that each user sees."""
        return 1.0 / self.tpot_s


def pareto_chart(
    title: str,
    dots: Sequence[Dot],
    *,
    max_tpot_s: float | None = None,
    device: str = "GPU",
    note: str = "",
) -> Chart:
    """Points with their names, those of the front joined, and the limit that users are promised."""
    per_device = f"tokens/s per {device}"
    looks = [look for role, look in _LOOKS.items() if any(dot.role == role for dot in dots)]
    columns: dict[str, Column[Dot]] = {
        "name": text("deployment", lambda dot: dot.name),
        "kind": text("which is", lambda dot: _LOOKS[dot.role].label),
        "user": number(_USER, lambda dot: dot.user_tps, figures),
        "user_range": number("low–high", lambda dot: dot.user_tps, low_high),
        "device": number(per_device, lambda dot: dot.device_tps, figures),
        "device_range": number("low–high", lambda dot: dot.device_tps, low_high),
        "words": text("with", lambda dot: dot.words or NONE),
    }
    if max_tpot_s is not None:
        note = f"Left of the dashed line TPOT is over {1e3 * max_tpot_s:g} ms. {note}"
    most = max(dots, key=lambda dot: dot.device_tps.value)
    return Chart(
        title,
        f"{per_device} against {_USER}, {counted(len(dots), 'point')}. Most per {device}: "
        f"{most.name}, {figures(most.device_tps)} at {figures(most.user_tps)} per user.",
        _spec(dots, columns, looks, per_device, max_tpot_s),
        Table.of(title, columns.values(), dots),
        legend=looks,
        note=f"Up and right is better. {note}".strip(),
    )


def _spec(
    dots: Sequence[Dot],
    columns: dict[str, Column[Dot]],
    looks: Sequence[Legend],
    per_device: str,
    max_tpot_s: float | None,
) -> Spec:
    limits = [] if max_tpot_s is None else [max_tpot_s]
    far = _ROOM * max([*(1.0 / each for each in limits), *(dot.user_tps.value for dot in dots)])
    high = _ROOM * max(dot.device_tps.value for dot in dots)

    def across(field: str) -> Spec:
        return quantity(field, _USER, {"format": "~s"}, domain=[0, far], nice=False)

    def up(field: str) -> Spec:
        return quantity(field, per_device, {"format": "~s"}, domain=[0, high], nice=False)

    at = {"x": across("x"), "y": up("y")}
    size = by_name("kind", {each.label: _SIZES.get(each.label, 60) for each in looks})
    shape = by_name("kind", {each.label: PATHS.get(each.shape, each.shape) for each in looks})
    return {
        "data": {"values": _values(dots, columns, far, high, limits)},
        "height": _HEIGHT_PX,
        "layer": [
            *([_limit(limits, across)] if limits else []),
            {
                "transform": [{"filter": f"datum.kind === {_LOOKS['front'].label!r}"}],
                "mark": {"type": "line", "strokeWidth": 1.5, "color": RIVAL},
                "encoding": at,
            },
            *_bounds(across, up),
            *_leads(at),
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": at
                | {"color": colour("kind", looks), "shape": shape, "size": size}
                | {"tooltip": tooltip_of(columns)},
            },
            *_names(across, up),
        ],
    }


_Axis = Callable[[str], Spec]


def _limit(limits_s: Sequence[float], across: _Axis) -> Spec:
    """A dashed line at each TPOT that users are promised."""
    return {
        "data": {"values": [{"x": 1.0 / each, "said": _limit_said(each)} for each in limits_s]},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "--ink"},
                "encoding": {"x": across("x")},
            },
            {
                "mark": {"type": "text", "align": "left", "baseline": "top", "dy": 2}
                | {"dx": _LIMIT_GAP_PX},
                "encoding": {"x": across("x"), "y": {"value": 0}, "text": {"field": "said"}},
            },
        ],
    }


def _limit_said(limit_s: float) -> str:
    return f"TPOT ≤ {1e3 * limit_s:g} ms"


def _names(across: _Axis, up: _Axis) -> list[Spec]:
    """Marks of names, where there is room for them at each of two widths."""
    return [
        {
            "transform": [{"filter": f"width {is_wide} {_NARROW_PX} && isValid(datum.{width})"}],
            "mark": {"type": "text", "align": "left", "baseline": "middle"},
            "encoding": {
                "x": across(f"{width}.x"),
                "y": up(f"{width}.y"),
                "text": {"field": "label"},
            },
        }
        for width, is_wide in (("wide", ">"), ("narrow", "<="))
    ]


def _leads(at: Spec) -> list[Spec]:
    """Lines from names to their points."""
    return [
        {
            "transform": [
                {"filter": f"width {is_wide} {_NARROW_PX} && isValid(datum.{width}Lead)"}
            ],
            "mark": {"type": "rule", "color": "--muted", "strokeWidth": 0.7},
            "encoding": at | {"x2": {"field": f"{width}Lead.x"}, "y2": {"field": f"{width}Lead.y"}},
        }
        for width, is_wide in (("wide", ">"), ("narrow", "<="))
    ]


def _bounds(across: _Axis, up: _Axis) -> list[Spec]:
    """Bars from low to high of the chosen points."""
    chosen = [{"filter": f"datum.kind === {_LOOKS['chosen'].label!r} && isValid(datum.low)"}]
    mark = {"type": "rule", "color": PROPOSAL, "opacity": 0.6}
    return [
        {
            "transform": chosen,
            "mark": mark,
            "encoding": {"x": across("slow"), "x2": {"field": "fast"}, "y": up("y")},
        },
        {
            "transform": chosen,
            "mark": mark,
            "encoding": {"x": across("x"), "y": up("low"), "y2": {"field": "high"}},
        },
    ]


def _values(
    dots: Sequence[Dot],
    columns: dict[str, Column[Dot]],
    far: float,
    high: float,
    limits_s: Sequence[float],
) -> list[Spec]:
    """Values of the dots, the most important last and so on top, with places of names."""
    dots = sorted(dots, key=lambda dot: list(_LOOKS).index(dot.role))
    values = [
        cells(columns, dot)
        | {"x": dot.user_tps.value, "slow": dot.user_tps.bounds[0]}
        | {"fast": min(far, dot.user_tps.bounds[-1])}
        | {"y": dot.device_tps.value, "low": dot.device_tps.bounds[0]}
        | {"high": min(high, dot.device_tps.bounds[-1])}
        | {"label": dot.label}
        for dot in dots
    ]
    for name, width_px in _WIDTHS_PX.items():
        points = [
            (width_px * value["x"] / far, _HEIGHT_PX * (1 - value["y"] / high)) for value in values
        ]
        lines = [[at for at, dot in zip(points, dots, strict=True) if dot.role == "front"]]
        for each in limits_s:
            x = width_px / each / far
            end = x + _LIMIT_GAP_PX + CHARACTER_PX * len(_limit_said(each))
            lines += [(x, 0.0), (x, float(_HEIGHT_PX))], [(x, LINE_PX / 2), (end, LINE_PX / 2)]
        for value, dot, (x, y) in zip(values, dots, points, strict=True):
            if dot.role == "chosen":
                ends = value["slow"], value["fast"], value["high"], value["low"]
                slow, fast = (width_px * each / far for each in ends[:2])
                high_px, low_px = (_HEIGHT_PX * (1 - each / high) for each in ends[2:])
                lines += [(slow, y), (fast, y)], [(x, high_px), (x, low_px)]
        names = [dot.label for dot in dots]
        found = placed(points, names, (width_px, _HEIGHT_PX), lines)
        for value, place in zip(values, found, strict=True):
            if place is not None:
                value[name] = {
                    "x": place.left / width_px * far,
                    "y": (1 - place.middle / _HEIGHT_PX) * high,
                }
                if place.lead is not None:
                    x, y = place.lead
                    value[f"{name}Lead"] = {
                        "x": x / width_px * far,
                        "y": (1 - y / _HEIGHT_PX) * high,
                    }
    return values[::-1]
