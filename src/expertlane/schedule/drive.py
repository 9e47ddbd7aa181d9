"""The loop between a scheduler and a runner; the same for real ranks and for a cost model."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from expertlane.errors import ModelError
from expertlane.results.step_record import StepRecord
from expertlane.schedule.plan import HandleT, Runner, Scheduler, StepOutcome, StepPlan
from expertlane.schedule.request import not_finite


class FinishedStep(NamedTuple):
    """A plan and what came of it."""

    plan: StepPlan
    outcome: StepOutcome


def drive(scheduler: Scheduler, runner: Runner[HandleT]) -> Iterator[FinishedStep]:
    """Submit what the scheduler gives and yield steps as they finish, until it gives no more.

    Raises:
        ModelError: a sequence found no next token, since its logits are not finite.
    """
    in_flight: dict[HandleT, StepPlan] = {}
    while True:
        while (plan := scheduler.next_plan()) is not None:
            in_flight[runner.submit(plan)] = plan
        if not in_flight:
            return
        handle = runner.first_done(list(in_flight))
        plan = in_flight.pop(handle)
        outcome = runner.collect(handle)
        for seq in outcome.not_finite:
            raise ModelError(f"sequence {seq + 1}: {not_finite(plan.step)}")
        scheduler.finish(plan, outcome)
        yield FinishedStep(plan, outcome)


def step_records(steps: Iterable[FinishedStep], run: int = 0) -> Iterator[StepRecord]:
    """What metrics see of steps; a spell ends where the phase changes."""
    spell, phase = -1, None
    for plan, outcome in steps:
        if plan.phase is not phase:
            spell, phase = spell + 1, plan.phase
        batches = [batch for micro_batch in plan.micro_batches for batch in micro_batch]
        yield StepRecord(
            phase=plan.phase,
            replica=plan.replica,
            num_micro_batches=len(plan.micro_batches),
            seq_ids=tuple(
                seq for batch in batches for seq in batch.seq_ids[batch.yields_token].tolist()
            ),
            num_tokens=sum(batch.num_tokens for batch in batches),
            submitted_s=outcome.submitted_s,
            finished_s=outcome.finished_s,
            records=outcome.records,
            run=run,
            spell=spell,
        )
