"""A deployment that fits: as screened, and projected in full."""

from dataclasses import dataclass, replace

import numpy as np

from expertlane.plan.candidates import Candidate
from expertlane.plan.setting import Goals
from expertlane.plan.structure import Screened
from expertlane.plan.throughput import LIKELY, Served, Steps
from expertlane.results.record import StepsRecord


@dataclass(frozen=True, eq=False)
class Option:
    """A candidate that fits, as screened; `place` is its best number of sequences.

    Attributes:
        place: None where it breaks a limit with every number of sequences.
    """

    screened: Screened
    steps: Steps
    served: Served
    place: int | None

    @property
    def candidate(self) -> Candidate:
        """The deployment."""
        return self.screened.candidate

    @property
    def tps(self) -> float:
        """Output tokens a second at its best, 0 where it breaks a limit."""
        return 0.0 if self.place is None else float(self.served.tps[LIKELY, self.place])

    @property
    def num_seqs(self) -> int:
        """Running at once at its best, over the whole system; 0 where it breaks a limit."""
        return 0 if self.place is None else int(self.steps.num_seqs[self.place])

    def next_best(self, goals: Goals) -> "Option":
        """The same with the best number of sequences among those that serve less than this one."""
        keeps = (self.served.breach(goals) <= 1) & (self.served.tps[LIKELY] < self.tps)
        place = int(np.where(keeps, self.served.tps[LIKELY], -1).argmax()) if keeps.any() else None
        return replace(self, place=place)

    def nearest(self, goals: Goals) -> "Option":
        """The same with the number of sequences that comes nearest to the limits."""
        return replace(self, place=int(self.served.breach(goals).argmin()))


@dataclass(frozen=True, eq=False)
class Finalist:
    """An option projected in full.

    Attributes:
        steps, served: at its one best number of sequences.
    """

    option: Option
    decode: StepsRecord
    prefill: StepsRecord
    steps: Steps
    served: Served

    @property
    def tps(self) -> float:
        """Output tokens a second."""
        return float(self.served.tps[LIKELY, 0])

    @property
    def num_seqs(self) -> int:
        """Running at once, over the whole system."""
        return int(self.served.num_seqs[0])

    def keeps(self, goals: Goals) -> bool:
        """Whether it keeps the limits."""
        return self.served.best(goals) is not None

    def breach(self, goals: Goals) -> float:
        """By what factor it misses the worse limit; 1 or less where it keeps both."""
        return float(self.served.breach(goals)[0])
