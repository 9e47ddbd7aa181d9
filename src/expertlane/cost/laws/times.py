"""Modelled seconds, with bounds and where they come from."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import Floats


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
        """[R]."""
        low: Floats = self.bounds[0]
        return low

    @property
    def seconds(self) -> Floats:
        """[R]; the likely ones."""
        seconds: Floats = self.bounds[1]
        return seconds

    @property
    def high(self) -> Floats:
        """[R]."""
        high: Floats = self.bounds[2]
        return high

    def part(self, ranks: slice) -> "Times":
        """The times of some of the ranks."""
        is_extrapolated = self.is_extrapolated[ranks]
        return Times(self.bounds[:, ranks], self.basis, is_extrapolated, self.wider)

    def of_ranks(self, num_ranks: int) -> "Times":
        """[R] also where all ranks have the same sizes."""
        return Times(
            np.broadcast_to(self.bounds.reshape(3, -1), (3, num_ranks)),
            self.basis,
            np.broadcast_to(self.is_extrapolated, (num_ranks,)),
            self.wider,
        )


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
