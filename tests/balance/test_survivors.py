"""Placements over the ranks that are left after a loss."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertlane.balance.placement import Placement
from expertlane.balance.survivors import over_survivors


def test_by_hand():
    linear = Placement.linear(8, 4)
    assert over_survivors(linear, [3, 1, 2]).experts_of_rank == ((6, 7, 0), (2, 3, 1), (4, 5))
    heavy = np.array([9, 1, 5, 5, 1, 1, 1, 1])
    assert over_survivors(linear, [3, 1, 2], heavy).experts_of_rank == (
        (6, 7, 0),
        (2, 3),
        (4, 5, 1),
    )
    copies = Placement.linear(4, 2, 4)  # each rank holds all
    assert over_survivors(copies, [1]).experts_of_rank == (copies.experts_of_rank[1],)


@st.composite
def placements(draw):
    ep = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 16))
    holders = draw(
        st.lists(
            st.frozensets(st.integers(0, ep - 1), min_size=1),
            min_size=num_experts,
            max_size=num_experts,
        )
    )
    held = [[e for e, ranks in enumerate(holders) if rank in ranks] for rank in range(ep)]
    return Placement(num_experts, tuple(tuple(rank) or (0,) for rank in held))


@given(placements(), st.data())
def test_all_stays_and_every_expert_is_somewhere(placement, data):
    ranks = data.draw(st.lists(st.integers(0, placement.ep - 1), min_size=1, unique=True))
    load = data.draw(
        st.none()
        | st.lists(
            st.integers(0, 100),
            min_size=placement.num_experts,
            max_size=placement.num_experts,
        ).map(np.array)
    )
    left = over_survivors(placement, ranks, load)  # a Placement has every expert somewhere
    had = set()
    for rank, experts in zip(ranks, left.experts_of_rank, strict=True):
        before = placement.experts_of_rank[rank]
        assert experts[: len(before)] == before or len(ranks) == 1
        had |= set(before)
    new = [
        e
        for r, es in zip(ranks, left.experts_of_rank, strict=True)
        for e in es
        if e not in placement.experts_of_rank[r]
    ]
    assert sorted(new) == sorted(set(range(placement.num_experts)) - had)
    sizes = [len(placement.experts_of_rank[rank]) for rank in ranks]
    fullest = max(map(len, left.experts_of_rank))
    assert fullest <= max(max(sizes), -(-(sum(sizes) + len(new)) // len(ranks)))
