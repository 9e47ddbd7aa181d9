"""Trials of an option: simulated at several numbers of sequences, up to the most within limits.

The formula proposes a number; what a simulation has beyond the formula corrects it; between one
that keeps the limits and one that does not lies the next.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt

from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.throughput import Goals, ThroughputCurve
from expertlane.planner.candidates import PlanRequest
from expertlane.planner.screen import ScreenedCandidate
from expertlane.results.serving_record import KEPT
from expertlane.simulator.watch import Precision

_MOST_TRIALS = 8  # numbers of sequences to simulate of an option
_CLOSE = 0.96  # of a number that misses the limits: the most to try next while none meets them
_AIM = 0.99  # share of a limit to aim at
_FLATTEST, _STEEP = 0.02, 3.0  # slopes of TPOT over sequences, in logarithms; one over a slope
_APART = 1.05  # least ratio of two numbers of sequences that a slope is taken from
_NEAR, _STEP = 0.97, 1.1  # of a limit; times as many sequences to try where that is further
_FURTHEST = 3.0  # largest step, times as many, while no trial has missed a limit


@dataclass(frozen=True, eq=False)
class SimulatedCandidate(ScreenedCandidate):
    """A candidate that was simulated, at one number of sequences; `place` is 0.

    Attributes:
        served: throughput as simulated.
        option: the candidate as screened.
    """

    option: ScreenedCandidate

    @property
    def num_seqs(self) -> int:
        """Sequences that run at once, over the whole system."""
        return self.option.num_seqs

    def breach(self, goals: Goals) -> float:
        """The factor by which it misses the worst limit; 1 or less where it keeps all."""
        return float(self.served.breach(goals)[0])

    def keeps(self, goals: Goals) -> bool:
        """True if all limits are met, within the accuracy of a steady state."""
        return self.breach(goals) <= KEPT

    @classmethod
    def of(cls, option: ScreenedCandidate, served: ThroughputCurve) -> "SimulatedCandidate":
        """A screened option with its simulated throughput."""
        return cls(**vars(option) | {"served": served, "place": 0, "option": option})


Run = Callable[[ScreenedCandidate, Precision], ThroughputCurve | None]


class Ratios:
    """The largest ratio of simulated to screened tokens/s of each kind of deployment."""

    def __init__(self) -> None:
        self._of_kind: dict[object, float] = {}

    def add(self, kinds: Iterable[object], ratio: float) -> None:
        """Add a deployment that was simulated, with all of its kinds."""
        for kind in kinds:
            self._of_kind[kind] = max(ratio, self._of_kind.get(kind, 0.0))

    def expected(self, kinds: Iterable[object]) -> float:
        """The ratio of the first kind that has one; 1 without any."""
        return next((self._of_kind[kind] for kind in kinds if kind in self._of_kind), 1.0)

    @property
    def largest(self) -> float:
        """The largest of all; 1 without any."""
        return max(self._of_kind.values(), default=1.0)


class Trials:
    """Simulations of an option at successive numbers of sequences.

    The formula proposes the first number; each simulation corrects the formula, and once one number
    meets the limits and one misses them, the next is interpolated.

    Args:
        num_seqs: the first number; None for the formula's.
        kept: a number that met the limits in a rougher simulation.

    Attributes:
        found: simulated candidates in the order of their trials.
    """

    def __init__(
        self,
        option: ScreenedCandidate,
        request: PlanRequest,
        run: Run,
        precision: Precision,
        num_seqs: int | None = None,
        kept: SimulatedCandidate | None = None,
    ) -> None:
        self.option = option
        self.found: list[SimulatedCandidate] = []
        self._request, self._goals = request, request.goals
        self._run, self._precision = run, precision
        self._is_over = False
        self._kept = kept
        first, tps = option.within(request.goals)
        self._first = num_seqs or max(first, 1), tps

    def again(self, precision: Precision) -> "Trials":
        """New trials of this option with another precision, from the best number of sequences."""
        num, _ = self.ahead(0.0)
        kept = self.best if self.tps else None
        if num is None and self.best is not None:
            num = self.best.num_seqs
        return Trials(self.option, self._request, self._run, precision, num, kept)

    @property
    def best(self) -> SimulatedCandidate | None:
        """The trial with most tokens/s that meets the limits, else the nearest to them."""
        kept = [each for each in self.found if each.keeps(self._goals)]
        if kept:
            return max(kept, key=lambda each: each.tps)
        return min(self.found, key=lambda each: each.breach(self._goals), default=None)

    @property
    def tps(self) -> float:
        """The most tokens/s within the limits so far."""
        return max((each.tps for each in self.found if each.keeps(self._goals)), default=0.0)

    def ahead(self, least_gain: float, *, boldly: bool = False) -> tuple[int | None, float]:
        """The number of sequences to try next, and its expected tokens/s.

        Args:
            least_gain: gain in tokens/s, a share, that is worth a trial.
            boldly: try more sequences also near a limit.

        Returns:
            None and the best tokens/s so far, where no trial is worth it.
        """
        if not self.found and not self._is_over:
            return self._first
        num, tps = self._next(boldly=boldly)
        known, at = self.tps, {each.num_seqs for each in self.found}
        is_worth = tps > (1 + least_gain) * known and num > 0 and num not in at
        if self._is_over or len(self.found) == _MOST_TRIALS or not is_worth:
            return None, known
        return num, tps

    def advance(self, least_gain: float, *, boldly: bool = False) -> None:
        """Simulate the next number of sequences."""
        num, _ = self.ahead(least_gain, boldly=boldly)
        assert num is not None, "a trial is left"
        option = self.option.at(num, self._request.workload)
        if (served := self._run(option, self._precision)) is None:
            self._is_over = True
        else:
            self.found.append(SimulatedCandidate.of(option, served))

    def settle(self, least_gain: float, *, boldly: bool = False) -> SimulatedCandidate | None:
        """The best once no further trial is worth it; None where none can be simulated."""
        while self.ahead(least_gain, boldly=boldly)[0] is not None:
            self.advance(least_gain, boldly=boldly)
        return self.best

    def _next(self, *, boldly: bool) -> tuple[int, float]:
        """A number of sequences, 0 for none, and its expected tokens/s."""
        goals = self._goals
        kept = [each for each in self.found if each.keeps(goals)]
        most = max(kept, key=_num_of, default=None)
        above = 0 if most is None else most.num_seqs
        broken = [each for each in self.found if not each.keeps(goals) and each.num_seqs > above]
        few = min(broken, key=_num_of, default=None)
        if few is None:
            return (0, 0.0) if most is None else self._further(most, kept, boldly=boldly)
        if most is None:
            num, tps = self._corrected(few)
            if (known := self._kept) is not None and num < known.num_seqs < few.num_seqs:
                return known.num_seqs, known.tps
            return min(num, int(_CLOSE * few.num_seqs)), tps
        return self._between(most, few)

    def _corrected(self, found: SimulatedCandidate) -> tuple[int, float]:
        """The next number by the formula, corrected by its error at a simulated one.

        The error may be a constant factor, or grow with sequences: takes a number between both.
        """
        served, place = found.option.served, found.option.place or 0
        formula = float(served.breach(self._goals)[place])
        if formula <= 0:  # a limit that the formula does not model
            missed = found.breach(self._goals)
            return int(found.num_seqs / missed) if missed > 0 else 0, found.tps
        ratio = found.breach(self._goals) / formula
        times, one_tps = self.option.within(self._goals, ratio / _AIM)
        of_sequence = (found.breach(self._goals) - formula) / found.num_seqs
        plus, other_tps = self.option.within(self._goals, 1 / _AIM, of_sequence / _AIM)
        factor = found.tps / float(served.tps[LIKELY, place])
        return int(sqrt(times * plus)), sqrt(one_tps * other_tps) * factor

    def _further(
        self, most: SimulatedCandidate, kept: Sequence[SimulatedCandidate], *, boldly: bool
    ) -> tuple[int, float]:
        """More sequences while no trial has missed a limit, extrapolated along TPOT."""
        missed, limit = most.breach(self._goals), self.option.most_seqs
        if most.num_seqs >= limit or missed <= 0:
            return 0, 0.0
        num, tps = self._corrected(most)
        before = [each for each in kept if each.num_seqs * _APART <= most.num_seqs]
        if before:
            fewer = max(before, key=_num_of)
            of_num = log(most.num_seqs / fewer.num_seqs)
            slope = max(log(missed / fewer.breach(self._goals)) / of_num, _FLATTEST)
            factor = min((_aim(slope) / missed) ** (1 / slope), _FURTHEST)
            if int(most.num_seqs * factor) > num:
                num, growth = int(most.num_seqs * factor), log(most.tps / fewer.tps) / of_num
                tps = most.tps * factor ** max(growth, 0.0)
        elif missed < (_AIM if boldly else _NEAR):  # TPOT may grow less than the formula says
            num = max(num, ceil(most.num_seqs * _STEP))
            tps = max(tps, most.tps * min(num / most.num_seqs, limit / most.num_seqs) * missed)
        return min(num, limit), tps

    def _between(self, most: SimulatedCandidate, few: SimulatedCandidate) -> tuple[int, float]:
        """The next number between one that meets the limits and one that misses; log-linear."""
        low, high = most.breach(self._goals), few.breach(self._goals)
        if few.num_seqs - most.num_seqs <= 1:
            return 0, 0.0
        grows = log(high / low) if low > 0 else 1.0
        aim = _aim(grows / log(few.num_seqs / most.num_seqs))
        tps = most.tps * (few.tps / most.tps) ** (-log(max(low, 1e-9)) / grows if low > 0 else 0.5)
        share = log(aim / low) / grows if 0 < low < aim else 0.5
        if len({each.keeps(self._goals) for each in self.found[-2:]}) == 1:
            share = 0.5  # the last two were on the same side: bisect
        num = int(most.num_seqs * (few.num_seqs / most.num_seqs) ** share)
        return max(num, most.num_seqs + 1), tps


def _aim(slope: float) -> float:
    """Share of a limit to aim at: closer to it where TPOT hardly grows with sequences.

    Args:
        slope: slope of that share over sequences, in logarithms.
    """
    return 1 - (1 - _AIM) * min(1.0, _STEEP * slope)


def _num_of(found: SimulatedCandidate) -> int:
    return found.num_seqs
