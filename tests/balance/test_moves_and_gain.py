from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import in_order
from expertlane.balance.moves import (
    WHOLE,
    Move,
    Part,
    between_ranks,
    keep_slots,
    most_of_a_rank,
    moves,
    next_slice,
)
from expertlane.balance.placement import Placement, rank_loads
from expertlane.balance.planner import plan_placement
from expertlane.balance.rebalance import Decision, RebalanceGate


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


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 10), st.integers(1, 8), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_moves_lead_from_one_placement_to_the_next(num_experts, ep, num_redundant, seed):
    num_redundant = min(num_redundant, num_experts * (ep - 1))
    rng = np.random.default_rng(seed)
    now, then = (
        plan_placement(rng.integers(0, 50, size=(2, num_experts)), ep, 1, num_redundant)
        for _ in range(2)
    )
    kept = keep_slots(now, then)
    for one, other in zip(kept, then, strict=True):
        assert [set(rank) for rank in one.experts_of_rank] == [
            set(rank) for rank in other.experts_of_rank
        ]
    held = [[list(rank) for rank in layer.experts_of_rank] for layer in now]
    for move in moves(now, kept, 1):
        assert move.expert in now[move.layer].experts_of_rank[move.source]
        assert move.source != move.rank  # equal slots: nothing moves within a rank
        held[move.layer][move.rank][move.slot] = move.expert
    assert held == [[list(rank) for rank in layer.experts_of_rank] for layer in kept]
    assert moves(kept, kept, 1) == []


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
    waiting = deque(map(Part, crossing))
    slices = [next_slice(waiting, GATE.slice_most) for _ in range(2)]
    assert not waiting
    half = WHOLE // 2  # of the second, which comes from the same rank
    assert slices[0] == [Part(moved[0]), Part(moved[1], 0, half), Part(moved[3])]  # that passes it
    assert slices[1] == [Part(moved[1], half)]
    num = [most_of_a_rank(each) / WHOLE for each in slices]
    assert GATE.cost_s(crossing) == pytest.approx((sum(num) + 2) * 0.03)


@given(
    moved=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
    most=st.sampled_from([1, 7, WHOLE // 3, WHOLE, 5 * WHOLE]),
)
def test_slices_have_every_byte_once_and_no_rank_has_too_many(moved, most):
    most = max(most, WHOLE // 50)
    needed = [Move(0, number, *ranks, 0) for number, ranks in enumerate(moved)]
    waiting, seen = deque(map(Part, needed)), dict.fromkeys(range(len(needed)), 0)
    while waiting:
        parts = next_slice(waiting, most)
        assert 0 < most_of_a_rank(parts) <= most
        for part in parts:
            assert part.begin == seen[part.move.expert] < part.end
            seen[part.move.expert] = part.end
    assert all(end == WHOLE for end in seen.values())


def test_layers_add_up():
    two = np.concatenate([LOAD, LOAD])
    gain_s = GATE.gain_s(NOW_LOADS, THEN_LOADS, 8)
    now = rank_loads(NOW * 2, two, 2)
    assert GATE.gain_s(now, rank_loads(THEN * 2, two, 2), 8) == pytest.approx(2 * gain_s)
    assert GATE.gain_s(now, rank_loads(NOW + THEN, two, 2), 8) == gain_s
