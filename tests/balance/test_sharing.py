"""Loads of ranks against the engine's own choice among copies."""

from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.test_copies import BACKENDS, chosen_by_ranks
from expertlane.balance.placement import EMPTY, Packing, Placement
from expertlane.spec.layout import Layout


def chosen_loads(layout, ranks_per_node, placement, num_pairs):
    """[ep]; pairs that the choice of every rank sends to each, `num_pairs` [num_experts] a rank."""
    ids = np.repeat(np.arange(placement.num_experts), num_pairs)
    of_all = np.tile(np.random.default_rng(0).permutation(ids), layout.world_size)[:, None]
    owned = np.full(layout.world_size, len(ids))
    ranks = chosen_by_ranks(BACKENDS[0], layout, ranks_per_node, placement, owned, of_all)
    return np.bincount(ranks.ravel(), minlength=layout.ep)


@st.composite
def placements(draw):
    ep, num_experts = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    holds = rng.random((ep, num_experts)) < draw(st.sampled_from([0.0, 0.3, 0.6, 0.9]))
    holds[rng.integers(ep, size=num_experts), np.arange(num_experts)] = True
    holds[np.arange(ep), rng.integers(num_experts, size=ep)] = True
    return Placement(num_experts, tuple(tuple(np.nonzero(rank)[0].tolist()) for rank in holds))


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(placements(), st.integers(1, 9), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_as_the_engine_chooses(placement, ep_per_node, etp, seed):
    # Numbers of pairs at which every rank's turns come out even.
    turns = lcm(*range(1, max(map(len, placement.ranks_of_experts())) + 1))
    num_pairs = turns * np.random.default_rng(seed).integers(0, 3, size=placement.num_experts)
    layout = Layout(dp=placement.ep * etp, ep=placement.ep)
    loads = chosen_loads(layout, ep_per_node * etp, placement, num_pairs)
    load = num_pairs * layout.world_size
    np.testing.assert_allclose(placement.rank_loads(load, ep_per_node), loads)


@pytest.mark.parametrize(
    ("ranks_per_node", "loads"),
    [
        (6, [6, 6, 6, 4, 0, 2]),  # one node: all copies are as near
        (1, [6, 6, 6, 4, 0, 2]),  # the own rank's share and one of what is left: the same
        # Two on node 0, one on node 1, none on node 2, whose third goes to all.
        (2, [5, 5, 8, 4, 0, 2]),
        (3, [6, 6, 6, 4, 0, 2]),
        # Nodes of 4 ranks and of 2: they take 4/3 + 2/3 of 6 sixths.
        (4, [6, 6, 6, 4, 0, 2]),
        (5, [6, 6, 6, 4, 0, 2]),
    ],
)
def test_by_hand(ranks_per_node, loads):
    placement = Placement(4, ((0,), (0,), (0,), (1,), (2,), (3,)))
    np.testing.assert_allclose(placement.rank_loads([18, 4, 0, 2], ranks_per_node), loads)
    assert not placement.rank_loads(np.zeros(4), ranks_per_node).any()


@st.composite
def tables(draw):
    """Slots of full nodes, experts of which some are nowhere."""
    num_nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    holds = rng.random((num_nodes * ranks_per_node, 4)) < draw(st.sampled_from([0.4, 0.7]))
    holds[rng.integers(len(holds), size=4), np.arange(4)] = True
    return np.where(holds, np.arange(4), EMPTY)[None], num_nodes


def has_even_shares(slots, num_nodes, expert):
    is_held = (slots == expert).any(axis=1)
    loads = Packing(slots[None], np.ones((1, 4)), num_nodes).per_copy[0, expert]
    of_copies = np.repeat(loads, len(slots) // num_nodes)[is_held]
    return np.ptp(of_copies) < 1e-9


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(tables())
def test_which_changes_leave_shares_even(table):
    slots, num_nodes = table
    copies = Packing(slots, np.ones((1, 4)), num_nodes)
    gain, lose, move = copies.may_gain()[0], copies.may_lose()[0], copies.may_move_to()[0]
    node_of = np.arange(slots.shape[1]) * num_nodes // slots.shape[1]
    for expert in range(4):
        held = slots[0, :, expert] == expert
        for rank in range(len(held)):
            changed = slots[0].copy()
            changed[rank, expert] = EMPTY if held[rank] else expert
            may = (lose if held[rank] else gain)[expert, node_of[rank]]
            if held.sum() > 1 or not held[rank]:
                assert may == has_even_shares(changed, num_nodes, expert)
            for to in np.nonzero(~held)[0] if held[rank] else []:
                if node_of[to] != node_of[rank] and move[expert, node_of[to]]:
                    changed = slots[0].copy()
                    changed[[rank, to], expert] = EMPTY, expert
                    assert has_even_shares(slots[0], num_nodes, expert)
                    assert has_even_shares(changed, num_nodes, expert)
