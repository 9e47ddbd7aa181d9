"""One number of a result, and the summary of many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from expertlane.spec.ranges import Strict, Valid

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
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        ordered = Valid(_is_ordered, "low ≤ value ≤ high, or without both")
        return ordered.__get_pydantic_core_schema__(source, handler)

    @classmethod
    def between(cls, bounds: Iterable[float]) -> "Estimate":
        """The estimate from all terms at their low, likely and high values, ordered."""
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

    def bounded_by(self, factors: tuple[float, float], *, alone: bool = False) -> "Estimate":
        """The value with bounds at least as wide as these multiples of it.

        Args:
            alone: replaces wider bounds too.
        """
        low, value, high = self.bounds
        least, most = value * factors[0], value * factors[1]
        if alone:
            return Estimate(value, least, most)
        return Estimate(value, min(low, least), max(high, most))

    def __mul__(self, factor: float) -> "Estimate":
        """The estimate times a factor above 0."""
        low, high = (None if each is None else each * factor for each in (self.low, self.high))
        return Estimate(self.value * factor, low, high)

    def __truediv__(self, divisor: float) -> "Estimate":
        """The estimate over a divisor above 0."""
        low, high = (None if each is None else each / divisor for each in (self.low, self.high))
        return Estimate(self.value / divisor, low, high)

    def __rtruediv__(self, amount: float) -> "Estimate":
        """An amount over the estimate, with bounds the other way round: a rate from a time."""
        low, high = (None if each is None else amount / each for each in (self.high, self.low))
        return Estimate(amount / self.value, low, high)


def _is_ordered(estimate: Estimate) -> bool:
    low, value, high = estimate.bounds
    return (estimate.low is None) == (estimate.high is None) and low <= value <= high


Above0 = Annotated[Estimate, Valid(lambda estimate: min(estimate.bounds) > 0, "above 0")]


@dataclass(frozen=True)
class Summary(Strict):
    """Statistics of many values; None for unknown ones."""

    mean: Estimate | None = None
    median: Estimate | None = None
    p95: Estimate | None = None
    p99: Estimate | None = None

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[np.float64]) -> "Summary | None":
        """Summarise measured values [n], or projected ones [n, 3], at their low, likely and high.

        None for no values.
        """
        if not len(values):
            return None
        percentiles = np.percentile(values, _PERCENTILES, axis=0)
        return cls(*map(Estimate.of, (np.mean(values, axis=0), *percentiles)))

    def bounded_by(self, factors: tuple[float, float], *, alone: bool = False) -> "Summary":
        """Each statistic with bounds as in `Estimate.bounded_by`."""
        values = (self.mean, self.median, self.p95, self.p99)
        return Summary(*(each and each.bounded_by(factors, alone=alone) for each in values))


def _is_above_0(summary: Summary) -> bool:
    known = (summary.mean, summary.median, summary.p95, summary.p99)
    return all(min(each.bounds) > 0 for each in known if each is not None)


SummaryAbove0 = Annotated[Summary, Valid(_is_above_0, "above 0")]
