from dataclasses import replace

import pytest

import example_results as example
from expertlane.report.compared import OTHER, run, step_difference
from expertlane.spec.names import Cause


def two_rows(slow_s, fast_s):
    """Two deployments with these seconds a step by cause."""
    results = example.results([(example.TENSOR, 0.2), (example.EXPERT, 0.1)])
    slower, faster = run(results, "measured").rows
    return tuple(
        replace(row, step=replace(row.step, breakdown_s=of_causes))
        for row, of_causes in ((slower, slow_s), (faster, fast_s))
    )


def test_what_is_saved_comes_first_then_what_is_added():
    found = step_difference(
        *two_rows(
            {Cause.PIPELINE_BUBBLE: 0.060, Cause.TP_COLLECTIVES: 0.020, Cause.EXPERTS: 0.040},
            {Cause.DISPATCH_COMBINE: 0.022, Cause.EXPERTS: 0.030, Cause.WAITING: 0.025},
        )
    )
    assert (found.slower_ms, found.faster_ms) == pytest.approx((120, 77))
    assert [cause for cause, _ in found.causes] == [
        Cause.PIPELINE_BUBBLE,
        Cause.TP_COLLECTIVES,
        Cause.EXPERTS,
        Cause.WAITING,
        Cause.DISPATCH_COMBINE,
    ]
    assert [ms for _, ms in found.causes] == pytest.approx([-60, -20, -10, 25, 22])


def test_the_small_ones_are_added_up_and_all_sum_to_the_difference():
    found = step_difference(
        *two_rows(
            {Cause.EXPERTS: 0.090, Cause.ROUTER: 0.0100, Cause.HEAD: 0.001},
            {Cause.EXPERTS: 0.050, Cause.ROUTER: 0.0105, Cause.HEAD: 0.0013},
        )
    )
    assert [cause for cause, _ in found.causes] == [Cause.EXPERTS, OTHER]
    assert found.causes[1][1] == pytest.approx(0.8)
    assert sum(ms for _, ms in found.causes) == pytest.approx(found.faster_ms - found.slower_ms)


def test_equal_steps_differ_in_nothing():
    assert step_difference(*two_rows({Cause.EXPERTS: 0.1}, {Cause.EXPERTS: 0.1})).causes == ()


def test_a_made_up_comparison():
    slower, faster = run(example.usual(), "measured").rows[1::2]
    found = step_difference(slower, faster)
    assert found.slower_ms == pytest.approx(1e3 * slower.step.round_s.value)
    assert found.faster_ms == pytest.approx(1e3 * faster.step.round_s.value)
