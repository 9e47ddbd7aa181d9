"""A replayed step's events, rank by rank, as records have them."""

import numpy as np

from expertlane.cost.execution import LIKELY
from expertlane.cost.operation import Ints, Operation, Transfer
from expertlane.cost.step_log import Event, events
from expertlane.cost.timeline import StepTimes
from expertlane.spec.names import Track
from expertlane.spec.record import RankEvents

_TRACKS = list(Track)


def rank_events(times: StepTimes) -> dict[tuple[int, int], RankEvents]:
    """By pipeline stage and place in it; of a step that was run without jumps."""
    begin_s = float(min(spans[0].begin[LIKELY].min() for spans in times.spans))
    start_s = float(times.origin_s[LIKELY]) + begin_s
    of_stage: list[list[Event]] = [[] for _ in times.spans]
    for event in events(times):
        of_stage[event.pp_rank].append(event)
    return {
        (pp_rank, place): _of_rank(of_one, place, begin_s, start_s)
        for pp_rank, of_one in enumerate(of_stage)
        for place in range(times.idle_s[pp_rank].shape[1])
    }


def _of_rank(of_stage: list[Event], place: int, begin_s: float, start_s: float) -> RankEvents:
    kept = [each for each in of_stage if each.end_s[place] > each.begin_s[place]]

    def ints(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int64)

    return RankEvents(
        start_s=start_s,
        track=ints([_TRACKS.index(each.track) for each in kept]),
        stage=ints([each.stage for each in kept]),
        layer=ints([each.layer for each in kept]),
        micro_batch=ints([each.micro_batch for each in kept]),
        begin_s=np.array([each.begin_s[place] for each in kept]) - begin_s,
        end_s=np.array([each.end_s[place] for each in kept]) - begin_s,
        flops=ints([_flops(each, place) for each in kept]),
        num_bytes=ints([_num_bytes(each, place) for each in kept]),
    )


def _flops(event: Event, place: int) -> int:
    return int(event.step.flops[place]) if isinstance(event.step, Operation) else 0


def _num_bytes(event: Event, place: int) -> int:
    step = event.step
    if isinstance(step, Operation):
        return int(step.weight_bytes[place] + step.kv_bytes[place])
    if isinstance(step, Transfer):
        return int(step.sent_bytes[:, place].sum())
    return 0
