import pytest

from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.scheduler import drive
from expertlane.spec.names import Phase


class LoggingScheduler:
    """Gives plans of the replicas, up to `max_in_flight` at a time."""

    def __init__(self, replicas: list[int], max_in_flight: int, log: list[str]) -> None:
        self.plans = [
            StepPlan(step, replica, Phase.DECODE, ()) for step, replica in enumerate(replicas)
        ]
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self.log = log

    def next_plan(self) -> StepPlan | None:
        if not self.plans or self.in_flight == self.max_in_flight:
            return None
        self.in_flight += 1
        return self.plans.pop(0)

    def commit(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.in_flight -= 1
        self.log.append(f"commit {plan.step} with {outcome.token_ids[0]}")


class LastFirstRunner:
    """Finishes the step that began last; handles differ from step numbers."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def submit(self, plan: StepPlan) -> str:
        self.log.append(f"submit {plan.step}")
        return f"handle {plan.step}"

    def first_done(self, handles: list[str]) -> str:
        self.log.append(f"choose of {len(handles)}")
        return handles[-1]

    def collect(self, handle: str) -> StepOutcome:
        self.log.append(f"collect {handle}")
        return StepOutcome({0: 10 * int(handle[-1])}, {}, (), 0.0, 0.0)


def test_the_order_of_events():
    log: list[str] = []
    for finished in drive(LoggingScheduler([0, 1, 0], 2, log), LastFirstRunner(log)):
        event = f"yield {finished.plan.step} with {finished.outcome.token_ids[0]}"
        log.append(event)
    assert log == [
        "submit 0",
        "submit 1",
        "choose of 2",
        "collect handle 1",
        "commit 1 with 10",
        "yield 1 with 10",
        "submit 2",
        "choose of 1",  # step 2 is of the same replica as step 0, and later
        "collect handle 0",
        "commit 0 with 0",
        "yield 0 with 0",
        "choose of 1",
        "collect handle 2",
        "commit 2 with 20",
        "yield 2 with 20",
    ]


def test_a_runner_s_error_comes_through():
    class BrokenRunner(LastFirstRunner):
        def collect(self, handle: str) -> StepOutcome:
            raise RuntimeError("rank 3 died")

    log: list[str] = []
    with pytest.raises(RuntimeError, match="rank 3 died"):
        list(drive(LoggingScheduler([0, 0], 1, log), BrokenRunner(log)))
    assert log == ["submit 0", "choose of 1"]
