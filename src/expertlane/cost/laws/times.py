"""Laws of time, and the seconds that they give, with bounds and where they come from.

A law is a surface: an analytic roofline, corrected by a table over the logarithms of sizes.
seconds = roofline(sizes) · exp(correction), the correction multilinear between knots. Outside the
knots the correction of the nearest edge holds, and bounds widen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Floats, Ints


class Basis(IntEnum):
    """Evidence behind a modelled number, the firmest first."""

    MEASURED = 0  # on the machine that is modelled
    FITTED = 1  # to measurements published by others
    BOUND = 2  # a datasheet's roofline, or an assumption

    @property
    def label(self) -> str:
        """The name as a user reads it."""
        return self.name.lower()


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds of one operation or transfer on every rank.

    Attributes:
        bounds: [3, R]; low ≤ likely ≤ high.
        basis: evidence behind them.
        is_extrapolated: [R]; a size lies outside what the law was fitted to, so bounds are wider.
        wider: the factor by which bounds are wider since the law is another device's or type's.
    """

    bounds: Floats
    basis: Basis
    is_extrapolated: npt.NDArray[np.bool_]
    wider: float = 1.0

    @property
    def low(self) -> Floats:
        """The low bound on each rank, [R]."""
        low: Floats = self.bounds[0]
        return low

    @property
    def seconds(self) -> Floats:
        """The likely time on each rank, [R]."""
        seconds: Floats = self.bounds[1]
        return seconds

    @property
    def high(self) -> Floats:
        """The high bound on each rank, [R]."""
        high: Floats = self.bounds[2]
        return high

    def part(self, ranks: slice) -> "Times":
        """The times of some of the ranks."""
        is_extrapolated = self.is_extrapolated[ranks]
        return Times(self.bounds[:, ranks], self.basis, is_extrapolated, self.wider)


def no_time(num_ranks: int) -> Times:
    """Zeros on all ranks, for what takes no time."""
    return Times(np.zeros((3, num_ranks)), Basis.MEASURED, np.zeros(num_ranks, dtype=np.bool_))


def where(first: npt.NDArray[np.bool_], a: Times, b: Times) -> Times:
    """`a` on the ranks of `first`, `b` on the others."""
    if first.all():
        return a
    if not first.any():
        return b
    return Times(
        bounds=np.where(first, a.bounds, b.bounds),
        basis=max(a.basis, b.basis),
        is_extrapolated=np.where(first, a.is_extrapolated, b.is_extrapolated),
        wider=max(a.wider, b.wider),
    )


WIDER_PER_DOUBLING = 0.1  # of a bound, for every doubling of a size outside the knots
Knots = Mapping[str, tuple[Floats, Floats]]  # by axis: logarithms, and steps between them

_OUTSIDE = 1e-9  # of a logarithm; less is rounding


@dataclass(frozen=True, eq=False)
class Surface:
    """The correction of one roofline.

    Attributes:
        axes: by name, rising knots, all positive; in the order of the dimensions of `correction`.
        correction: [knots of each axis]; natural logarithms of measured over roofline.
        low, high: factors on a time between which most rows lay that were not fitted.
        basis: evidence behind its times.
        origin: source of the rows it was fitted to: version, rows used, rows left out.
        wider: by what factor `low` and `high` are wider than of the device or type that it was
            fitted to.
        fitted_s: the shortest and the longest time that it was corrected by; bounds widen beyond.
            None where it was not.
    """

    axes: Mapping[str, tuple[float, ...]]
    correction: Floats
    low: float
    high: float
    basis: Basis
    origin: str
    wider: float = 1.0
    fitted_s: tuple[float, float] | None = None

    def times(self, roofline_s: Floats, at: Mapping[str, Floats | float]) -> Times:
        """Seconds with bounds.

        Args:
            roofline_s: [R].
            at: by axis, the sizes, positive; [R] or one for all. More than the axes may be given.
        """
        return self.times_and_doublings(roofline_s, at)[0]

    def times_and_doublings(
        self, roofline_s: Floats, at: Mapping[str, Floats | float]
    ) -> tuple[Times, Floats]:
        """`times`, and by how many doublings sizes lie outside the knots, [R]."""
        correction, doublings = interpolate(self.correction, self._knots, at)
        seconds = roofline_s * np.exp(correction)
        outside = doublings
        if self.fitted_s is not None:
            least_s, most_s = self.fitted_s
            inside_s = np.clip(seconds, least_s, most_s)
            outside = doublings + np.abs(np.log2(np.maximum(seconds, 1e-30) / inside_s))
        wider = 1 + WIDER_PER_DOUBLING * outside
        times = Times(
            np.array([seconds * (self.low / wider), seconds, seconds * (self.high * wider)]),
            self.basis,
            np.broadcast_to(outside > _OUTSIDE, seconds.shape),
            self.wider,
        )
        return times, doublings

    @cached_property
    def _knots(self) -> Knots:
        return logs_of(self.axes)


def logs_of(axes: Mapping[str, Sequence[float]]) -> Knots:
    """The logarithms of each axis's knots, and the steps between them."""
    logs = {axis: np.log(np.asarray(knots, dtype=np.float64)) for axis, knots in axes.items()}
    return {axis: (each, np.diff(each)) for axis, each in logs.items()}


def interpolate(
    table: Floats, axes: Knots, at: Mapping[str, Floats | float]
) -> tuple[Floats, Floats]:
    """A table's values at points, and by how many doublings each lies outside; [R] each."""
    before, fractions, doublings = places(axes, at)
    if not before:
        return table, doublings
    flat, values = table.ravel(), np.zeros(())
    for index, weight in corner_weights(table.shape, before, fractions):
        values = values + flat[index] * weight
    return values, doublings


def places(
    axes: Knots, at: Mapping[str, Floats | float]
) -> tuple[list[Ints], list[Floats], Floats]:
    """Knots before points, and fractions of the way to the next.

    Returns:
        By dimension, the knot before each point; by dimension, how far after it, 0 … 1; by how
        many doublings each point lies outside, over all dimensions.
    """
    before, fractions = [], []
    doublings: Floats = np.zeros(())
    for axis, (logs, steps) in axes.items():
        place, fraction, outside = _place(logs, steps, at[axis])
        before.append(place)
        fractions.append(fraction)
        doublings = doublings + outside
    return before, fractions, doublings


def corner_weights(
    shape: tuple[int, ...], places: list[Ints], fractions: list[Floats]
) -> list[tuple[Ints, Floats]]:
    """Flat indices and weights of the corners around each point; weights of a point sum to 1.

    Args:
        shape: shape of the table.
        places, fractions: by dimension; the knot before each point, and how far after it.
    """
    corners: list[tuple[Ints, Floats]] = []
    for size, place, fraction in zip(shape, places, fractions, strict=True):
        corners = _split(corners, size, place, fraction)
    return corners


def _split(
    corners: list[tuple[Ints, Floats]], size: int, place: Ints, fraction: Floats
) -> list[tuple[Ints, Floats]]:
    """Every corner's two neighbours along one more dimension of `size` knots."""
    if size == 1:
        return corners or [(place, 1 - fraction)]
    if not corners:
        return [(place, 1 - fraction), (place + 1, fraction)]
    split = []
    for index, weight in corners:
        near = index * size + place
        far_weight = weight * fraction
        split += [(near, weight - far_weight), (near + 1, far_weight)]
    return split


def _place(logs: Floats, steps: Floats, value: Floats | float) -> tuple[Ints, Floats, Floats]:
    """The knot before a value, how far after it, and the doublings by which it is outside."""
    position = np.log(np.maximum(value, 1e-30))
    inside = np.minimum(np.maximum(position, logs[0]), logs[-1])
    outside = np.abs(position - inside) * (1 / np.log(2))
    if len(steps) == 0:
        zero = np.zeros(np.shape(position))
        return zero.astype(np.int64), zero, outside
    place = np.minimum(logs.searchsorted(inside, "right") - 1, len(steps) - 1)
    return place, (inside - logs[place]) / steps[place], outside
