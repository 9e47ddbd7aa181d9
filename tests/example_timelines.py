"""Made-up steps as every rank spent them."""

import numpy as np

from expertlane.results.step_record import RankEvents
from expertlane.results.timeline import StepTimeline, timeline_of
from expertlane.spec.names import Stage, Track

_TRACKS = list(Track)
COMPUTE, NETWORK = _TRACKS.index(Track.COMPUTE), _TRACKS.index(Track.NETWORK)


def events(rows: list[tuple[int, Stage, int, float, float]], start_s: float = 0.0) -> RankEvents:
    """From track, stage, layer, begin and end in seconds."""
    track, stage, layer, begin_s, end_s = zip(*rows, strict=True)
    return RankEvents(
        start_s=start_s,
        track=np.array(track),
        stage=np.array(stage, dtype=np.int64),
        layer=np.array(layer),
        micro_batch=np.zeros(len(rows), dtype=np.int64),
        begin_s=np.array(begin_s),
        end_s=np.array(end_s),
    )


def timeline(num_ranks: int, step_s: float = 0.01) -> StepTimeline:
    """Each rank attends, sends, computes, hands over; higher ranks are later."""
    of_ranks = [
        (
            rank,
            0,
            events(
                [
                    (COMPUTE, Stage.ATTENTION, 0, 0.0, 0.3 * step_s),
                    (NETWORK, Stage.DISPATCH, 0, 0.3 * step_s, 0.4 * step_s),
                    (COMPUTE, Stage.EXPERTS, 0, 0.4 * step_s, 0.9 * step_s),
                    (NETWORK, Stage.HAND_OVER, -1, 0.9 * step_s, step_s),
                ],
                start_s=0.1 * step_s * rank / num_ranks,
            ),
        )
        for rank in range(num_ranks)
    ]
    return timeline_of(of_ranks, num_tokens=64, num_seqs=64)
