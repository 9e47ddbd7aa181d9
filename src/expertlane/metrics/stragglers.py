"""Which ranks the others wait for, meeting by meeting."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.metrics.stage_time import by_pipeline_stage
from expertlane.results.step_record import StepRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage


@dataclass(frozen=True, eq=False)
class LastArrivals:
    """How often each rank came last where a pipeline stage meets to dispatch or combine.

    Attributes:
        num_last: [world_size].
        num_meetings: [world_size]; meetings of the rank's pipeline stage at which somebody waited.
    """

    num_last: npt.NDArray[np.int64]
    num_meetings: npt.NDArray[np.int64]


def last_arrivals(layout: Layout, steps: Sequence[StepRecord]) -> LastArrivals:
    """Count the last to arrive: as in `stage_time`, the rank that was blocked least.

    A meeting is one (step, micro-batch, layer) of dispatch or of combine, of one pipeline stage of
    one replica. Where all were blocked equally long, nobody was last.
    """
    num_last, num_meetings = np.zeros((2, layout.world_size), dtype=np.int64)
    for step in steps:
        for ranks, _, blocked in by_pipeline_stage(layout, step):
            blocked_s = blocked[..., [Stage.DISPATCH, Stage.COMBINE]]
            waited = blocked_s.max(axis=0) > blocked_s.min(axis=0)
            last = blocked_s.argmin(axis=0)[waited]
            num_last[ranks] += np.bincount(last, minlength=len(ranks))
            num_meetings[ranks] += len(last)
    return LastArrivals(num_last, num_meetings)
