"""Runs of one load, or steps of several pools, made one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.results.metrics import ServedRequest
from expertlane.results.step_record import StepRecord


def moved(step: StepRecord, first_rank: int, begin_s: float) -> StepRecord:
    """The same step on other ranks, submitted at another time."""
    later_s = begin_s - step.submitted_s
    records = []
    for each in step.records:
        events = each.events
        assert events is not None, "asked for"
        events = replace(events, start_s=events.start_s + later_s)
        records.append(replace(each, rank=first_rank + each.rank, events=events))
    return replace(
        step,
        submitted_s=begin_s,
        finished_s=step.finished_s + later_s,
        records=tuple(records),
    )


def merged(of_runs: Sequence[ServedRequest[Floats]]) -> ServedRequest[Floats]:
    """A request with the times of each bound, from the run that this bound scheduled."""
    likely = of_runs[LIKELY]
    bounds, num = range(len(BOUNDS)), len(likely.token_times_s)
    times = zip(*(_as_many(each.token_times_s, num) for each in of_runs), strict=True)
    return replace(
        likely,
        due_s=np.array([of_runs[bound].due_s[bound] for bound in bounds]),
        token_times_s=[
            np.array([of_bound[bound] for bound, of_bound in enumerate(each)]) for each in times
        ],
    )


def _as_many(times_s: Sequence[Floats], num: int) -> Sequence[Floats]:
    """So many of them, the first and the last among them; of a run with more or fewer steps."""
    places = np.linspace(0, len(times_s) - 1, num).round().astype(int)
    return [times_s[place] for place in places.tolist()]
