"""What a plan's verdict says, from made-up numbers."""

from dataclasses import replace

import pytest

from example_plan import PLAN, planned
from example_projection import step
from expertlane.report.planning import verdict
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import BEST, DeploymentRecord, StepsRecord
from expertlane.results.results import Results
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


def one(decode: StepsRecord | None = None) -> DeploymentRecord:
    """A single sequence with a TPOT of 10 ms; a decode step takes 8 of them, a prefill step 50."""
    found = planned(Layout(tp=2), 100, BEST)
    tpot_s = Summary(mean=Estimate(0.010, 0.009, 0.012))
    serving = replace(found.serving[0], num_running=1, tpot_s=tpot_s)
    prefill = replace(timed(50, 0.2, 0.2), phase=Phase.PREFILL)
    return replace(found, serving=(serving,), steps=(prefill, decode or timed(8, 0.2, 0.2)))


def timed(step_ms: float, bound: float, extrapolated: float) -> StepsRecord:
    shares = {"bound": bound, "fitted": 1 - bound}
    return replace(step(step_ms, 100), basis_shares=shares, extrapolated_share=extrapolated)


def plan(best: DeploymentRecord, **changes) -> Results:
    summary = replace(PLAN.plans[0], num_candidates=1, **changes)
    return replace(PLAN, deployments=(best,), plans=(summary,))


def test_one_is_not_many():
    text = " ".join(verdict(plan(one())))
    assert "1 deployment aggregated" in text
    assert "with 1 sequence at once" in text


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("no split", "the devices cannot be split"),
        ("too large", "the model does not fit both pools of any split"),
        ("over limits", "none meets the limits"),
    ],
)
def test_why_there_are_no_two_pools(why, words):
    assert words in " ".join(verdict(plan(one(), no_two_pools=why)))


def test_what_most_time_rests_on_is_said():
    assert "Most of the first one's time" not in " ".join(verdict(plan(one())))
    # 8 of 10 ms are the decode step's: 0.8 × 0.7 + 0.2 × 0.2
    unsure = one(timed(8, 0.7, 0.0))
    said = verdict(plan(unsure))[-1]
    assert "Most of the time of #1 rests on datasheets and assumptions (60%): rankings" in said
    beyond = verdict(plan(one(timed(8, 0.0, 0.9))))[-1]
    assert "Most of the time of #1 lies outside the measured sizes (76%): rankings" in beyond


def test_cautions_are_part_of_the_verdict():
    assert verdict(replace(plan(one()), cautions=("Mind the step.",)))[-1] == "Mind the step."
