"""Modelled seconds, with bounds and where they come from."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Floats


class Basis(IntEnum):
    """What a modelled number rests on, the firmest first."""

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
        seconds, low, high: [R]; low ≤ seconds ≤ high.
        basis: of all of them.
        is_extrapolated: [R]; a size lies outside what the law was fitted to, so bounds are wider.
    """

    seconds: Floats
    low: Floats
    high: Floats
    basis: Basis
    is_extrapolated: npt.NDArray[np.bool_]

    def part(self, ranks: slice) -> "Times":
        """Of some of the ranks."""
        return Times(
            self.seconds[ranks],
            self.low[ranks],
            self.high[ranks],
            self.basis,
            self.is_extrapolated[ranks],
        )


def where(first: npt.NDArray[np.bool_], a: Times, b: Times) -> Times:
    """`a` on the ranks of `first`, `b` on the others."""
    if first.all():
        return a
    if not first.any():
        return b
    return Times(
        seconds=np.where(first, a.seconds, b.seconds),
        low=np.where(first, a.low, b.low),
        high=np.where(first, a.high, b.high),
        basis=max(a.basis, b.basis),
        is_extrapolated=np.where(first, a.is_extrapolated, b.is_extrapolated),
    )
