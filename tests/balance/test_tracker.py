import numpy as np
import pytest

from expertlane.balance.rebalance import LoadTracker


@pytest.mark.parametrize("window", [1, 2, 3, 7, 20])
def test_it_sums_the_last_steps(window):
    steps = np.random.default_rng(0).integers(0, 100, size=(10, 2, 3))
    tracker = LoadTracker(2, 3, window)
    np.testing.assert_array_equal(tracker.load(), np.zeros((2, 3)))
    for num_added, step in enumerate(steps, start=1):
        tracker.add(step)
        first = max(0, num_added - window)
        np.testing.assert_array_equal(tracker.load(), steps[first:num_added].sum(axis=0))
        assert tracker.num_steps == min(num_added, window)


def test_what_it_gives_and_takes_is_a_copy():
    tracker = LoadTracker(1, 2, 2)
    step = np.array([[1, 2]])
    tracker.add(step)
    step[:] = 9
    load = tracker.load()
    load[:] = 7
    tracker.add(np.array([[1, 1]]))
    tracker.add(np.array([[0, 0]]))  # the first step leaves the window
    np.testing.assert_array_equal(tracker.load(), [[1, 1]])
