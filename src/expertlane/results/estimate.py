"""One number of a result, and the summary of many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.spec.ranges import Strict

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Estimate(Strict):
    """A number; low ≤ value ≤ high, or both None.

    Low and high are the bounds of a projection, or the 90 % interval of what was measured a few
    times (`results.statistics`).
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def between(cls, bounds: Iterable[float]) -> "Estimate":
        """What all terms at their low, likely and high values give, whichever is largest."""
        first, likely, last = map(float, bounds)
        return cls(likely, min(first, likely, last), max(first, likely, last))

    @classmethod
    def of(cls, value: float | npt.NDArray[np.float64]) -> "Estimate":
        """A measured number, or a projected one's low, likely and high [3]."""
        return cls.between(value) if isinstance(value, np.ndarray) else cls(float(value))

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Low, value and high; all alike where it was measured."""
        low, high = (self.value if each is None else each for each in (self.low, self.high))
        return low, self.value, high

    def __mul__(self, factor: float) -> "Estimate":
        """Scaled by a factor above 0."""
        low, high = (None if each is None else each * factor for each in (self.low, self.high))
        return Estimate(self.value * factor, low, high)

    def __truediv__(self, divisor: float) -> "Estimate":
        """Divided by a divisor above 0."""
        low, high = (None if each is None else each / divisor for each in (self.low, self.high))
        return Estimate(self.value / divisor, low, high)

    def __rtruediv__(self, amount: float) -> "Estimate":
        """An amount over times, for example: a rate, whose bounds come the other way round."""
        low, high = (None if each is None else amount / each for each in (self.high, self.low))
        return Estimate(amount / self.value, low, high)


@dataclass(frozen=True)
class Summary(Strict):
    """A summary of many values; None what is not known of them."""

    mean: Estimate | None = None
    median: Estimate | None = None
    p95: Estimate | None = None
    p99: Estimate | None = None

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[np.float64]) -> "Summary | None":
        """Summarise measured values [n], or projected ones [n, 3], at their low, likely and high.

        None of no values.
        """
        if not len(values):
            return None
        percentiles = np.percentile(values, _PERCENTILES, axis=0)
        return cls(*map(Estimate.of, (np.mean(values, axis=0), *percentiles)))
