"""Layers that repeat are not run one by one, and nothing of a step is lost by it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.made_up import compute, halves, one_stage, send, terms
from expertlane.cost.laws.profile import Execution, Terms
from expertlane.cost.pricing import Block, StageWork, blocks_of
from expertlane.cost.step.operation import OUTSIDE
from expertlane.cost.timeline import Timeline, stage_seconds

OUTSIDE_BLOCK = Block([compute(1.0, 1.0, layer=OUTSIDE)], (OUTSIDE,))


def jumped(parts, given, num_layers):
    """Share of steps that were run one by one, once it is sure that nothing else differs."""
    jumping, stepping = (
        Timeline(given, 1, 2).run([[StageWork(parts)]], 0.0, may_skip=may_skip)
        for may_skip in (True, False)
    )
    np.testing.assert_allclose(jumping.spans[0][0].end, stepping.spans[0][0].end)
    (fast,), (slow,) = (stage_seconds(t, num_layers, count_idle=True) for t in (jumping, stepping))
    np.testing.assert_allclose(fast.wall_s, slow.wall_s, atol=1e-9)
    np.testing.assert_allclose(fast.blocked_s, slow.blocked_s, atol=1e-9)
    run, all_of_them = (len(each.spans[0][0].log.executed) for each in (jumping, stepping))
    return run / all_of_them


@pytest.mark.parametrize("execution", Execution)
def test_layers_that_repeat_are_not_run_one_by_one(execution):
    steps = [
        compute(1.0, 3.0),
        send(2.0, 1.0),
        compute(2.0, 1.0),
        send(1.0, 1.0),
        compute(1.0, 1.0),
    ]
    blocks = [Block(steps, range(3)), Block(steps[::-1], range(3, 40))]
    part = [OUTSIDE_BLOCK, *blocks, OUTSIDE_BLOCK]
    for parts in ([part], [part, part]):
        assert jumped(parts, terms(execution, 0.75), 40) < 1 / 3


@pytest.mark.parametrize("execution", Execution)
@pytest.mark.parametrize("launch_s", [0.0, 0.75, 3.0])
def test_layers_without_transfers_are_not_run_one_by_one(execution, launch_s):
    block = Block([compute(1.0, 3.0), compute(2.0, 1.0)], range(40))
    assert jumped([[OUTSIDE_BLOCK, block, OUTSIDE_BLOCK]], terms(execution, launch_s), 40) < 0.2


def test_layers_that_alternate_are_not_run_one_by_one():
    even = [compute(1.0, 3.0), send(2.0, 1.0)]
    odd = [compute(2.0, 1.0), send(1.0, 1.0), compute(1.0, 1.0)]
    parts = [blocks_of([(layer, (even, odd)[layer % 2]) for layer in range(41)])]
    assert jumped(parts, Terms.free(), 41) < 0.3


def test_layers_that_do_the_same_or_alternate_become_one_block():
    outside, even, odd, other = ([compute(float(each))] for each in range(4))
    sections = [(OUTSIDE, outside), *((layer, (even, odd)[layer % 2]) for layer in range(5))]
    sections += [(5, other), (6, other), (7, other), (OUTSIDE, outside)]
    blocks = blocks_of(sections)
    found = [
        (list(block.layers), [(each.times.seconds[0], each.offset) for each in block.steps])
        for block in blocks
    ]
    assert found == [
        ([OUTSIDE], [(0.0, 0)]),
        ([0, 2], [(1.0, 0), (2.0, 1)]),
        ([4], [(1.0, 0)]),
        ([5, 6, 7], [(3.0, 0)]),
        ([OUTSIDE], [(0.0, 0)]),
    ]


@settings(max_examples=150, deadline=None)
@given(
    parts=halves(),
    execution=st.sampled_from(Execution),
    launch_s=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    num_layers=st.integers(3, 40),
)
def test_skipped_layers_are_exact(parts, execution, launch_s, num_layers):
    parts = [
        [Block([timed for block in blocks for timed in block.steps], range(num_layers))]
        for blocks in parts
    ]
    given_terms = Terms(execution, launch_s * np.array([0.5, 1.0, 2.0]), np.zeros(3))
    fast, slow = (
        Timeline(given_terms, 1, 3).run(one_stage(*parts), 0.0, may_skip=may_skip)
        for may_skip in (True, False)
    )
    np.testing.assert_allclose(fast.spans[0][0].end, slow.spans[0][0].end, rtol=1e-7)
    (of_fast,), (of_slow,) = (
        stage_seconds(times, num_layers, count_idle=False) for times in (fast, slow)
    )
    np.testing.assert_allclose(of_fast.wall_s, of_slow.wall_s, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_fast.blocked_s, of_slow.blocked_s, rtol=1e-6, atol=1e-6)


def test_a_hop_that_is_included_in_the_one_before_ends_no_turn():
    """Two halves hide as much of a dispatch by one kernel as of a single hop."""
    one_hop = [compute(2.0), send(3.0), compute(2.0), send(1.0)]
    two_hops = [compute(2.0), send(3.0), send(0.0), compute(2.0), send(1.0), send(0.0)]
    ends = []
    for steps in (one_hop, two_hops):
        parts = [[Block(steps, range(6))]] * 2
        timeline = Timeline(terms(Execution.GRAPH, 0.0), 1, 1)
        ends.append(timeline.run([[StageWork(parts)]], 0.0).spans[0][0].end)
    np.testing.assert_allclose(*ends)
