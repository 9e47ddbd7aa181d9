"""Plot of a device's throughput against the speed that a user sees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import dist, hypot
from typing import Literal

import numpy as np
import numpy.typing as npt

from expertlane.report.charts.colours import OTHERS, PROPOSAL, REPORTED, REPORTED_SHAPE, RIVAL
from expertlane.report.charts.svg import (
    LIMIT,
    PATHS,
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
    limit = [] if max_tpot_s is None else [1.0 / max_tpot_s]
    far = _ROOM * max(*limit, *(dot.user_tps.value for dot in dots), 0.0)
    high = _ROOM * max(dot.device_tps.value for dot in dots)

    def across(field: str) -> Spec:
        return quantity(field, _USER, {"format": "~s"}, domain=[0, far], nice=False)

    def up(field: str) -> Spec:
        return quantity(field, per_device, {"format": "~s"}, domain=[0, high], nice=False)

    at = {"x": across("x"), "y": up("y")}
    widths = (("wide", f"width > {_NARROW_PX}"), ("narrow", f"width <= {_NARROW_PX}"))
    leads, names = zip(*(_names(*each, across, up) for each in widths), strict=True)
    size = by_name("kind", {each.label: _SIZES.get(each.label, 60) for each in looks})
    shape = by_name("kind", {each.label: PATHS.get(each.shape, each.shape) for each in looks})
    return {
        "data": {"values": _values(dots, columns, far, high, max_tpot_s)},
        "height": _HEIGHT_PX,
        "layer": [
            *([] if max_tpot_s is None else [_limit(max_tpot_s, across)]),
            layer({"type": "line", "strokeWidth": 1.5, "color": RIVAL}, at, where=_is_of("front")),
            *_bounds(across, up),
            *leads,
            layer(
                {"type": "point", "filled": True, "opacity": 1},
                *(at, {"color": colour("kind", looks), "shape": shape, "size": size}),
                {"tooltip": tooltip_of(columns)},
            ),
            *names,
        ],
    }


_Axis = Callable[[str], Spec]


def _is_of(role: Role) -> str:
    return f"datum.kind === {_LOOKS[role].label!r}"


def _limit(limit_s: float, across: _Axis) -> Spec:
    """A dashed line at the TPOT that users are promised."""
    words = {"type": "text", "align": "left", "baseline": "top", "dy": 2, "dx": _LIMIT_GAP_PX}
    return {
        "data": {"values": [{"x": 1.0 / limit_s, "said": _limit_said(limit_s)}]},
        "layer": [
            layer(LIMIT, {"x": across("x")}),
            layer(words, {"x": across("x"), "y": {"value": 0}, "text": {"field": "said"}}),
        ],
    }


def _limit_said(limit_s: float) -> str:
    return f"TPOT ≤ {1e3 * limit_s:g} ms"


def _names(field: str, test: str, across: _Axis, up: _Axis) -> tuple[Spec, Spec]:
    """Lines from names to their points, and the names, where there is room for them.

    Args:
        field: places of names at a width, `wide` or `narrow`.
        test: true at that width.
    """

    lead = f"{field}Lead"
    line = {"type": "rule", "color": "--muted", "strokeWidth": 0.7}
    to_point = span(across, "x", f"{lead}.x") | span(up, "y", f"{lead}.y", "y")
    name = {"type": "text", "align": "left", "baseline": "middle"}
    at = {"x": across(f"{field}.x"), "y": up(f"{field}.y"), "text": {"field": "label"}}
    return (
        layer(line, to_point, where=f"{test} && isValid(datum.{lead})"),
        layer(name, at, where=f"{test} && isValid(datum.{field})"),
    )


def _bounds(across: _Axis, up: _Axis) -> list[Spec]:
    """Bars from low to high of the chosen points."""
    line = {"type": "rule", "color": PROPOSAL, "opacity": 0.6}
    along, upright = span(across, "slow", "fast"), span(up, "low", "high", "y")
    return [
        layer(line, at, where=f"{_is_of('chosen')} && isValid(datum.low)")
        for at in (along | {"y": up("y")}, upright | {"x": across("x")})
    ]


def _values(
    dots: Sequence[Dot],
    columns: dict[str, Column[Dot]],
    far: float,
    high: float,
    limit_s: float | None,
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

        def px(x: float, y: float, width_px: int = width_px) -> _Place:
            return width_px * x / far, _HEIGHT_PX * (1 - y / high)

        def at(place: _Place, width_px: int = width_px) -> Spec:
            return {"x": place[0] / width_px * far, "y": (1 - place[1] / _HEIGHT_PX) * high}

        points = [px(value["x"], value["y"]) for value in values]
        lines = [[point for point, dot in zip(points, dots, strict=True) if dot.role == "front"]]
        if limit_s is not None:
            x, _ = px(1 / limit_s, 0.0)
            end = x + _LIMIT_GAP_PX + CHARACTER_PX * len(_limit_said(limit_s))
            lines += [(x, 0.0), (x, float(_HEIGHT_PX))], [(x, LINE_PX / 2), (end, LINE_PX / 2)]
        for each, dot, (x, y) in zip(values, dots, points, strict=True):
            if dot.role == "chosen":
                slow, fast = (px(each[end], 0.0)[0] for end in ("slow", "fast"))
                high_px, low_px = (px(0.0, each[end])[1] for end in ("high", "low"))
                lines += [(slow, y), (fast, y)], [(x, high_px), (x, low_px)]
        found = placed(points, [dot.label for dot in dots], (width_px, _HEIGHT_PX), lines)
        for value, place in zip(values, found, strict=True):
            if place is not None:
                value[name] = at((place.left, place.middle))
                if place.lead is not None:
                    value[f"{name}Lead"] = at(place.lead)
    return values[::-1]


_Place = tuple[float, float]
_Boxes = npt.NDArray[np.float64]
CHARACTER_PX, LINE_PX = 6.2, 14.0
_GAP_PX, _POINT_PX = 7.0, 4.0
_STEP_PX = 10.0  # between places further away that are tried
# Which side of its point a name stands on, tried in this order: right of it, left, in the middle;
# above, at its height, below.
_SIDES = tuple(side for side in product((1, -1, 0), (-1, 0, 1)) if any(side))


@dataclass(frozen=True)
class NamePlace:
    """Place of a name.

    Attributes:
        left: left end of the name.
        middle: middle of its height.
        lead: end of a line from its point to it; None where it stands beside the point.
    """

    left: float
    middle: float
    lead: _Place | None


def placed(
    points: Sequence[_Place],
    names: Sequence[str],
    size_px: _Place,
    lines: Sequence[Sequence[_Place]] = (),
) -> list[NamePlace | None]:
    """Place of each name, in pixels; None where there is no room for it.

    Args:
        points: in pixels from the upper left; a name for each, the most important first, empty for
            a point without.
        size_px: width and height of the plot.
        lines: joined places; a name moves away from its point rather than cross one.
    """
    named, found = _around([]), list[NamePlace | None]()
    taken = _around([*points, *(place for line in lines for place in _along(line))])
    for point, name in zip(points, names, strict=True):
        boxes = _places(point, name, size_px) if name else _around([])
        ends = np.clip(point, boxes[:, :2], boxes[:, 2:])  # of lines from the point
        is_within = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= size_px).all(1)
        is_free = is_within & ~_meet(boxes, np.concatenate([taken, named])).any(1)
        found.append(None)
        for box, end in zip(boxes[is_free], ends[is_free].tolist(), strict=True):
            lead = tuple(end) if dist(end, point) > 2 * _GAP_PX else None
            path = _around([*_along([point, lead])] if lead else [])
            if not _meet(path, named).any():
                left, top, _, bottom = box.tolist()
                found[-1] = NamePlace(left, (top + bottom) / 2, lead)
                named, taken = np.vstack([named, box]), np.concatenate([taken, path])
                break
    return found


def _places(point: _Place, name: str, size_px: _Place) -> _Boxes:
    """Places for a name: beside its point, then anywhere right of it or above, the nearest first.

    Returns:
        [num, 4]; left, top, right and bottom.
    """
    (x, y), size = point, (CHARACTER_PX * len(name), LINE_PX)
    beside = [
        (
            x + {1: _GAP_PX, 0: -size[0] / 2, -1: -size[0] - _GAP_PX}[across],
            y + down * (LINE_PX / 2 + (_POINT_PX if across else _GAP_PX)) - LINE_PX / 2,
        )
        for across, down in _SIDES
    ]
    lefts = np.arange(max(0.0, x - size[0]), size_px[0] - size[0], _STEP_PX)
    tops = np.arange(0.0, size_px[1] - LINE_PX, _STEP_PX)
    further = np.stack(np.meshgrid(lefts, tops, indexing="ij"), axis=-1).reshape(-1, 2)
    away = np.linalg.norm(np.clip(point, further, further + size) - point, axis=1)
    corners = np.concatenate([beside, further[np.argsort(away, kind="stable")]])
    return np.concatenate([corners, corners + size], axis=1)


def _around(places: Sequence[_Place]) -> _Boxes:
    """[num, 4]; boxes around points."""
    at = np.array(places, dtype=np.float64).reshape(-1, 2)
    return np.concatenate([at - _POINT_PX, at + _POINT_PX], axis=1)


def _meet(boxes: _Boxes, others: _Boxes) -> npt.NDArray[np.bool_]:
    """[num, num_others]; whether two boxes overlap."""
    one, other = boxes[:, None], others[None]
    meet = (one[..., :2] < other[..., 2:]) & (other[..., :2] < one[..., 2:])
    found: npt.NDArray[np.bool_] = np.logical_and.reduce(meet, axis=-1)
    return found


def _along(line: Sequence[_Place]) -> Iterator[_Place]:
    """Places on a line, no further apart than a name is high."""
    for (x, y), (to_x, to_y) in pairwise(line):
        num = 1 + int(hypot(to_x - x, to_y - y) / LINE_PX)
        for place in range(num):
            yield x + (to_x - x) * place / num, y + (to_y - y) * place / num
