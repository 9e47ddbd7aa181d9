"""Two deployments from their repetitions, by hand."""

import numpy as np
import pytest

import example_results as example
from expertlane.comparison.records import Repetitions, pair_record
from expertlane.results.record import choose_compared
from expertlane.spec.names import Cause, Phase


def repeated(tps, experts_s):
    return Repetitions(tuple(tps), tuple({Cause.EXPERTS: each} for each in experts_s))


def test_means_without_each_repetition():
    found = repeated([1.0, 1 / 2, 1 / 3], [1.0, 2.0, 3.0]).without_each()
    assert [1 / each for each in found.tps] == pytest.approx([2.5, 2.0, 1.5])
    assert [each[Cause.EXPERTS] for each in found.causes_s] == pytest.approx([2.5, 2.0, 1.5])


def test_what_stands_for_the_two_that_a_repetition_takes_part_in():
    """Repetitions of seconds [n] that take the lesser of themselves and the next one's.

    The mean without one is what would be found had it never been run.
    """

    def least(seconds):
        return np.minimum(seconds, np.roll(seconds, -1))

    seconds = np.array([4.0, 1.0, 3.0, 5.0, 2.0])
    around = np.minimum(np.roll(seconds, 1), np.roll(seconds, -1))
    found = repeated(1 / least(seconds), least(seconds)).without_each(repeated(1 / around, around))
    expected = [least(np.delete(seconds, place)).mean() for place in range(5)]
    assert [1 / each for each in found.tps] == pytest.approx(expected)
    assert [each[Cause.EXPERTS] for each in found.causes_s] == pytest.approx(expected)


def test_one_repetition_cannot_be_left_out():
    only = repeated([1.0], [1.0])
    assert only.without_each() is only


def test_in_wall_time_by_pairs_of_repetitions():
    """Both get slower together; the ratio does not change much."""
    one = repeated([10.0, 9.0, 8.0, 7.0, 6.0], [1.0, 1.1, 1.2, 1.3, 1.4])
    other = repeated([5.0, 4.0, 4.0, 3.5, 3.2], [3.0, 3.2, 3.2, 3.3, 3.3])
    found = pair_record(("a", "b"), Phase.DECODE, (one, other))
    assert (found.source, found.name, found.other, found.num_runs) == ("measured", "a", "b", 5)
    assert found.ratio.bounds == pytest.approx((6 / 3.2, 2.0, 2.25))
    assert found.is_significant
    assert found.causes_s[Cause.EXPERTS].bounds == pytest.approx((-2.1, -2.0, -1.9))


def test_in_virtual_time_around_the_figures_of_all_repetitions():
    records = [example.record(example.EXPERT, 0.1), example.record(example.TENSOR, 0.11)]
    first, second = steps = tuple(each.decode for each in records)
    even = Repetitions((first.tps.value,) * 5, (first.breakdown_s,) * 5)
    uneven = Repetitions(
        tuple(second.tps.value * each for each in (1.0, 1.1, 0.9, 1.0, 1.0)),
        (second.breakdown_s,) * 5,
    )
    found = pair_record(("a", "b"), Phase.DECODE, (even, uneven), steps)
    assert found.ratio.value == pytest.approx(1.1)
    assert not found.is_significant
    sure = pair_record(("a", "b"), Phase.DECODE, (even, even), steps)
    assert sure.ratio.low == pytest.approx(sure.ratio.value)
    difference = sum(each.value for each in found.causes_s.values())
    assert difference == pytest.approx(found.step_s - found.other_step_s)
    assert (found.step_s, found.other_step_s) == (first.round_s.value, second.round_s.value)


def records(*kinds):
    """Proposals and baselines."""
    of_kind = {"proposal": example.EXPERT, "baseline": example.TENSOR}
    return [example.record(of_kind[kind], 0.1) for kind in kinds]


@pytest.mark.parametrize(
    ("kinds", "tps", "compared"),
    [
        (["baseline", "baseline", "proposal", "proposal"], [1, 3, 4, 2], (2, 1, 0)),
        (["baseline", "baseline", "proposal", "proposal"], [1, 9, 4, 2], (2, 1, 0)),  # the slower
        (["baseline", "baseline", "proposal", "proposal"], [3, 1, 4, 9], (3, 0)),  # best and first
        (["proposal"] * 3, [1, 2, 3], (2, 1, 0)),  # the fastest, the next and the first
        (["proposal"] * 3, [3, 1, 2], (0, 2)),  # where it is the first
        (["baseline"] * 2, [2, 1], (0, 1)),
        (["baseline"], [1], ()),
    ],
)
def test_which_are_compared(kinds, tps, compared):
    assert choose_compared(records(*kinds), tps) == compared
