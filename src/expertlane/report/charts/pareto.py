"""Plot of a device's throughput against the speed that a user sees."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from math import dist, hypot
from typing import Literal, NamedTuple

import numpy as np

from expertlane.report.charts.colours import OTHERS, PROPOSAL, REPORTED, REPORTED_SHAPE, RIVAL
from expertlane.report.charts.svg import (
    PATHS,
    Spec,
    by_name,
    cells,
    colour,
    quantity,
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
            {
                "transform": [{"filter": f"datum.kind === {_LOOKS['front'].label!r}"}],
                "mark": {"type": "line", "strokeWidth": 1.5, "color": RIVAL},
                "encoding": at,
            },
            *_bounds(across, up),
            *leads,
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": at
                | {"color": colour("kind", looks), "shape": shape, "size": size}
                | {"tooltip": tooltip_of(columns)},
            },
            *names,
        ],
    }


_Axis = Callable[[str], Spec]


def _limit(limit_s: float, across: _Axis) -> Spec:
    """A dashed line at the TPOT that users are promised."""
    words = {"type": "text", "align": "left", "baseline": "top", "dy": 2, "dx": _LIMIT_GAP_PX}
    return {
        "data": {"values": [{"x": 1.0 / limit_s, "said": _limit_said(limit_s)}]},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "--ink"},
                "encoding": {"x": across("x")},
            },
            {
                "mark": words,
                "encoding": {"x": across("x"), "y": {"value": 0}, "text": {"field": "said"}},
            },
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

    def where(field: str) -> list[Spec]:
        return [{"filter": f"{test} && isValid(datum.{field})"}]

    lead, x, y = f"{field}Lead", across(f"{field}.x"), up(f"{field}.y")
    ends = {"x2": {"field": f"{lead}.x"}, "y2": {"field": f"{lead}.y"}}
    return (
        {
            "transform": where(lead),
            "mark": {"type": "rule", "color": "--muted", "strokeWidth": 0.7},
            "encoding": {"x": across("x"), "y": up("y")} | ends,
        },
        {
            "transform": where(field),
            "mark": {"type": "text", "align": "left", "baseline": "middle"},
            "encoding": {"x": x, "y": y, "text": {"field": "label"}},
        },
    )


def _bounds(across: _Axis, up: _Axis) -> list[Spec]:
    """Bars from low to high of the chosen points."""
    chosen = f"datum.kind === {_LOOKS['chosen'].label!r} && isValid(datum.low)"
    return [
        {
            "transform": [{"filter": chosen}],
            "mark": {"type": "rule", "color": PROPOSAL, "opacity": 0.6},
            "encoding": at,
        }
        for at in (
            {"x": across("slow"), "x2": {"field": "fast"}, "y": up("y")},
            {"x": across("x"), "y": up("low"), "y2": {"field": "high"}},
        )
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
CHARACTER_PX, LINE_PX = 6.2, 14.0
_GAP_PX, _POINT_PX = 7.0, 4.0
_STEP_PX = 10.0  # between places further away that are tried
# Which side of its point a name stands on, tried in this order: right of it, left, in the middle;
# above, at its height, below.
_SIDES = tuple(side for side in product((1, -1, 0), (-1, 0, 1)) if any(side))


@dataclass(frozen=True)
class Placed:
    """Place of a name.

    Attributes:
        left: left end of the name.
        middle: middle of its height.
        lead: end of a line from its point to it; None where it stands beside the point.
    """

    left: float
    middle: float
    lead: _Place | None


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def is_within(self, size_px: _Place) -> bool:
        width, height = size_px
        return self.left >= 0 and self.top >= 0 and self.right <= width and self.bottom <= height

    def meets(self, other: "_Box") -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def lead(self, point: _Place) -> _Place | None:
        """End of the line from its point; None where it stands beside that."""
        end = self.nearest(point)
        return end if dist(end, point) > 2 * _GAP_PX else None

    def path_from(self, point: _Place) -> list[_Place]:
        """Places on the line from its point."""
        end = self.lead(point)
        return [] if end is None else list(_along([point, end]))

    def nearest(self, place: _Place) -> _Place:
        """The point of the box nearest to a place."""
        x, y = place
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def is_free(self, taken: Iterable["_Box"]) -> bool:
        return not any(map(self.meets, taken))


def placed(
    points: Sequence[_Place],
    names: Sequence[str],
    size_px: _Place,
    lines: Sequence[Sequence[_Place]] = (),
) -> list[Placed | None]:
    """Place of each name, in pixels; None where there is no room for it.

    Args:
        points: in pixels from the upper left; a name for each, the most important first, empty for
            a point without.
        size_px: width and height of the plot.
        lines: joined places; a name moves away from its point rather than cross one.
    """
    taken, named = list(map(_around, points)), list[_Box]()
    joined = [_around(place) for line in lines for place in _along(line)]
    found: list[Placed | None] = []
    for point, name in zip(points, names, strict=True):
        beside = [_box(point, side, name) for side in _SIDES] if name else []
        further = _further(point, name, size_px) if name else []
        free = (
            box
            for box in chain(beside, further)
            if box.is_within(size_px)
            and box.is_free([*taken, *joined, *named])
            and all(each.is_free(named) for each in map(_around, box.path_from(point)))
        )
        box = next(free, None)
        if box is None:
            found.append(None)
            continue
        named.append(box)
        joined += map(_around, box.path_from(point))
        found.append(Placed(box.left, (box.top + box.bottom) / 2, box.lead(point)))
    return found


def _further(point: _Place, name: str, size_px: _Place) -> list[_Box]:
    """Places for a name anywhere right of its point or above it, the nearest first."""
    (x, _), (width, height) = point, size_px
    size = CHARACTER_PX * len(name)
    lefts = np.arange(max(0.0, x - size), width - size, _STEP_PX).tolist()
    tops = np.arange(0.0, height - LINE_PX, _STEP_PX).tolist()
    boxes = [_Box(left, top, left + size, top + LINE_PX) for left in lefts for top in tops]
    return sorted(boxes, key=lambda box: dist(box.nearest(point), point))


def _around(place: _Place) -> _Box:
    x, y = place
    return _Box(x - _POINT_PX, y - _POINT_PX, x + _POINT_PX, y + _POINT_PX)


def _along(line: Sequence[_Place]) -> Iterator[_Place]:
    """Places on a line, no further apart than a name is high."""
    for (x, y), (to_x, to_y) in pairwise(line):
        num = 1 + int(hypot(to_x - x, to_y - y) / LINE_PX)
        for place in range(num):
            yield x + (to_x - x) * place / num, y + (to_y - y) * place / num


def _box(point: _Place, side: tuple[int, int], name: str) -> _Box:
    across, down = side
    width = CHARACTER_PX * len(name)
    left = point[0] + {1: _GAP_PX, 0: -width / 2, -1: -width - _GAP_PX}[across]
    middle = point[1] + down * (LINE_PX / 2 + (_GAP_PX if across == 0 else _POINT_PX))
    return _Box(left, middle - LINE_PX / 2, left + width, middle + LINE_PX / 2)
