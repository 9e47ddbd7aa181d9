"""Where the ranks' time goes: own work, exposed transfers, waiting, bubbles, between steps."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.results.step_record import StepRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Stage

# Stages in which all ranks of a pipeline stage meet.
_MEETINGS = [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES]
_NOT_WORK = [Stage.IDLE, Stage.SETUP]
_CAUSE_OF_STAGE = {
    Stage.EMBED: Cause.HEAD,
    Stage.ATTENTION: Cause.ATTENTION,
    Stage.ROUTER: Cause.ROUTER,
    Stage.DISPATCH: Cause.DISPATCH_COMBINE,
    Stage.EXPERTS: Cause.EXPERTS,
    Stage.COMBINE: Cause.DISPATCH_COMBINE,
    Stage.COLLECTIVES: Cause.TP_COLLECTIVES,
    Stage.HAND_OVER: Cause.HAND_OVER,
    Stage.HEAD: Cause.HEAD,
}


@dataclass(frozen=True, eq=False)
class StageTime:
    """The seconds of every rank over one phase.

    Attributes:
        stage_s: [num_ranks, num_stages]; time in a stage without waiting and bubbles; in a
            communication stage it holds the transfer that nothing hid.
        waiting_s: [num_ranks]; blocked because other ranks came later.
        bubble_s: [num_ranks]; blocked in a hand-over between pipeline stages, or idle because
            another stage was busy.
        exposed_s: seconds blocked in dispatch and combine, mean over the ranks of a pipeline
            stage, added up over stages and steps: a token passes one stage after the other.
    """

    stage_s: npt.NDArray[np.float64]
    waiting_s: npt.NDArray[np.float64]
    bubble_s: npt.NDArray[np.float64]
    exposed_s: float

    def breakdown_s(self, wall_s: float, num_rounds: int) -> dict[Cause, float]:
        """Seconds a round by cause, mean over ranks; their sum is the wall time of a round.

        What the ranks do not account for is `Cause.ENGINE`. A rank may still tidy up after the
        driver has the last token, and account for more than `wall_s`; it then has no such rest.
        """
        working_s = self.stage_s.copy()
        working_s[:, _NOT_WORK] = 0.0
        accounted_s = working_s.sum(axis=1) + self.waiting_s + self.bubble_s
        causes = dict.fromkeys(Cause, 0.0)
        for stage, cause in _CAUSE_OF_STAGE.items():
            causes[cause] += float(working_s[:, stage].mean())
        causes[Cause.WAITING] = float(self.waiting_s.mean())
        causes[Cause.PIPELINE_BUBBLE] = float(self.bubble_s.mean())
        causes[Cause.ENGINE] = float(np.maximum(wall_s - accounted_s, 0.0).mean())
        return {cause: seconds / num_rounds for cause, seconds in causes.items()}


def stage_time(layout: Layout, steps: Sequence[StepRecord]) -> StageTime:
    """Split the time of every rank over the steps of one phase.

    In a stage where ranks meet, a rank's blocked time less the least blocked time among those it
    meets (its tensor-parallel group for the collectives around attention, else all ranks of its
    pipeline stage), in the same (step, micro-batch, layer slot, stage), is waiting for others:
    whoever came last was blocked by the transfer alone. Idle time between plans is split the same
    way: the least of the replica is the driver's, what a pipeline stage has above it is bubble
    (it was done earlier than another stage), what a rank has above its stage's least is waiting.
    """
    stage_s = np.zeros((layout.world_size, len(Stage)))
    waiting_s = np.zeros(layout.world_size)
    bubble_s = np.zeros(layout.world_size)
    exposed_s = 0.0
    for step in steps:
        least_idle = min(record.blocked_s[..., Stage.IDLE].sum() for record in step.records)
        for ranks, wall, blocked in by_pipeline_stage(layout, step):
            idle = blocked[..., Stage.IDLE].sum(axis=(1, 2))
            bubble_s[ranks] += idle.min() - least_idle
            waiting_s[ranks] += idle - idle.min()
            waiting = np.zeros_like(blocked[..., _MEETINGS])
            for position, stage in enumerate(_MEETINGS):
                for members in _meeting(layout, ranks, stage):
                    at_meeting = blocked[members, ..., stage]
                    waiting[members, ..., position] = at_meeting - at_meeting.min(axis=0)
            bubble = blocked[..., Stage.HAND_OVER]
            own = wall.copy()
            own[..., _MEETINGS] -= waiting
            own[..., Stage.HAND_OVER] -= bubble
            stage_s[ranks] += own.sum(axis=(1, 2))
            waiting_s[ranks] += waiting.sum(axis=(1, 2, 3))
            bubble_s[ranks] += bubble.sum(axis=(1, 2))
            exposed = blocked[..., [Stage.DISPATCH, Stage.COMBINE]].sum(axis=(1, 2, 3))
            exposed_s += float(exposed.mean()) / layout.replicas
    return StageTime(stage_s, waiting_s, bubble_s, exposed_s)


def _meeting(layout: Layout, ranks: list[int], stage: Stage) -> list[list[int]]:
    """Places in `ranks` (of one pipeline stage) of those who meet each other in `stage`."""
    if stage is not Stage.COLLECTIVES:
        return [list(range(len(ranks)))]
    groups = defaultdict(list)
    for place, rank in enumerate(ranks):
        groups[layout.coordinates(rank).dp_rank].append(place)
    return list(groups.values())


def hidden_communication(step_off_s: float, step_on_s: float, exposed_s: float) -> float | None:
    """The share of exposed communication that overlap hides; negative where overlap costs time.

    Args:
        step_off_s, step_on_s: mean decode step (of a round, where micro-batches rotate) without
            and with overlap.
        exposed_s: `StageTime.exposed_s` of decoding without overlap, per such step.

    Returns:
        (step_off_s - step_on_s) / exposed_s, or None where nothing was exposed.
    """
    return (step_off_s - step_on_s) / exposed_s if exposed_s > 0 else None


def by_pipeline_stage(
    layout: Layout, step: StepRecord
) -> list[tuple[list[int], npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Ranks, `wall_s` and `blocked_s` [ranks, micro-batches, slots, stages] by pipeline stage."""
    groups = defaultdict(list)
    for record in step.records:
        groups[layout.coordinates(record.rank).pp_rank].append(record)
    return [
        (
            [record.rank for record in records],
            np.stack([record.wall_s for record in records]),
            np.stack([record.blocked_s for record in records]),
        )
        for records in groups.values()
    ]
