"""A law of time: an analytic roofline, corrected by a table over the logarithms of sizes.

seconds = roofline(sizes) · exp(correction), the correction multilinear between knots. Outside the
knots the correction of the nearest edge holds, and bounds widen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.cost.times import Basis, Times

Floats = npt.NDArray[np.float64]

_WIDER_PER_DOUBLING = 0.1  # of a bound, for every doubling of a size outside the knots


@dataclass(frozen=True, eq=False)
class Surface:
    """The correction of one roofline.

    Attributes:
        axes: by name, rising knots, all positive; in the order of the dimensions of `correction`.
        correction: [knots of each axis]; natural logarithms of measured over roofline.
        low, high: factors on a time between which most rows lay that were not fitted.
        basis: of the times it gives.
        origin: what it was fitted to: source, version, rows used, rows left out.
    """

    axes: Mapping[str, tuple[float, ...]]
    correction: Floats
    low: float
    high: float
    basis: Basis
    origin: str

    def times(self, roofline_s: Floats, at: Mapping[str, Floats | float]) -> Times:
        """Seconds with bounds.

        Args:
            roofline_s: [R].
            at: by axis, the sizes, positive; [R] or one for all. More than the axes may be given.
        """
        correction, doublings = self.look_up(at)
        seconds = roofline_s * np.exp(correction)
        wider = 1 + _WIDER_PER_DOUBLING * doublings
        return Times(
            seconds=seconds,
            low=seconds * self.low / wider,
            high=seconds * self.high * wider,
            basis=self.basis,
            is_extrapolated=np.broadcast_to(doublings > 0, seconds.shape),
        )

    def look_up(self, at: Mapping[str, Floats | float]) -> tuple[Floats, Floats]:
        """The correction, and by how many doublings sizes lie outside the knots; [R] each."""
        places, fractions = [], []
        doublings: Floats = np.zeros(())
        for axis, knots in self.axes.items():
            position = np.log(np.maximum(at[axis], 1e-30))
            logs = np.log(knots)
            outside = np.maximum(logs[0] - position, 0) + np.maximum(position - logs[-1], 0)
            doublings = doublings + outside / np.log(2)
            if len(knots) == 1:
                place, fraction = np.zeros(position.shape, dtype=np.int64), np.zeros(position.shape)
            else:
                place = np.clip(np.searchsorted(logs, position, "right") - 1, 0, len(logs) - 2)
                fraction = np.clip((position - logs[place]) / np.diff(logs)[place], 0, 1)
            places.append(place)
            fractions.append(fraction)
        return _interpolate(self.correction, places, fractions), doublings


def corner_weights(
    shape: tuple[int, ...], places: list[npt.NDArray[np.int64]], fractions: list[Floats]
) -> list[tuple[npt.NDArray[np.int64], Floats]]:
    """Flat indices and weights of the corners around each point; weights of a point sum to 1.

    Args:
        shape: of the table.
        places, fractions: by dimension; the knot before each point, and how far after it.
    """
    corners: list[tuple[npt.NDArray[np.int64], Floats]] = [(np.int64(0), np.float64(1))]  # type: ignore[list-item]
    for size, place, fraction in zip(shape, places, fractions, strict=True):
        after = np.minimum(place + 1, size - 1)
        corners = [
            (index * size + knot, weight * share)
            for index, weight in corners
            for knot, share in ((place, 1 - fraction), (after, fraction))
        ]
    return corners


def _interpolate(
    table: Floats, places: list[npt.NDArray[np.int64]], fractions: list[Floats]
) -> Floats:
    flat = table.ravel()
    total: Floats = np.zeros(())
    for index, weight in corner_weights(table.shape, places, fractions):
        total = total + flat[index] * weight
    return total
