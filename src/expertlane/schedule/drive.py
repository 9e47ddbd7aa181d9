"""The loop between a scheduler and a runner; the same for real ranks and for a cost model."""

from collections.abc import Iterator
from typing import NamedTuple

from expertlane.schedule.plan import HandleT, Runner, Scheduler, StepOutcome, StepPlan


class FinishedStep(NamedTuple):
    """A plan and what came of it."""

    plan: StepPlan
    outcome: StepOutcome


def drive(scheduler: Scheduler, runner: Runner[HandleT]) -> Iterator[FinishedStep]:
    """Submit what the scheduler gives and yield steps as they finish, until it gives no more."""
    in_flight: dict[HandleT, StepPlan] = {}
    while True:
        while (plan := scheduler.next_plan()) is not None:
            in_flight[runner.submit(plan)] = plan
        if not in_flight:
            return
        handle = runner.first_done(list(in_flight))
        plan = in_flight.pop(handle)
        outcome = runner.collect(handle)
        scheduler.finish(plan, outcome)
        yield FinishedStep(plan, outcome)
