"""Whether copies of experts are balanced: a trial in each phase of a replica, then what pays.

In a trial steps take turns. Those that are balanced tell how many pairs that spares the fullest
ranks, and what sharing takes; the others, whose ranks differ more, what a pair more costs. After
it no step is recorded for this; much later, or when experts have moved, there is another trial.
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
_COLD_STEPS = 4  # of a trial, which do not count
_KEPT_STEPS = 4096  # of a phase, before it is tried again
_KEPT_MODES = 256  # more than may be uncommitted


@dataclass(eq=False)
class _Trial:
    """Steps of one phase and replica.

    Attributes:
        num_begun, num_ended: steps since the trial began.
        num_saved, seconds: of balanced steps; pairs that the fullest ranks were spared, and the
            processor time of whoever took longest, stage by stage.
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
    trial: _Trial | None  # that the step is a part of


@dataclass(frozen=True)
class TakenCopyDecision:
    """A decision, and the steps that it was taken for.

    Attributes:
        step: after which it was taken.
    """

    replica: int
    step: int
    decision: CopyDecision


class CopySwitch:
    """Told of every step before and after it; decides which are balanced.

    Args:
        log: takes the line of each decision.

    Attributes:
        decisions: all so far, in order.
    """

    def __init__(self, layout: Layout, log: Callable[[str], None]) -> None:
        self._layout, self._log = layout, log
        self._trials: dict[tuple[int, Phase], _Trial] = {}
        # A discarded step is seen again, and goes as it went.
        self._modes: dict[tuple[int, int], _Mode] = {}  # of replica and step, the latest
        self.decisions: list[TakenCopyDecision] = []

    def has_seen(self, plan: StepPlan) -> bool:
        """Whether a step was begun before."""
        return (plan.replica, plan.step) in self._modes

    def before_step(self, plan: StepPlan) -> tuple[StepPlan, bool]:
        """The plan, to be recorded in a trial; and whether copies are balanced in it."""
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
        at = [self._layout.coordinates(record.rank) for record in records]
        num_saved, seconds = 0, 0.0
        for stage in range(self._layout.pp):
            own = [each for each, of in zip(records, at, strict=True) if of.pp_rank == stage]
            num_saved += max(record.num_pairs_saved for record in own)
            seconds += max(record.copies_s for record in own)
            if not is_balanced:
                telling = [
                    each
                    for each, of in zip(records, at, strict=True)
                    if of.pp_rank == stage and not of.etp_rank
                ]
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
        """Try anew in another layout."""
        self._layout = layout
        self._trials.clear()

    def forget(self, replica: int) -> None:
        """Try anew: experts of a replica have moved, or ranks were replaced.

        Steps that are under way, or run again, stay as they are and count for no trial.
        """
        for phase in Phase:
            self._trials.pop((replica, phase), None)

    def saved_s(self, num_pairs: int) -> float:
        """Seconds that pairs, of the fullest ranks, would have taken, as the trials say."""
        return num_pairs * max((each.decision.pair_s for each in self.decisions), default=0.0)

    def latest(self) -> dict[Phase, CopyDecision]:
        """The last decision of each phase that has one, of any replica."""
        return {each.decision.phase: each.decision for each in self.decisions}
