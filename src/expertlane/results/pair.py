"""The two deployments of a comparison's verdict: which they are, and how they differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from expertlane.results.estimate import Estimate
from expertlane.results.record import DeploymentRecord, Source
from expertlane.results.statistics import is_told_apart
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class PairRecord(Strict):
    """How two deployments differ that were measured in turns.

    Estimates have 90 % intervals (`results.statistics`), or none of too few repetitions.

    Attributes:
        source: of the numbers; the pair is the same for all sources.
        name: the one that is faster on the clock that the verdict goes by.
        other: the one that it is set against.
        num_runs: repetitions of each.
        ratio: TPS of `name` over that of `other`. In virtual time from the least CPU time of each
            operation over all repetitions, which are as many of the one as of the other.
        step_s, other_step_s: seconds of a step of each, by the same times.
        causes_s: by cause, the seconds of a step of `name` less those of `other`.
    """

    source: Source
    name: str
    other: str
    phase: Phase
    num_runs: int
    ratio: Estimate
    step_s: float
    other_step_s: float
    causes_s: dict[str, Estimate] = field(default_factory=dict)

    @property
    def is_significant(self) -> bool:
        """Whether the interval of the ratio leaves out 1."""
        return is_told_apart(self.ratio, 1.0)


def choose_pair(
    records: Sequence[DeploymentRecord], tps: Sequence[float]
) -> tuple[int, int] | None:
    """Places of the two, the faster first: the best proposal and the best baseline.

    Where all are of one kind: the fastest, and the first, or the next fastest if it is that.

    Args:
        records: in the experiment's order.
        tps: of each.

    Returns:
        None of a single deployment.
    """
    places = range(len(records))
    proposals = [place for place in places if not records[place].is_baseline]
    baselines = [place for place in places if records[place].is_baseline]
    if proposals and baselines:
        first, second = (max(each, key=tps.__getitem__) for each in (proposals, baselines))
    elif len(records) > 1:
        first = max(places, key=tps.__getitem__)
        rest = [place for place in places if place != first]
        second = 0 if first else max(rest, key=tps.__getitem__)
    else:
        return None
    return (first, second) if tps[first] >= tps[second] else (second, first)
