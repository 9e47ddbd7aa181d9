"""Placements near the present one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.balance.moves import keep_slots, moves
from expertlane.balance.placement import Placement
from expertlane.balance.planner import plan_placement
from expertlane.balance.rebalance import improve_placements


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
