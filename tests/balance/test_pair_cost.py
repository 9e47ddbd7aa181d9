import numpy as np
import pytest

from expertlane.balance.rebalance import PairCost


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
