"""Intervals of few repetitions: by hand, by properties, and by how often simulated truth is inside.

Simulations have fixed seeds, so their shares of hits never change.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.results.estimate import (
    LEAST_RUNS,
    Estimate,
    is_told_apart,
    jackknife_difference,
    jackknife_interval,
    median_interval,
    ratio_interval,
)

POSITIVE = st.floats(min_value=1e-3, max_value=1e6)
RUNS = st.lists(POSITIVE, min_size=LEAST_RUNS, max_size=30)
NUM_SAMPLES = 4000


@pytest.mark.parametrize(
    ("num", "outside"), [(5, 0), (6, 0), (7, 0), (8, 1), (10, 1), (11, 2), (20, 5), (40, 14)]
)
def test_the_places_of_the_binomial_tables(num, outside):
    values = list(range(num))
    found = median_interval(values)
    assert (found.low, found.high) == (outside, num - 1 - outside)
    assert found.value == (num - 1) / 2


@pytest.mark.parametrize("num", range(1, LEAST_RUNS))
def test_too_few_have_no_interval(num):
    values = [1.0 + place for place in range(num)]
    for found in (
        median_interval(values),
        ratio_interval(values, values),
        jackknife_interval(1.0, values),
        jackknife_difference(1.0, values),
    ):
        assert (found.low, found.high) == (None, None)
        assert not is_told_apart(found, 0.0)


@given(RUNS)
def test_an_interval_holds_its_value_whatever_the_order(values):
    found = median_interval(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)
    assert median_interval(values[::-1]) == found
    doubled = median_interval([2 * each for each in values])
    assert doubled.bounds == tuple(2 * each for each in found.bounds)


@given(RUNS, POSITIVE)
def test_what_slows_down_both_of_a_pair_cancels(values, factor):
    others = [each * factor for each in values]
    found = ratio_interval(others, values)
    assert found.bounds == pytest.approx((factor,) * 3)


@given(RUNS)
def test_jackknife_is_wider_the_more_one_repetition_matters(values):
    found = jackknife_interval(1.0, values)
    assert 0 <= found.low <= 1 <= found.high
    assert found.low * found.high == pytest.approx(1) or found.low == 0
    assert jackknife_interval(3.0, [2.0] * len(values)).bounds == pytest.approx((3.0,) * 3)


def test_jackknife_of_a_mean_is_students_prediction_of_another_mean():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    without = [np.delete(values, place).mean() for place in range(5)]
    found = jackknife_difference(values.mean(), without)
    margin = 2.132 * values.std(ddof=1) * math.sqrt(1 / 5 + 1 / 5)
    assert found.bounds == pytest.approx((6.2 - margin, 6.2, 6.2 + margin))


@pytest.mark.parametrize(
    ("low", "high", "is_told"), [(1.01, 1.2, True), (0.8, 0.99, True), (0.99, 1.1, False)]
)
def test_told_apart_where_the_interval_leaves_out_one(low, high, is_told):
    assert is_told_apart(Estimate((low + high) / 2, low, high), 1.0) is is_told


def noise(name, random, shape):
    """Factors around a median of 1."""
    if name == "normal":
        return np.exp(random.normal(0, 0.05, shape))
    if name == "one-sided":  # some are disturbed
        return 1 + random.exponential(0.05, shape) - 0.05 * math.log(2)
    return np.exp(0.02 * random.standard_t(2, shape))


@pytest.mark.parametrize("name", ["normal", "one-sided", "heavy tails"])
@pytest.mark.parametrize("num", [5, 6, 7])
def test_the_true_median_is_inside_nine_times_of_ten_or_more(name, num):
    random = np.random.default_rng(num)
    samples = noise(name, random, (NUM_SAMPLES, num))
    found = [median_interval(each.tolist()) for each in samples]
    share = np.mean([each.low <= 1 <= each.high for each in found])
    assert 0.90 <= share <= 0.995
    share = np.mean([is_told_apart(each, 1.0) for each in found])
    assert share <= 0.10  # and so rarely a difference is claimed that is none


@pytest.mark.parametrize("num", [5, 6, 7])
def test_a_ratio_of_pairs_that_drift_together_is_inside(num):
    random = np.random.default_rng(num)
    hits, widths, single = [], [], []
    for _ in range(NUM_SAMPLES):
        drift = np.cumsum(random.normal(0, 0.1, num))
        pair = np.exp(drift + random.normal(0, 0.02, (2, num)))
        found = ratio_interval((1.06 * pair[0]).tolist(), pair[1].tolist())
        hits.append(found.low <= 1.06 <= found.high)
        widths.append(found.high - found.low)
        single.append(np.ptp(pair[0]))
    assert 0.90 <= np.mean(hits) <= 0.995
    assert np.median(widths) < np.median(single) / 2


@pytest.mark.parametrize("num", [5, 6, 7])
@pytest.mark.parametrize("shared", [0.0, 0.03])
def test_what_virtual_time_takes_repeats_within_its_intervals(num, shared):
    """A sum over operations: of the lesser of each repetition and the next.

    The share of figures inside another measurement's interval, since that is what a user sees who
    measures twice.

    Args:
        shared: how far a slow repetition slows down all operations.
    """
    random = np.random.default_rng(num)

    def figure(operations):
        return np.minimum(operations, np.roll(operations, -1, axis=0)).sum(axis=1).mean()

    found = []
    for _ in range(400):
        slow = 1 + shared * random.exponential(size=(num, 1))
        operations = slow * (1 + random.exponential(0.2, (num, 100)))
        without = [figure(np.delete(operations, place, axis=0)) for place in range(num)]
        found.append(jackknife_interval(figure(operations), without))
    values = np.array([each.value for each in found])
    inside = np.mean([(each.low <= values) & (values <= each.high) for each in found])
    assert 0.85 <= inside <= 0.98
