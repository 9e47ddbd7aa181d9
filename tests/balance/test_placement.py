import pytest

from expertlane.balance.placement import Placement


@pytest.mark.parametrize(
    ("num_experts", "ep", "experts_of_rank", "rank_of_expert"),
    [
        (4, 4, (range(1), range(1, 2), range(2, 3), range(3, 4)), [0, 1, 2, 3]),
        (4, 2, (range(2), range(2, 4)), [0, 0, 1, 1]),
        (5, 3, (range(2), range(2, 4), range(4, 5)), [0, 0, 1, 1, 2]),
        (3, 1, (range(3),), [0, 0, 0]),
        (1, 1, (range(1),), [0]),
        (1, 2, (range(1), range(1, 1)), [0]),
    ],
)
def test_linear_placement_by_hand(num_experts, ep, experts_of_rank, rank_of_expert):
    placement = Placement.linear(num_experts, ep)
    assert placement.experts_of_rank == experts_of_rank
    assert placement.rank_of_expert() == rank_of_expert


def test_sixteen_experts_on_three_ranks():
    placement = Placement.linear(16, 3)
    assert [len(experts) for experts in placement.experts_of_rank] == [6, 5, 5]
    assert placement.rank_of_expert() == [0] * 6 + [1] * 5 + [2] * 5
