from dataclasses import replace

import numpy as np
import pytest

from expertlane.results.metrics import stage_time
from expertlane.results.step_record import RankWaits
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Stage
from records import rank_record, step_record


def blocked_record(rank: int, stage: Stage, wall_s: float, blocked_s: float):
    return rank_record(rank, wall={(0, 0, stage): wall_s}, blocked={(0, 0, stage): blocked_s})


def test_one_rank_waits_for_nobody() -> None:
    steps = [step_record(0, 1, [0], [blocked_record(0, Stage.DISPATCH, 0.5, 0.2)])]
    time = stage_time(Layout(), steps)
    assert time.stage_s[0, Stage.DISPATCH] == 0.5
    assert time.waiting_s.tolist() == [0]
    assert time.exposed_s == 0.2


@pytest.mark.parametrize("stage", [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES])
def test_the_least_blocked_time_is_the_transfer(stage: Stage) -> None:
    records = [blocked_record(0, stage, 1.0, 0.75), blocked_record(1, stage, 0.5, 0.25)]
    time = stage_time(Layout(tp=2), [step_record(0, 1, [0, 1], records)] * 2)
    assert time.waiting_s.tolist() == [1.0, 0.0]  # twice 0.75 - 0.25
    assert time.stage_s[:, stage].tolist() == [1.0, 1.0]
    assert time.exposed_s == (0.0 if stage is Stage.COLLECTIVES else 1.0)  # both steps


def test_each_meeting_has_its_own_last_rank() -> None:
    first, second = (0, 0, Stage.DISPATCH), (1, 0, Stage.DISPATCH)
    records = [
        rank_record(0, wall={first: 1, second: 1}, blocked={first: 1}, num_micro_batches=2),
        rank_record(1, wall={first: 1, second: 1}, blocked={second: 1}, num_micro_batches=2),
    ]
    time = stage_time(Layout(dp=2, ep=2), [step_record(0, 2, [0, 1], records)])
    assert time.waiting_s.tolist() == [1, 1]
    assert time.stage_s[:, Stage.DISPATCH].tolist() == [1, 1]


def test_pipeline_stages_and_replicas_are_apart() -> None:
    layout = Layout(replicas=2, pp=2)
    steps = [
        step_record(
            0, 1, [replica], [blocked_record(rank, Stage.COLLECTIVES, 1, blocked)], replica=replica
        )
        for replica, rank, blocked in [(0, 0, 0.1), (0, 1, 0.9), (1, 2, 0.2), (1, 3, 0.8)]
    ]
    assert stage_time(layout, steps).waiting_s.tolist() == [0, 0, 0, 0]


def test_blocked_in_a_hand_over_is_the_bubble() -> None:
    records = [rank_record(0), blocked_record(1, Stage.HAND_OVER, 1.0, 0.75)]
    time = stage_time(Layout(pp=2), [step_record(0, 1, [0], records)])
    assert time.bubble_s.tolist() == [0, 0.75]
    assert time.stage_s[1, Stage.HAND_OVER] == 0.25
    assert time.waiting_s.tolist() == [0, 0]


def test_exposed_time_adds_up_over_pipeline_stages_not_over_ranks_or_replicas() -> None:
    records = [blocked_record(rank, Stage.DISPATCH, 1, 0.4) for rank in range(4)]
    steps = [
        step_record(0, 1, [0], records[:2], replica=0),
        step_record(0, 1, [1], records[2:], replica=1),
    ]
    assert stage_time(Layout(replicas=2, pp=2), steps).exposed_s == pytest.approx(0.8)


def test_idle_time_is_the_drivers_then_bubble_then_waiting() -> None:
    # Two stages of two ranks: the second stage worked longer, so it idled less.
    idle_s = [5.0, 6.0, 2.0, 2.5]
    records = [blocked_record(rank, Stage.IDLE, s, s) for rank, s in enumerate(idle_s)]
    time = stage_time(Layout(pp=2, tp=2), [step_record(0, 10, [0], records)])
    assert time.bubble_s.tolist() == [3.0, 3.0, 0, 0]
    assert time.waiting_s.tolist() == [0, 1.0, 0, 0.5]
    breakdown = time.breakdown_s(wall_s=10.0, num_rounds=1)
    # Of the 7, 6, 10 and 9.5 s that are left, the second stage has 3.5 above the first.
    assert breakdown[Cause.PIPELINE_BUBBLE] == 3.0 / 2 + 3.5 / 2
    assert breakdown[Cause.ENGINE] == 10.0 - (3 + 4 + 0 + 0.5) / 4 - 3.5 / 2
    assert sum(breakdown.values()) == pytest.approx(10.0)


def test_a_stage_that_is_done_before_the_other_begins_has_a_bubble() -> None:
    """A single step: neither stage was idle since one before it."""
    records = [rank_record(rank, wall={(0, 0, Stage.EXPERTS): 3.0 + rank}) for rank in range(2)]
    time = stage_time(Layout(pp=2), [step_record(0, 8, [0], records)])
    breakdown = time.breakdown_s(wall_s=8.0, num_rounds=1)
    assert breakdown[Cause.EXPERTS] == 3.5
    assert breakdown[Cause.PIPELINE_BUBBLE] == 0.5
    assert breakdown[Cause.ENGINE] == 4.0


def test_tensor_parallel_groups_do_not_wait_for_each_other() -> None:
    blocked_s = [1.0, 1.5, 0.25, 0.25]
    records = [blocked_record(rank, Stage.COLLECTIVES, 2, s) for rank, s in enumerate(blocked_s)]
    time = stage_time(Layout(dp=2, tp=2), [step_record(0, 1, [0], records)])
    assert time.waiting_s.tolist() == [0, 0.5, 0, 0]


def test_breakdown_adds_up_to_the_wall_time_of_a_round() -> None:
    both = {(0, 0, Stage.EXPERTS): 2.0, (0, 1, Stage.IDLE): 5.0, (0, 1, Stage.EMBED): 1.0}
    records = [
        rank_record(
            0,
            wall=both | {(0, 0, Stage.COMBINE): 3.0, (0, 1, Stage.HEAD): 1.0},
            blocked={(0, 0, Stage.COMBINE): 2.0},
        ),
        rank_record(1, wall=both | {(0, 0, Stage.DISPATCH): 1.0, (0, 0, Stage.ROUTER): 2.0}),
    ]
    time = stage_time(Layout(dp=2, ep=2), [step_record(0, 8, [0, 1], records)])
    breakdown = time.breakdown_s(wall_s=8.0, num_rounds=2)
    # Rank 0 accounts for 7 of 8 s, rank 1 for 6; halves are means over two ranks or two rounds.
    assert breakdown == {
        Cause.ATTENTION: 0,
        Cause.ROUTER: 0.5,
        Cause.EXPERTS: 1.0,
        Cause.HEAD: 0.75,
        Cause.DISPATCH_COMBINE: 0.5,
        Cause.TP_COLLECTIVES: 0,
        Cause.HAND_OVER: 0,
        Cause.WAITING: 0.5,
        Cause.PIPELINE_BUBBLE: 0,
        Cause.ENGINE: 0.75,
    }
    assert sum(breakdown.values()) == 4.0


def test_a_rank_that_tidies_up_late_has_no_rest() -> None:
    records = [rank_record(0, wall={(0, 0, Stage.EXPERTS): 1.5})]
    time = stage_time(Layout(), [step_record(0, 1, [0], records)])
    breakdown = time.breakdown_s(wall_s=1.0, num_rounds=1)
    assert breakdown[Cause.ENGINE] == 0
    assert sum(breakdown.values()) == 1.5


def test_waits_of_one_stage_are_told_apart():
    """Each of two ranks comes late to one of a layer's two gatherings, and waits in the other."""
    layout, cell = Layout(tp=2), (0, 0, Stage.COLLECTIVES)
    records = [blocked_record(rank, Stage.COLLECTIVES, 8.0, 6.0) for rank in range(2)]
    shape = records[0].blocked_s.shape
    place = np.ravel_multi_index(cell, shape)
    other = np.ravel_multi_index((0, 0, Stage.DISPATCH), shape)
    waits = [[5.0, 1.0, 0.0], [1.0, 5.0, 0.0]]
    listed = [
        replace(record, waits=RankWaits(np.array([place, place, other]), np.array(blocked_s)))
        for record, blocked_s in zip(records, waits, strict=True)
    ]
    for of_ranks, waited_s in ((records, 0.0), (listed, 4.0), ([listed[0], records[1]], 0.0)):
        time = stage_time(layout, [step_record(0, 1, [0, 1], of_ranks)])
        assert time.waiting_s.tolist() == [waited_s, waited_s]
        assert time.stage_s[:, Stage.COLLECTIVES].tolist() == [8.0 - waited_s] * 2
