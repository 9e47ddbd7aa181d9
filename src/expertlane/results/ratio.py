"""Ratios of two servers that were measured in turns under the same load."""

from dataclasses import dataclass

from expertlane.results.estimate import Estimate
from expertlane.results.statistics import is_told_apart
from expertlane.spec.ranges import Strict

HIGHER_IS_BETTER = frozenset({"output tokens/s", "goodput"})


@dataclass(frozen=True)
class RatioRecord(Strict):
    """One metric of one server over another's.

    Attributes:
        name, other: names of the deployments.
        load: the load, as in reports.
        metric: name of the metric and its statistic.
        num_rounds: pairs of rounds.
        ratio: the median over pairs, with its 90 % interval where there are enough.
    """

    name: str
    other: str
    load: str
    metric: str
    num_rounds: int
    ratio: Estimate

    @property
    def is_significant(self) -> bool:
        """True if the interval leaves out 1."""
        return is_told_apart(self.ratio, 1.0)

    @property
    def is_better(self) -> bool:
        """True if the first server's metric is the better one."""
        return (self.ratio.value > 1) == (self.metric in HIGHER_IS_BETTER)
