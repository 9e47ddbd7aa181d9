"""Time of ranks by cause, the bottleneck of a phase, and its cost without waiting."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.results.record import Bottleneck, CriticalPath, StepsRecord
from expertlane.results.step_record import StepRecord, by_pipeline_stage
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Stage

# Below this share of the wall time a rank that waits less than the others is not called slow.
STRAGGLER_SHARE = 0.05

# Stages in which all ranks of a pipeline stage meet.
_MEETINGS = [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES]
_NOT_WORK = [Stage.IDLE, Stage.SETUP]
CAUSE_OF_STAGE = {
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
        bubble_s: [num_ranks]; blocked in PP send/recv between pipeline stages, or idle because
            another stage was busy.
        exposed_s: seconds blocked in dispatch and combine, mean over the ranks of a pipeline
            stage, added up over stages and steps: a token passes one stage after the other.
    """

    stage_s: npt.NDArray[np.float64]
    waiting_s: npt.NDArray[np.float64]
    bubble_s: npt.NDArray[np.float64]
    exposed_s: float

    def breakdown_s(self, wall_s: float, num_rounds: int) -> dict[str, float]:
        """Seconds a round by cause, mean over ranks; their sum is the wall time of a round.

        What the ranks do not account for is `Cause.ENGINE`. A rank may still tidy up after the
        driver has the last token, and account for more than `wall_s`; it then has no such rest.
        """
        working_s = self.stage_s.copy()
        working_s[:, _NOT_WORK] = 0.0
        accounted_s = working_s.sum(axis=1) + self.waiting_s + self.bubble_s
        causes = dict.fromkeys(Cause, 0.0)
        for stage, cause in CAUSE_OF_STAGE.items():
            causes[cause] += float(working_s[:, stage].mean())
        causes[Cause.WAITING] = float(self.waiting_s.mean())
        causes[Cause.PIPELINE_BUBBLE] = float(self.bubble_s.mean())
        causes[Cause.ENGINE] = float(np.maximum(wall_s - accounted_s, 0.0).mean())
        return {cause.value: seconds / num_rounds for cause, seconds in causes.items()}


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
        for records in by_pipeline_stage(layout, step).values():
            ranks = [record.rank for record in records]
            wall = np.stack([record.wall_s for record in records])
            blocked = np.stack([record.blocked_s for record in records])
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
    """Indices in `ranks` (of one pipeline stage), by groups that meet each other in `stage`."""
    if stage is not Stage.COLLECTIVES:
        return [list(range(len(ranks)))]
    groups = defaultdict(list)
    for place, rank in enumerate(ranks):
        groups[layout.coordinates(rank).dp_rank].append(place)
    return list(groups.values())


def find_bottleneck(layout: Layout, steps: StepsRecord) -> Bottleneck:
    """Name the largest cause of a measured phase, and the straggler if there is one."""
    cause, share = steps.largest
    straggler, excess_s = _straggler(layout, np.array(steps.waiting_s))
    sentence = f"{cause}, {share:.0%} of {steps.phase.value}"
    excess = excess_s / steps.wall_s.value
    if excess <= STRAGGLER_SHARE:
        return Bottleneck(steps.phase, Cause(cause), share, None, sentence)
    sentence += f"; straggler: rank {straggler}, others wait for it {excess:.0%} of the time"
    return Bottleneck(steps.phase, Cause(cause), share, straggler, sentence)


def _straggler(layout: Layout, waiting_s: npt.NDArray[np.float64]) -> tuple[int, float]:
    """The rank that waits least within its pipeline stage, and how much longer the others wait.

    Of several pipeline stages, the one where that difference is largest.
    """
    if layout.stage_size == 1:
        return 0, 0.0
    by_stage = waiting_s.reshape(-1, layout.stage_size)
    least = by_stage.min(axis=1)
    of_others = (by_stage.sum(axis=1) - least) / (layout.stage_size - 1)
    stage = int(np.argmax(of_others - least))
    rank = stage * layout.stage_size + int(by_stage[stage].argmin())
    return rank, float(of_others[stage] - least[stage])


def critical_path(layout: Layout, steps: Sequence[StepRecord]) -> CriticalPath:
    """Chain the steps of one phase through the pipeline.

    The ranks of a pipeline stage are taken to meet after every (micro-batch, layer slot, stage),
    so each of these costs the largest `cpu_s` among them. Summed per micro-batch m and pipeline
    stage s to t[m, s], with time spent waiting for a plan left out, they follow the usual
    recurrence finish[m, s] = max(finish[m - 1, s], finish[m, s - 1]) + t[m, s]. It runs on over
    the steps of a replica in the order of submission; a step begins no sooner than the last
    tokens of its own sequences are ready. Drained steps thus follow one another, and rotating
    micro-batches fill the pipeline.
    """
    total_s, step_s = 0.0, []
    for run in sorted({step.run for step in steps}):
        run_s, of_steps_s = _one_run(layout, [step for step in steps if step.run == run])
        total_s += run_s
        step_s += of_steps_s
    num_tokens = sum(step.num_tokens for step in steps)
    return CriticalPath(
        total_s=total_s,
        tps=num_tokens / total_s if total_s else 0.0,
        step_s=float(np.median(step_s)),
    )


def _one_run(layout: Layout, steps: Sequence[StepRecord]) -> tuple[float, list[float]]:
    """Seconds of a run, and of each step."""
    total_s, step_s = 0.0, []
    for replica in range(layout.replicas):
        free = [0.0] * layout.pp
        ready: dict[int, float] = {}
        of_replica = (step for step in steps if step.replica == replica)
        for step in sorted(of_replica, key=lambda step: step.submitted_s):
            begin = max((ready.get(seq, 0.0) for seq in step.seq_ids), default=0.0)
            for of_micro_batch in _stage_cpu_s(layout, step):
                finish = begin
                for pp_rank, cpu_s in enumerate(of_micro_batch):
                    finish = free[pp_rank] = max(free[pp_rank], finish) + float(cpu_s)
            ready |= dict.fromkeys(step.seq_ids, free[-1])
            step_s.append(free[-1] - begin)
        total_s = max(total_s, free[-1])
    return total_s, step_s


def _stage_cpu_s(layout: Layout, step: StepRecord) -> npt.NDArray[np.float64]:
    """[num_micro_batches, pp]; a step's critical CPU time."""
    times = np.zeros((step.num_micro_batches, layout.pp))
    for pp_rank, records in by_pipeline_stage(layout, step).items():
        largest = np.max([record.cpu_s for record in records], axis=0)
        largest[..., Stage.IDLE] = 0.0
        times[:, pp_rank] = largest.sum(axis=(1, 2))
    return times
