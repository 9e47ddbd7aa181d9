"""Shares by cause, against times worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.made_up import compute, one_stage, part, seconds, send, terms
from cost.test_timeline import halves
from expertlane.cost.breakdown import BreakdownTable
from expertlane.cost.laws.profile import Device, Execution, Terms
from expertlane.cost.pricing import Block, StageWork
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.timeline import Timeline
from expertlane.spec.names import ProjectedCause as Cause
from expertlane.spec.names import Stage

# A FLOP takes a second, and so does a byte.
DEVICE = Device("made up", 1.0, 1.0, {"float32": 1.0}, "")


def breakdown(*steps, num_ranks=1, given=None, plans_s=None, **flags):
    """The table of steps that follow each other, each on one clock."""
    table = BreakdownTable(DEVICE, NumberTypes.all_of("float32"))
    timeline = Timeline(given or Terms.free(), len(steps[0]), num_ranks)
    for work, plan_s in zip(steps, plans_s or [0.0] * len(steps), strict=True):
        table.add(timeline.run(work, plan_s, **flags))
    return table.result()


def spent(result):
    """Seconds by cause, without those that took none."""
    return {
        cause: pytest.approx(share * result.seconds)
        for cause, share in result.shares.items()
        if share > 1e-12
    }


def test_what_an_operation_is_bound_by():
    bound_by_flops = compute(4.0, flops=3, weight_bytes=2)
    reading = compute(6.0, flops=1, weight_bytes=2, kv_bytes=1, stage=Stage.ATTENTION)
    result = breakdown(one_stage(part(bound_by_flops, reading, compute(1.0, stage=Stage.ROUTER))))
    assert spent(result) == {
        Cause.EXPERT_COMPUTE: 4.0,
        Cause.WEIGHT_READS: 4.0,
        Cause.KV_READS: 2.0,
        Cause.OTHER_COMPUTE: 1.0,
    }
    assert result.seconds == 11.0
    assert result.flops_utilisation == pytest.approx(4 / 11)
    assert result.bytes_utilisation == pytest.approx(5 / 11)


def test_a_wait_is_imbalance_until_the_last_has_come():
    steps = part(
        compute(1.0, 4.0), send(2.0, 2.0), send(1.0, 1.0, stage=Stage.COLLECTIVES, group=[0, 1])
    )
    result = breakdown(one_stage(steps), num_ranks=2)
    assert spent(result) == {
        Cause.EXPERT_COMPUTE: 2.5,
        Cause.IMBALANCE: 1.5,
        Cause.DISPATCH_COMBINE: 2.0,
        Cause.TP_COLLECTIVES: 1.0,
    }


def test_only_what_overlap_leaves_is_exposed():
    half = part(compute(4.0), send(6.0), compute(4.0))
    assert spent(breakdown(one_stage(half, half))) == {
        Cause.EXPERT_COMPUTE: 16.0,
        Cause.DISPATCH_COMBINE: 4.0,
    }
    half = part(compute(4.0), send(6.0, contention=0.5), compute(4.0))
    # Beside the first transfer 4 s take 8, of which 6 beside it: 3 s of work, then 1 more.
    result = breakdown(one_stage(half, half))
    assert result.shares[Cause.CONTENTION] > 0
    assert sum(spent(result)[cause].expected for cause in spent(result)) == pytest.approx(
        result.seconds
    )


def test_launches():
    steps = part(compute(1.0), compute(1.0))
    for execution, launch_s in ((Execution.EAGER, 5.0), (Execution.GRAPH, 3.0)):
        result = breakdown(one_stage(steps), given=terms(execution, 3.0))
        expected = {Cause.EXPERT_COMPUTE: 2.0, Cause.LAUNCH: launch_s}
        assert spent(result) == expected
    serial = breakdown(one_stage(part(compute(1.0), send(1.0))), given=terms(Execution.SERIAL, 0.5))
    assert spent(serial) == {
        Cause.EXPERT_COMPUTE: 1.0,
        Cause.DISPATCH_COMBINE: 1.5,  # a rank that waits for a transfer wakes late
        Cause.LAUNCH: 0.5,
    }


def test_bubbles_and_hand_over():
    work = [
        [StageWork([part(compute(2.0))], seconds([0.5]))],
        [StageWork([part(compute(1.0))])],
    ]
    # Each stage waits for the other: 2 s before, 1.5 s after; the mean over two ranks.
    assert spent(breakdown(work)) == {
        Cause.EXPERT_COMPUTE: 1.5,
        Cause.HAND_OVER: 0.25,
        Cause.PIPELINE_BUBBLE: (2.0 + 1.5) / 2,
    }


def test_between_steps():
    work = one_stage(part(compute(1.0, 3.0)))
    result = breakdown(work, work, num_ranks=2, plans_s=[0.0, 4.0])
    assert result.seconds == 7.0
    assert spent(result) == {
        Cause.EXPERT_COMPUTE: 4.0,
        Cause.ENGINE: 1.0,
        Cause.IMBALANCE: 2.0,
    }


def test_layers_that_were_not_run_one_by_one_count():
    block = Block([compute(1.0, 2.0, flops=1), send(1.0, 1.0)], range(30))
    jumping, stepping = (
        breakdown([[StageWork([[block]])]], num_ranks=2, may_skip=may_skip)
        for may_skip in (True, False)
    )
    assert spent(jumping) == spent(stepping)
    assert jumping.flops_utilisation == pytest.approx(stepping.flops_utilisation)


def test_nothing_to_explain():
    with pytest.raises(ValueError, match="no step"):
        BreakdownTable(DEVICE, NumberTypes.all_of("float32")).result()


@settings(max_examples=100, deadline=None)
@given(first=halves(), second=halves(), execution=st.sampled_from(Execution))
def test_shares_add_up_to_one(first, second, execution):
    works = [
        [[StageWork(first, seconds([0.5] * 3))], [StageWork(second)]],
        [[StageWork(second, seconds([0.5] * 3))], [StageWork(first)]],
    ]
    result = breakdown(*works, num_ranks=3, given=terms(execution, 0.1), plans_s=[0.0, 5.0])
    assert min(result.shares.values()) >= 0
    assert sum(result.shares.values()) == pytest.approx(1.0)
