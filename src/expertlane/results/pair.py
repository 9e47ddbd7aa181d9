"""The deployments that a comparison's first sentence is about, and how two of them differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from expertlane.results.estimate import Estimate
from expertlane.results.record import DeploymentRecord, Source
from expertlane.results.statistics import is_told_apart
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class PairRecord(Strict):
    """Difference of two deployments that were measured in turns.

    Estimates have 90 % intervals (`results.statistics`), or none of too few repetitions.

    Attributes:
        source: source of the numbers; the pair is the same for all sources.
        name: the deployment that the first sentence is about.
        other: the deployment that it is compared with.
        num_runs: repetitions of each.
        ratio: TPS of `name` over that of `other`.
        step_s, other_step_s: seconds of a step of each.
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
        """True if the interval of the ratio leaves out 1."""
        return is_told_apart(self.ratio, 1.0)


def choose_compared(records: Sequence[DeploymentRecord], tps: Sequence[float]) -> tuple[int, ...]:
    """Indices of the best proposal, the best baseline, and the first deployment if it is neither.

    Where all are of one kind: of the fastest, the next fastest, and the first.

    Args:
        records: in the experiment's order.
        tps: tokens/s of each record.

    Returns:
        Empty for a single deployment.
    """
    if len(records) < 2:
        return ()
    by_tps = sorted(range(len(records)), key=lambda place: -tps[place])
    proposals = [place for place in by_tps if not records[place].is_baseline]
    baselines = [place for place in by_tps if records[place].is_baseline]
    best = (proposals or baselines)[0]
    rival = (baselines if proposals and baselines else by_tps[1:])[0]
    return tuple(dict.fromkeys((best, rival, *([0] if best else []))))
