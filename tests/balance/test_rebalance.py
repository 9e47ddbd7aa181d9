"""Moves between placements, what they cost and gain, and placements near the present one."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import in_order
from expertlane.balance.placement import (
    WHOLE,
    Move,
    MovedPart,
    Placement,
    between_ranks,
    keep_slots,
    most_of_a_rank,
    moves,
    next_slice,
    rank_loads,
)
from expertlane.balance.planner import plan_placement
from expertlane.balance.rebalance import (
    Decision,
    LoadTracker,
    PairCost,
    RebalanceGate,
    improve_placements,
)


def test_what_stays_keeps_its_slot():
    now = [Placement(4, ((0, 1, 2), (3, 0, 1)))]
    then = [Placement(4, ((2, 3, 1), (1, 2, 0)))]
    (kept,) = keep_slots(now, then)
    assert kept.experts_of_rank == ((3, 1, 2), (2, 0, 1))


def test_fewer_and_more_slots():
    now = [Placement(4, ((0, 1, 2), (3,)))]
    then = [Placement(4, ((2, 1), (0, 3, 1)))]
    (kept,) = keep_slots(now, then)
    assert kept.experts_of_rank == ((2, 1), (3, 0, 1))
    assert moves(now, [kept], 2) == [
        Move(0, 2, source=0, rank=0, slot=0),  # its slot is gone: it moves within the rank
        Move(0, 0, source=0, rank=1, slot=1),
        Move(0, 1, source=0, rank=1, slot=2),
    ]


def test_sources_are_near_and_take_turns():
    now = [Placement(3, ((0,), (1,), (0,), (2,)))]
    then = [Placement(3, ((0, 1), (1, 0), (0, 1), (2, 0)))]
    assert moves(now, then, 2) == [
        Move(0, 1, source=1, rank=0, slot=1),
        Move(0, 0, source=0, rank=1, slot=1),
        Move(0, 1, source=1, rank=2, slot=1),
        Move(0, 0, source=2, rank=3, slot=1),
    ]
    far = [Placement(3, ((0,), (1,), (0,), (0, 2)))]
    assert moves([Placement(3, ((0,), (0,), (1,), (2,)))], far, 2)[:2] == [
        Move(0, 1, source=2, rank=1, slot=0),
        Move(0, 0, source=0, rank=2, slot=0),
    ]
    # Rank 0 has sent once already, so rank 1 sends next.
    assert moves([Placement(3, ((0,), (0,), (1,), (2,)))], far, 2)[2].source == 1


GATE = RebalanceGate(
    pair_s=1e-3,
    expert_bytes=48_000_000,
    move_s=0.03,
    stall_s=0.03,
    slice_most=WHOLE * 3 // 2,
    num_steps=256,
)
NOW = [Placement(4, ((0, 1), (2, 3)))]
THEN = [Placement(4, ((0, 3), (2, 1)))]
LOAD = np.array([[30, 20, 10, 4]])
NOW_LOADS, THEN_LOADS = rank_loads(NOW, LOAD, 2), rank_loads(THEN, LOAD, 2)


def test_gain_and_cost_by_hand():
    # Fullest: 50 now, 34 then; 16 pairs x 1 ms, seen over 8 steps, for 256.
    assert GATE.gain_s(NOW_LOADS, THEN_LOADS, 8) == pytest.approx(16e-3 * 256 / 8)
    # Both ranks send one and receive one, in one slice; then a stall.
    both = between_ranks(moves(NOW, THEN, 2))
    assert GATE.cost_s(both) == pytest.approx((1 + 1) * 0.03)
    hidden = replace(GATE, exposed=0.5, slice_most=WHOLE // 4)  # in four slices, each with a stall
    assert hidden.cost_s(both) == pytest.approx(0.5 * (1 + 4) * 0.03)
    assert GATE.cost_s([]) == 0
    decision = GATE.decide(NOW_LOADS, THEN_LOADS, 8, moves(NOW, THEN, 2))
    assert in_order(decision.line, "saves 0.512 256 costs 0.06 96 MB go")


def test_at_best_all_ranks_are_alike():
    # Fullest: 50 now, 32 at best.
    assert GATE.at_best(NOW_LOADS, 8).gain_s == pytest.approx(18e-3 * 256 / 8)
    assert GATE.at_best(NOW_LOADS, 8).cost_s == pytest.approx(2 * 0.03)


def test_it_stays_where_little_is_gained():
    assert in_order(
        GATE.decide(NOW_LOADS, THEN_LOADS, 256, moves(NOW, THEN, 2)).line,
        "saves 0.016 256 costs 0.06 96 MB stay",
    )
    back = GATE.decide(THEN_LOADS, NOW_LOADS, 8, moves(THEN, NOW, 2))
    assert back.gain_s == pytest.approx(-0.512)
    nothing = GATE.decide(NOW_LOADS, NOW_LOADS, 0, [])
    assert nothing == Decision(gain_s=0.0, cost_s=0.0, num_bytes=0, num_steps=256)


def test_a_slice_takes_as_long_as_its_busiest_rank():
    # Rank 0 sends two experts, to ranks 1 and 2; a slice holds two.
    moved = [Move(0, 0, 0, 1, 0), Move(0, 1, 0, 2, 0), Move(1, 0, 2, 2, 1), Move(1, 0, 1, 0, 0)]
    crossing = between_ranks(moved)
    assert crossing == [*moved[:2], *moved[3:]]  # the third only changes its slot
    waiting = deque(map(MovedPart, crossing))
    slices = [next_slice(waiting, GATE.slice_most) for _ in range(2)]
    assert not waiting
    half = WHOLE // 2  # of the second, which comes from the same rank
    assert slices[0] == [
        MovedPart(moved[0]),
        MovedPart(moved[1], 0, half),
        MovedPart(moved[3]),
    ]  # that passes it
    assert slices[1] == [MovedPart(moved[1], half)]
    num = [most_of_a_rank(each) / WHOLE for each in slices]
    assert GATE.cost_s(crossing) == pytest.approx((sum(num) + 2) * 0.03)


@given(
    moved=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
    most=st.sampled_from([1, 7, WHOLE // 3, WHOLE, 5 * WHOLE]),
)
def test_slices_have_every_byte_once_and_no_rank_has_too_many(moved, most):
    most = max(most, WHOLE // 50)
    needed = [Move(0, number, *ranks, 0) for number, ranks in enumerate(moved)]
    waiting, seen = deque(map(MovedPart, needed)), dict.fromkeys(range(len(needed)), 0)
    while waiting:
        parts = next_slice(waiting, most)
        assert 0 < most_of_a_rank(parts) <= most
        for part in parts:
            assert part.begin == seen[part.move.expert] < part.end
            seen[part.move.expert] = part.end
    assert all(end == WHOLE for end in seen.values())


def fullest(load, placed, ranks_per_node):
    return placed.rank_loads(load, ranks_per_node).max()


def test_a_copy_of_an_idle_expert_becomes_one_of_the_hot_one():
    # Experts 0 to 3 on ranks 0 to 3, with a second copy of each on the next rank but one.
    now = Placement(4, ((0, 2), (1, 3), (2, 0), (3, 1)))
    load = np.array([[0, 80, 10, 10]])
    (then,) = improve_placements(load, [now], 4, 1.2)
    assert fullest(load[0], now, 4) == 45
    assert fullest(load[0], then, 4) < 45
    assert len(moves([now], keep_slots([now], [then]), 4)) <= 3


def test_a_third_copy_goes_where_senders_use_it():
    # Rank 3's copy of 0 takes all of its node's pairs, one half; the others a quarter each.
    now = Placement(4, ((0, 1), (0, 2), (3, 1), (0, 3)))
    load = np.array([[80, 20, 20, 20]])
    assert fullest(load[0], now, 2) == 50
    (then,) = improve_placements(load, [now], 2, 1.2)
    assert fullest(load[0], then, 2) <= 1.2 * 35
    assert len(moves([now], keep_slots([now], [then]), 2)) <= 3


def test_what_is_even_enough_stays():
    now = Placement.linear(8, 4)
    load = np.full((1, 8), 5)
    assert improve_placements(load, [now], 2, 1.05) == [now]
    assert improve_placements(np.zeros((1, 8), dtype=int), [now], 2, 1.05) == [now]


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    num_nodes=st.integers(1, 3),
    ranks_per_node=st.integers(1, 4),
    num_experts=st.integers(2, 12),
    share=st.floats(0, 1),
    even=st.sampled_from([1.0, 1.05, 1.5]),
    seed=st.integers(0, 1000),
)
def test_never_less_even_and_always_whole(
    num_nodes, ranks_per_node, num_experts, share, even, seed
):
    ep = num_nodes * ranks_per_node
    num_redundant = int(share * num_experts * (ep - 1))
    now = [Placement.round_robin(num_experts, ep, num_redundant)] * 2
    load = np.random.default_rng(seed).zipf(1.5, (2, num_experts)).clip(0, 1000)
    then = improve_placements(load, now, ranks_per_node, even)
    for of_layer, before, after in zip(load, now, then, strict=True):
        assert list(map(len, after.experts_of_rank)) == list(map(len, before.experts_of_rank))
        at_most = fullest(of_layer, before, ranks_per_node) * (1 + 1e-9)
        assert fullest(of_layer, after, ranks_per_node) <= at_most


@pytest.mark.parametrize("even", [1.5, 1.05])
def test_it_moves_less_than_a_plan_anew(even):
    rng = np.random.default_rng(0)
    load = (1000 / (1 + rng.permuted(np.tile(np.arange(64), (4, 1)), axis=1))).astype(int)
    now = [Placement.linear(64, 8, 16)] * 4
    near = moves(now, keep_slots(now, improve_placements(load, now, 8, even)), 8)
    anew = moves(now, keep_slots(now, plan_placement(load, 8, 8, 16)), 8)
    assert len(near) < len(anew) / 2


def test_what_a_rank_takes_anyway_is_no_part_of_it():
    cost = PairCost()
    for fixed_s in (1.0, 5.0):  # another in each step
        num_pairs = np.array([10, 20, 60])
        cost.add(num_pairs, fixed_s + 0.01 * num_pairs)
    assert cost.pair_s == pytest.approx(0.01)


def test_nothing_is_promised_where_nothing_can_be_known():
    cost = PairCost()
    assert cost.pair_s == 0
    cost.add(np.array([5, 5]), np.array([1.0, 2.0]))
    assert cost.pair_s == 0
    cost.add(np.array([0, 9]), np.array([2.0, 1.0]))  # more pairs, less time: noise
    assert cost.pair_s == 0


@pytest.mark.parametrize("window", [1, 2, 3, 7, 20])
def test_it_sums_the_last_steps(window):
    steps = np.random.default_rng(0).integers(0, 100, size=(10, 2, 3))
    tracker = LoadTracker(2, 3, window)
    np.testing.assert_array_equal(tracker.load(), np.zeros((2, 3)))
    for num_added, step in enumerate(steps, start=1):
        added = step.copy()
        tracker.add(added)
        added[:] = 9  # the caller's, who goes on with it
        tracker.load()[:] = 7  # a copy
        first = max(0, num_added - window)
        np.testing.assert_array_equal(tracker.load(), steps[first:num_added].sum(axis=0))
        assert tracker.num_steps == min(num_added, window)
