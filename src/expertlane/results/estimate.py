"""One number of a result, the summary of many, and 90 % intervals of what was measured a few times.

Repetitions are few, five to ten, and their noise is one-sided and heavy-tailed (a disturbed run is
slower), so no interval assumes a normal distribution of single repetitions:

- `median_interval`: order statistics. Of n repetitions the k-th smallest and the k-th largest
  enclose the median with probability 1 - 2 P(B < k), B binomial (n, 1/2), whatever the distribution
  (Thompson 1936; David and Nagaraja, *Order Statistics*, 3rd ed., section 7.1). Five repetitions
  give the slowest and the fastest, 94 %; fewer cannot give 90 %.
- `ratio_interval`: the same of the ratio in each pair of repetitions, so that what slows down both
  of a pair cancels.
- `jackknife_interval`: where the number is computed from all repetitions together, from what it is
  without each in turn (Tukey 1958; Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993,
  chapter 11), with Student's t for n - 1 degrees of freedom, in logarithms. It is a prediction
  interval: where the number of another such measurement lies 9 times of 10. That has the same
  noise, so the variance is twice that of one (Hahn and Meeker, *Statistical Intervals*, 1991,
  section 4.5). The first kind holds another median of five 83 times of 100.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from expertlane.spec.ranges import Strict, Valid

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Estimate(Strict):
    """A number; low ≤ value ≤ high, or both None.

    Low and high are the bounds of a projection, or the 90 % interval of what was measured a few
    times.
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


CONFIDENCE = 0.9
LEAST_RUNS = 5  # for an interval

# Student's t, 95th percentile, by degrees of freedom from 1; above them that of a normal.
_T: tuple[float, ...] = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771),
    *(1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706),
)
NORMAL = 1.645


def half_interval(values: Sequence[float]) -> float:
    """Half of the interval of the mean of normally distributed values, by Student's t."""
    num = len(values)
    mean = sum(values) / num
    variance = sum((value - mean) ** 2 for value in values) / (num - 1)
    t = _T[num - 2] if num - 2 < len(_T) else NORMAL
    return t * math.sqrt(variance / num)


def median_interval(values: Sequence[float]) -> Estimate:
    """The median; low and high enclose that of all repetitions there could be, 9 times of 10.

    Both None of fewer than `LEAST_RUNS` values.
    """
    ordered, likely = sorted(values), median(values)
    place = _place(len(ordered))
    if place is None:
        return Estimate(likely)
    return Estimate(likely, ordered[place], ordered[-1 - place])


def _place(num: int) -> int | None:
    """Values outside the interval on each side; None where even all enclose too little."""
    outside, place = 0.0, None
    for k in range((num + 1) // 2):
        outside += math.comb(num, k) / 2**num
        if 1 - 2 * outside < CONFIDENCE:
            break
        place = k
    return place


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The median of values over others, measured in pairs, as `median_interval` has it."""
    return median_interval([value / other for value, other in zip(values, others, strict=True)])


def jackknife_interval(value: float, without_one: Sequence[float]) -> Estimate:
    """A number above 0 that was computed from n repetitions, and where another like it would lie.

    Args:
        without_one: [n]; the same computed without each repetition.

    Low and high are None of fewer than `LEAST_RUNS` repetitions.
    """
    num = len(without_one)
    if num < LEAST_RUNS:
        return Estimate(value)
    spread = math.exp(_margin([math.log(each) for each in without_one]))
    return Estimate(value, value / spread, value * spread)


def jackknife_difference(value: float, without_one: Sequence[float]) -> Estimate:
    """`jackknife_interval` of a number that may be negative: not in logarithms."""
    if len(without_one) < LEAST_RUNS:
        return Estimate(value)
    margin = _margin(without_one)
    return Estimate(value, value - margin, value + margin)


def _margin(without_one: Sequence[float]) -> float:
    num = len(without_one)
    mean = math.fsum(without_one) / num
    variance = (num - 1) / num * math.fsum((each - mean) ** 2 for each in without_one)
    t = _T[num - 2] if num - 2 < len(_T) else NORMAL
    return t * math.sqrt(2 * variance)


def is_told_apart(estimate: Estimate, none: float) -> bool:
    """True if its interval, if any, leaves out `none`, the value of no difference."""
    low, _, high = estimate.bounds
    return estimate.low is not None and not low <= none <= high
