from dataclasses import replace

import pytest

from expertlane.results.metrics import critical_path
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage
from records import rank_record, step_record


def cpu_record(rank: int, *seconds: float):
    """A rank that computes for `seconds[m]` in each micro-batch m."""
    cpu = {(m, 0, Stage.EXPERTS): each for m, each in enumerate(seconds)}
    return rank_record(rank, cpu=cpu, num_micro_batches=len(seconds))


def test_the_largest_rank_counts_in_every_slot_and_stage() -> None:
    records = [
        rank_record(
            0, cpu={(0, 0, Stage.ROUTER): 1, (0, 0, Stage.EXPERTS): 2, (0, 1, Stage.HEAD): 4}
        ),
        rank_record(
            1, cpu={(0, 0, Stage.ROUTER): 3, (0, 0, Stage.EXPERTS): 1, (0, 1, Stage.IDLE): 9}
        ),
    ]
    result = critical_path(Layout(dp=2), [step_record(0, 1, [0, 1], records)])
    assert result.total_s == 3 + 2 + 4  # and no waiting for a plan


def test_drained_steps_follow_one_another() -> None:
    # t[m, s]: stage 0 takes 1 and 2, stage 1 takes 3 and 1.
    # finish[0] = 1, 4; finish[1] = 1 + 2 = 3, max(4, 3) + 1 = 5.
    records = [cpu_record(0, 1, 2), cpu_record(1, 3, 1)]
    steps = [step_record(at, at + 1, [0, 1], records) for at in (0, 1, 2)]
    result = critical_path(Layout(pp=2), steps)
    assert (result.total_s, result.step_s) == (15, 5)
    assert result.tps == 6 / 15


def test_rotating_micro_batches_fill_the_pipeline() -> None:
    # Each of two micro-batches takes 2 at stage 0 and 3 at stage 1; two steps each.
    # a: 0-2, 2-5. b: 2-4, 5-8. a again from 5: 5-7, 8-11. b again from 8: 8-10, 11-14.
    records = [cpu_record(0, 2), cpu_record(1, 3)]
    steps = [step_record(at, at + 9, [seq], records) for at, seq in enumerate((0, 1, 0, 1))]
    result = critical_path(Layout(pp=2), steps[::-1])
    assert result.total_s == 14
    assert result.step_s == 6  # 5, 8, 6, 6 from when their last tokens were ready
    assert result.tps == 4 / 14


def test_a_sequence_waits_for_its_own_last_token() -> None:
    records = [cpu_record(0, 2), cpu_record(1, 3)]
    steps = [step_record(at, at + 9, [7], records) for at in range(2)]
    assert critical_path(Layout(pp=2), steps).total_s == 10


def test_replicas_do_not_add_up() -> None:
    steps = [
        step_record(0, 1, [0], [cpu_record(0, 2)], replica=0),
        step_record(0, 1, [1], [cpu_record(1, 5)], replica=1),
    ]
    result = critical_path(Layout(replicas=2), steps)
    assert (result.total_s, result.tps) == (5, pytest.approx(0.4))


def test_no_cpu_time_counted() -> None:
    result = critical_path(Layout(), [step_record(0, 1, [0], [cpu_record(0, 0)])])
    assert (result.total_s, result.tps) == (0, 0)


def test_runs_add_up() -> None:
    """Each run begins with an empty pipeline: 2 × (1 + 1), not 1 + 1 + 1."""
    cpu = {(0, 0, Stage.ROUTER): 1.0}
    steps = [
        replace(step_record(run, run + 1, [0], [rank_record(r, cpu=cpu) for r in (0, 1)]), run=run)
        for run in (0, 1)
    ]
    assert critical_path(Layout(pp=2), steps).total_s == 4.0
