"""The loop between a scheduler and a runner; the same for real ranks and for a cost model."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Generic, NamedTuple

from expertlane.errors import ModelError
from expertlane.results.step_record import StepRecord
from expertlane.schedule.plan import HandleT, Runner, StepOutcome, StepPlan
from expertlane.schedule.request import not_finite
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.layout import DpRank, Layout


class FinishedStep(NamedTuple):
    """A plan and its outcome."""

    plan: StepPlan
    outcome: StepOutcome

    def record(self, run: int = 0, spell: int = 0) -> StepRecord:
        """The record that metrics read."""
        plan, outcome = self
        return StepRecord(
            phase=plan.phase,
            replica=plan.replica,
            num_micro_batches=len(plan.micro_batches),
            seq_ids=tuple(seq for batch in plan.batches for seq in batch.yielding_seq_ids),
            num_tokens=sum(batch.num_tokens for batch in plan.batches),
            submitted_s=outcome.submitted_s,
            finished_s=outcome.finished_s,
            records=outcome.records,
            run=run,
            spell=spell,
        )


class DriveLoop(Generic[HandleT]):
    """Keeps a runner busy with what a scheduler plans, and commits steps as they finish.

    The steps of a replica are committed in the order in which they were planned.
    """

    def __init__(self, scheduler: ContinuousScheduler, runner: Runner[HandleT]) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._uncommitted: dict[int, StepPlan] = {}  # by step, in the order of planning
        self._handles: dict[int, HandleT] = {}  # of those that were submitted

    @property
    def uncommitted(self) -> list[StepPlan]:
        """The steps that were planned and are not committed, in their order."""
        return list(self._uncommitted.values())

    @property
    def next_handles(self) -> list[HandleT]:
        """Handles of each replica's oldest uncommitted step: those that may finish next."""
        oldest: dict[int, int] = {}
        for step, plan in self._uncommitted.items():
            oldest.setdefault(plan.replica, step)
        return [self._handles[step] for step in oldest.values()]

    def submit(self) -> None:
        """Begin all steps that the scheduler gives."""
        while (plan := self._scheduler.next_plan()) is not None:
            self._uncommitted[plan.step] = plan
            self._handles[plan.step] = self._runner.submit(plan)

    def submit_again(self) -> None:
        """Begin all uncommitted steps anew, once the runner has discarded them."""
        for step, plan in self._uncommitted.items():
            self._handles[step] = self._runner.submit(plan)

    def lose(self, caches: Collection[tuple[int, int]]) -> int:
        """Let requests begin again whose keys and values are gone; `submit_again` has to follow.

        Args:
            caches: (replica, data-parallel rank) of each.

        Returns:
            How many requests these are.
        """
        plans, num_requests = self._scheduler.lose(caches, self.uncommitted)
        self._uncommitted = {plan.step: plan for plan in plans}
        self._handles.clear()
        return num_requests

    def reshape(self, layout: Layout, kept: Mapping[DpRank, DpRank]) -> int:
        """Go on in another layout; `submit_again` has to follow, in it.

        Args:
            kept: by (replica, data-parallel rank) whose keys and values are there, what it was.

        Returns:
            How many requests begin again, beside those of `lose`.
        """
        plans, num_requests = self._scheduler.reshape(layout, kept, self.uncommitted)
        self._uncommitted = {plan.step: plan for plan in plans}
        self._handles.clear()
        return num_requests

    @property
    def is_idle(self) -> bool:
        """True if no step is in flight."""
        return not self._uncommitted

    def commit_next(self) -> FinishedStep | None:
        """Wait until a step is finished and commit it; None if none is under way."""
        if not self._uncommitted:
            return None
        handle = self._runner.first_done(self.next_handles)
        step = next(step for step, of_step in self._handles.items() if of_step is handle)
        plan, outcome = self._uncommitted[step], self._runner.collect(handle)
        self._scheduler.commit(plan, outcome)
        del self._uncommitted[step], self._handles[step]
        return FinishedStep(plan, outcome)


def drive(scheduler: ContinuousScheduler, runner: Runner[HandleT]) -> Iterator[FinishedStep]:
    """Yield steps as they finish, until the scheduler gives no more.

    Raises:
        ModelError: a sequence found no next token, since its logits are not finite.
    """
    loop = DriveLoop(scheduler, runner)
    while True:
        loop.submit()
        finished = loop.commit_next()
        if finished is None:
            return
        for seq in finished.outcome.not_finite:
            raise ModelError(f"sequence {seq + 1}: {not_finite(finished.plan.step)}")
        yield finished


def step_records(steps: Iterable[FinishedStep], run: int = 0) -> Iterator[StepRecord]:
    """Records of steps for metrics; a spell ends where the phase changes."""
    spell, phase = -1, None
    for step in steps:
        if step.plan.phase is not phase:
            spell, phase = spell + 1, step.plan.phase
        yield step.record(run, spell)
