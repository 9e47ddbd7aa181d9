import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.balance.placement import Placement, max_over_mean
from expertlane.errors import SpecError
from expertlane.spec.layout import partition


@pytest.mark.parametrize(
    ("num_experts", "ep", "num_redundant", "experts_of_rank"),
    [
        (4, 4, 0, ((0,), (1,), (2,), (3,))),
        (4, 2, 0, ((0, 1), (2, 3))),
        (5, 3, 0, ((0, 1), (2, 3), (4,))),
        (3, 1, 0, ((0, 1, 2),)),
        (1, 1, 0, ((0,),)),
        (1, 2, 0, ((0,), (0,))),  # more ranks than experts: copies fill them
        (4, 2, 2, ((0, 1, 2), (3, 0, 1))),
        (3, 2, 3, ((0, 1, 2), (0, 1, 2))),
    ],
)
def test_linear_by_hand(num_experts, ep, num_redundant, experts_of_rank):
    placement = Placement.linear(num_experts, ep, num_redundant)
    assert placement.experts_of_rank == experts_of_rank


@pytest.mark.parametrize(
    ("num_experts", "ep", "num_redundant", "experts_of_rank"),
    [
        (4, 2, 0, ((0, 2), (1, 3))),
        (5, 3, 0, ((0, 3), (1, 4), (2,))),
        (3, 5, 0, ((0,), (1,), (2,), (0,), (1,))),
        (4, 2, 1, ((0, 2, 1), (0, 3))),  # 0 can only go to the full rank 1, which hands 1 over
        (5, 3, 2, ((0, 3, 1), (1, 4), (2, 0))),
    ],
)
def test_round_robin_by_hand(num_experts, ep, num_redundant, experts_of_rank):
    placement = Placement.round_robin(num_experts, ep, num_redundant)
    assert placement.experts_of_rank == experts_of_rank


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
@pytest.mark.parametrize("make", [Placement.linear, Placement.round_robin])
def test_slots_are_near_equal_and_hold_all(make, data, num_experts, ep):
    num_redundant = data.draw(st.integers(0, num_experts * ep - num_experts))
    placement = make(num_experts, ep, num_redundant)

    num_slots = max(num_experts + num_redundant, ep)
    assert placement.num_slots == num_slots
    assert list(map(len, placement.experts_of_rank)) == list(map(len, partition(num_slots, ep)))
    copies = [len(ranks) for ranks in placement.ranks_of_experts()]
    assert max(copies) - min(copies) <= 1


def test_tables_by_hand():
    placement = Placement(3, ((2, 0), (1,), (0, 1)))
    assert (placement.ep, placement.num_slots) == (3, 5)
    assert placement.ranks_of_experts() == [[0, 2], [1, 2], [0]]
    np.testing.assert_array_equal(placement.slots(), [[1, -1, 0], [-1, 0, -1], [0, 1, -1]])


@pytest.mark.parametrize(
    ("experts_of_rank", "message"),
    [
        (((0, 1), ()), "rank 1 expert"),
        (((0, 1), (2,)), "rank 1 expert 2 experts 0"),
        (((0, -1), (1,)), "rank 0 expert -1 experts 1"),
        (((0, 1, 0), (1,)), "rank 0 expert twice"),
        (((0,), (0,)), "rank expert 1"),
    ],
)
def test_what_is_no_placement(experts_of_rank, message):
    with pytest.raises(SpecError, match=telling(message)):
        Placement(2, experts_of_rank)


@pytest.mark.parametrize(("num_experts", "shown"), [(4, "4"), (10**15, "1,000,000,000,000,000")])
def test_more_experts_than_slots(num_experts, shown):
    with pytest.raises(SpecError, match=telling(f"placement {shown} 3 slots 2 ranks")):
        Placement(num_experts, ((0, 1), (2,)))


@pytest.mark.parametrize("make", [Placement.linear, Placement.round_robin])
def test_too_many_copies(make):
    with pytest.raises(SpecError, match=telling("9 experts 2 ranks 4")):
        make(4, 2, 5)


def test_imbalance_is_the_fullest_over_the_mean_layer_by_layer():
    num_tokens = np.array([[8, 0, 0, 0], [6, 2, 6, 2], [5, 5, 5, 5], [0, 0, 0, 0]])
    np.testing.assert_array_equal(max_over_mean(num_tokens), [4.0, 1.5, 1.0, 0.0])
    assert max_over_mean(np.zeros((0, 4), dtype=np.int64)).shape == (0,)
