"""What a plan's verdict says, from made-up numbers."""

from dataclasses import replace

import pytest

from expertlane.report.plan import verdict
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.plan import PlannedDeployment, PlanResults
from expertlane.results.projection import Estimate, StepProjection
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout


def step(seconds: float, bound: float, extrapolated: float) -> StepProjection:
    return StepProjection(
        context=100,
        num_tokens=1,
        step_s=Estimate(seconds, seconds, seconds),
        tps=Estimate(1.0, 1.0, 1.0),
        shares={},
        floor_s=seconds,
        flops_utilisation=0.5,
        read_utilisation=0.5,
        basis_shares={"bound": bound, "fitted": 1 - bound},
        extrapolated_share=extrapolated,
        weight_bytes=1,
        fits=True,
    )


def planned(**changes) -> PlannedDeployment:
    one = Estimate(0.010, 0.009, 0.012)
    found = PlannedDeployment(
        layout=LayoutSizes.of(Layout(tp=2)),
        options=Options(),
        num_sequences=1,
        tps=Estimate(100.0, 90.0, 110.0),
        tpot_s=one,
        ttft_s=one,
        prefill_tps=one,
        why="",
        decode=step(0.008, 0.2, 0.2),
        prefill=step(0.050, 0.2, 0.2),
        weight_bytes=1,
        activation_bytes=1,
        sequence_bytes=1,
    )
    return replace(found, **changes)


def plan(best: PlannedDeployment, **changes) -> PlanResults:
    found = PlanResults(
        command="",
        created="",
        version="",
        model={},
        cluster="h100x2",
        device="H100",
        num_sequences=1,
        prompt_len=1,
        output_len=1,
        max_tpot_s=None,
        max_ttft_s=None,
        best=(best,),
        families={},
        pareto=(),
        papers={},
        two_pools=None,
        num_candidates=1,
        num_too_large=0,
        num_over_limits=0,
        num_pool_candidates=0,
        commands=(),
        experiment=None,
        assumptions=(),
    )
    return replace(found, **changes)


def test_one_is_not_many():
    text = " ".join(verdict(plan(planned())))
    assert "1 deployment of one pool" in text
    assert "with 1 sequence at once" in text


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("no split", "there is no way to split the devices"),
        ("too large", "the model does not fit both parts of any split"),
        ("over limits", "none keeps the limits"),
    ],
)
def test_why_there_are_no_two_pools(why, words):
    assert words in " ".join(verdict(plan(planned(), no_two_pools=why)))


def test_what_most_time_rests_on_is_said():
    assert "Most of the first one's time" not in " ".join(verdict(plan(planned())))
    # 8 of 10 ms are the decode step's: 0.8 × 0.7 + 0.2 × 0.2
    unsure = planned(decode=step(0.008, 0.7, 0.0))
    said = verdict(plan(unsure))[-1]
    assert (
        "Most of the first one's time rests on datasheets and assumptions alone (60%): trust"
        in said
    )
    beyond = verdict(plan(planned(decode=step(0.008, 0.0, 0.9))))[-1]
    assert (
        "Most of the first one's time lies outside the sizes that were ever measured (76%): trust"
        in beyond
    )


def test_cautions_are_part_of_the_verdict():
    assert verdict(plan(planned(), cautions=("Mind the step.",)))[-1] == "Mind the step."
