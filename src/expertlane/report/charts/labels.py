"""Placement of points' names, so that none covers another or a point."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from math import dist, hypot

import numpy as np

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
