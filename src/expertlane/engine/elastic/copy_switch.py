"""The decision whether copies of experts are balanced, by a trial in each phase of a replica.

In a trial every second step is balanced. Balanced steps show how many pairs fewer the fullest ranks
have, and what balancing costs; the others, whose ranks differ more, show what one more pair costs.
After the trial no step is recorded for it. Another one follows much later, or when experts have
moved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expertlane.balance.rebalance import CopyDecision, PairCost
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import StepPlan
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase, Stage

TRIAL_STEPS = 24
_COLD_STEPS = 4  # first steps of a trial, which do not count
_KEPT_STEPS = 4096  # steps of a phase before its next trial
_KEPT_MODES = 256  # more than may be uncommitted


@dataclass(eq=False)
class _Trial:
    """The trial of one phase of a replica, and its decision.

    Attributes:
        num_begun, num_ended: steps since the trial began.
        num_saved: for each balanced step, pairs that the fullest ranks had fewer by it.
        seconds: for each balanced step, CPU time of the slowest rank of each stage, summed.
    """

    num_begun: int = 0
    num_ended: int = 0
    pair_cost: PairCost = field(default_factory=PairCost)
    num_saved: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decision: CopyDecision | None = None


@dataclass(frozen=True)
class _Mode:
    is_balanced: bool
    trial: _Trial | None  # of which the step is a part


@dataclass(frozen=True)
class TakenCopyDecision:
    """A decision with its replica.

    Attributes:
        step: the step after which it was taken.
    """

    replica: int
    step: int
    decision: CopyDecision


class CopySwitch:
    """Decides which steps balance copies; called before and after every step.

    Args:
        log: called with a line for each decision.

    Attributes:
        decisions: all decisions so far, in order.
    """

    def __init__(self, layout: Layout, log: Callable[[str], None]) -> None:
        self._layout, self._log = layout, log
        self._trials: dict[tuple[int, Phase], _Trial] = {}
        # A discarded step comes again, and keeps its mode.
        self._modes: dict[tuple[int, int], _Mode] = {}  # of replica and step, the latest
        self.decisions: list[TakenCopyDecision] = []

    def has_seen(self, plan: StepPlan) -> bool:
        """Whether a step was begun before."""
        return (plan.replica, plan.step) in self._modes

    def before_step(self, plan: StepPlan) -> tuple[StepPlan, bool]:
        """The plan, with a record if the step is of a trial; and whether copies are balanced."""
        key = plan.replica, plan.step
        mode = self._modes.get(key)
        if mode is None:
            mode = self._modes[key] = self._begin(plan)
            if len(self._modes) > _KEPT_MODES:
                del self._modes[next(iter(self._modes))]
        recorded = replace(plan, record=True) if mode.trial and not plan.record else plan
        return recorded, mode.is_balanced

    def _begin(self, plan: StepPlan) -> _Mode:
        key = plan.replica, plan.phase
        trial = self._trials.get(key)
        if trial is None or trial.num_begun >= _KEPT_STEPS:
            trial = self._trials[key] = _Trial()
        trial.num_begun += 1
        if trial.decision is not None:
            return _Mode(trial.decision.gain_s > trial.decision.cost_s, None)
        return _Mode(trial.num_begun % 2 == 0, trial)

    def after_step(self, plan: StepPlan, records: Sequence[RankRecord]) -> None:
        """Take a finished step of a trial into account."""
        key = plan.replica, plan.step
        mode, trial = self._modes.get(key), self._trials.get((plan.replica, plan.phase))
        if mode is None or trial is None or mode.trial is not trial or not records:
            return  # of no trial, or of one that was given up
        self._modes[key] = _Mode(mode.is_balanced, None)
        if trial.decision is not None:
            return
        trial.num_ended += 1
        if trial.num_ended > _COLD_STEPS:
            self._take(trial, records, is_balanced=mode.is_balanced)
        if trial.num_ended == TRIAL_STEPS:
            self._decide(trial, plan)

    def _take(self, trial: _Trial, records: Sequence[RankRecord], *, is_balanced: bool) -> None:
        at = self._layout.coordinates
        num_saved, seconds = 0, 0.0
        for stage in range(self._layout.pp):
            own = [each for each in records if at(each.rank).pp_rank == stage]
            num_saved += max(record.num_pairs_saved for record in own)
            seconds += max(record.copies_s for record in own)
            if not is_balanced:
                telling = [each for each in own if not at(each.rank).etp_rank]
                trial.pair_cost.add(
                    np.array([each.num_tokens_per_expert.sum() for each in telling]),
                    np.array([each.cpu_s[..., Stage.EXPERTS].sum() for each in telling]),
                )
        if is_balanced:
            trial.num_saved.append(num_saved)
            trial.seconds.append(seconds)

    def _decide(self, trial: _Trial, plan: StepPlan) -> None:
        trial.decision = CopyDecision(
            phase=plan.phase,
            num_saved=float(np.mean(trial.num_saved)),
            pair_s=trial.pair_cost.pair_s,
            cost_s=float(np.median(trial.seconds)),
        )
        self.decisions.append(TakenCopyDecision(plan.replica, plan.step, trial.decision))
        whose = f"replica {plan.replica}, " if self._layout.replicas > 1 else ""
        self._log(f"{whose}step {plan.step}: {trial.decision.line}")

    def reshape(self, layout: Layout) -> None:
        """Begin new trials in another layout."""
        self._layout = layout
        self._trials.clear()

    def forget(self, replica: int) -> None:
        """Begin new trials: experts of a replica have moved, or ranks were replaced.

        Steps that are under way, or run again, keep their modes and count for no trial.
        """
        for phase in Phase:
            self._trials.pop((replica, phase), None)

    def saved_s(self, num_pairs: int) -> float:
        """Seconds that `num_pairs` more on the fullest ranks would have taken, by the trials."""
        return num_pairs * max((each.decision.pair_s for each in self.decisions), default=0.0)

    def latest(self) -> dict[Phase, CopyDecision]:
        """The last decision of each phase, of any replica."""
        return {each.decision.phase: each.decision for each in self.decisions}
