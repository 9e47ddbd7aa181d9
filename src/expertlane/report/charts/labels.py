"""Where the names of points go, so that none covers another or a point."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import hypot

_Place = tuple[float, float]
_CHARACTER_PX, _LINE_PX = 6.2, 14.0
_GAP_PX, _POINT_PX = 7.0, 4.0
_REACH = (1.0, 2.0, 3.0)  # times the gap that a name may be away from its point
# Which side of its point a name stands on, tried in this order: right of it, left, in the middle;
# above, at its height, below.
_SIDES = tuple(side for side in product((1, -1, 0), (-1, 0, 1)) if any(side))


@dataclass(frozen=True)
class _Box:
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


def placed(
    points: Sequence[_Place],
    names: Sequence[str],
    size_px: _Place,
    line: Sequence[_Place] = (),
) -> list[_Place | None]:
    """The left end and the middle of each name, in pixels; None where there is no room for it.

    Args:
        points: in pixels from the upper left; a name for each, the most important first, empty for
            a point without.
        size_px: width and height of what there is.
        line: places that are joined, which a name crosses only where there is no other room.
    """
    taken, joined = list(map(_around, points)), list(map(_around, _along(line)))
    found: list[_Place | None] = []
    for point, name in zip(points, names, strict=True):
        boxes = [
            box
            for box in (_box(point, side, name, reach) for reach in _REACH for side in _SIDES)
            if box.is_within(size_px) and not any(map(box.meets, taken))
        ]
        beside_line = (box for box in boxes if not any(map(box.meets, joined)))
        box = next(beside_line, next(iter(boxes), None)) if name else None
        if box is not None:
            taken.append(box)
        found.append(None if box is None else (box.left, (box.top + box.bottom) / 2))
    return found


def _around(place: _Place) -> _Box:
    x, y = place
    return _Box(x - _POINT_PX, y - _POINT_PX, x + _POINT_PX, y + _POINT_PX)


def _along(line: Sequence[_Place]) -> Iterator[_Place]:
    """Places on it that are no further from each other than a name is high."""
    for (x, y), (to_x, to_y) in pairwise(line):
        num = 1 + int(hypot(to_x - x, to_y - y) / _LINE_PX)
        for place in range(num):
            yield x + (to_x - x) * place / num, y + (to_y - y) * place / num


def _box(point: _Place, side: tuple[int, int], name: str, reach: float) -> _Box:
    across, down = side
    width = _CHARACTER_PX * len(name)
    gap, above = reach * _GAP_PX, reach * (_GAP_PX if across == 0 else _POINT_PX)
    left = point[0] + {1: gap, 0: -width / 2, -1: -width - gap}[across]
    middle = point[1] + down * (_LINE_PX / 2 + above)
    return _Box(left, middle - _LINE_PX / 2, left + width, middle + _LINE_PX / 2)
