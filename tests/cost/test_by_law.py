"""A step on more clocks: each with one law's error at its low or at its high."""

from dataclasses import replace

import numpy as np
import pytest

from expertlane.cost.laws.profile import (
    ASSUMED_DP_SYNC,
    BOUNDS,
    LIKELY,
    ModelledCluster,
    Terms,
    read_profile,
)
from expertlane.cost.projector import Projector, StepSize
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from planner.requests import MIXED, setting_of

SIZE = StepSize(64, 1, 600)
LAYOUT = Layout.parse("dp=2,tp=2,ep=4")


def projector(profile, layout=LAYOUT, dtype="bfloat16", **options) -> Projector:
    cluster = ModelledCluster(profile, layout.world_size)
    return Projector(MIXED, layout, Options(**options), cluster, setting_of(MIXED, dtype))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=2,tp=2,ep=4", {}),
        ("dp=2,tp=2,ep=4", {"overlap": True}),
        ("pp=2,tp=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}),
    ],
)
def test_the_step_is_the_same_with_more_clocks(layout, options):
    made = projector(read_profile("h100"), Layout.parse(layout), **options)
    step, by_error = made.step_by_error(SIZE)
    assert step == made.step(SIZE)
    low, likely, high = step.round_s.bounds
    for at_low, at_high in by_error.values():
        assert low * (1 - 1e-9) <= at_low <= likely * (1 + 1e-9)
        assert likely * (1 - 1e-9) <= at_high <= high * (1 + 1e-9)


@pytest.mark.parametrize("bound", [0, 1])
def test_a_term_at_its_bound(bound):
    profile = read_profile("h100")
    term = profile.terms["driver_s"]
    moved = replace(term, value=(term.low, term.high)[bound])
    _, by_error = projector(profile).step_by_error(SIZE)
    other = replace(profile, terms={**profile.terms, "driver_s": moved})
    step_s = projector(other).step(SIZE).round_s.value
    assert by_error["driver_s", ()][bound] == pytest.approx(step_s)


def test_a_fitted_law_errs_for_alike_sizes_alone():
    profile = read_profile("h100")
    law = profile.surfaces["experts.bfloat16"]
    _, by_error = projector(profile).step_by_error(SIZE)
    of_law = {error for error in by_error if error[0] == "experts.bfloat16"}
    (error,) = of_law  # all MoE layers are alike
    assert error[1]
    slower = replace(law, correction=law.correction + np.log(law.high))
    other = replace(profile, surfaces={**profile.surfaces, "experts.bfloat16": slower})
    assert by_error[error][1] == pytest.approx(projector(other).step(SIZE).round_s.value, rel=0.01)
    of_gemm = {error for error in by_error if error[0] == "gemm.bfloat16"}
    assert len(of_gemm) > 1  # one of each size


def test_a_law_that_stands_in_errs_as_a_whole_too():
    _, by_error = projector(read_profile("h100pcie")).step_by_error(SIZE)
    assert {("gemm.bfloat16", ()), ("experts.bfloat16", ())} <= set(by_error)
    wider = 1.5
    _, of_h100 = projector(read_profile("h100")).step_by_error(SIZE)
    assert ("gemm.bfloat16", ()) not in of_h100
    profile = read_profile("h100pcie")
    assert profile.surfaces["gemm.bfloat16"].wider == wider
    _, of_twin = projector(read_profile("h100"), dtype="float16").step_by_error(SIZE)
    assert ("gemm.float16", ()) in of_twin


def test_contention_has_an_error_of_its_own():
    _, by_error = projector(read_profile("h100"), overlap=True).step_by_error(SIZE)
    (name,) = (error for error in by_error if "hiding" in error[0])
    at_low, at_high = by_error[name]
    assert at_low < at_high
    assert len(BOUNDS) == 3


@pytest.mark.parametrize("layout", ["tp=1", "dp=2,tp=2,ep=4", "pp=2,tp=2"])
@pytest.mark.parametrize("cluster", ["h100", "cpu"])
def test_the_breakdown_has_the_driver_between_two_steps(layout, cluster):
    profile = read_profile("h100")
    if cluster == "cpu":  # where all is in series
        profile = replace(profile, terms={**profile.terms, "overhead_s": profile.terms["launch_s"]})
    made = projector(profile, Layout.parse(layout))
    step = made.step(SIZE)
    wanted = Terms.of(profile, made._setting.execution).step_s(Layout.parse(layout))[LIKELY]
    assert step.breakdown_s["scheduler overhead"] == pytest.approx(wanted, rel=1e-6)
    assert sum(step.breakdown_s.values()) == pytest.approx(step.round_s.value)
    rest = projector(_without_driver(profile), Layout.parse(layout)).step(SIZE)
    assert rest.breakdown_s["scheduler overhead"] == pytest.approx(0.0, abs=1e-9)
    for cause, seconds in rest.breakdown_s.items():
        if cause != "scheduler overhead":
            assert step.breakdown_s[cause] == pytest.approx(seconds, rel=1e-6, abs=1e-9), cause


def _without_driver(profile):
    known = {"dp_sync_s": ASSUMED_DP_SYNC, **profile.terms}
    none = {
        name: replace(known[name], value=0.0, low=0.0, high=0.0)
        for name in ("driver_s", "driver_per_rank_s", "dp_sync_s")
        if name in known
    }
    return replace(profile, terms={**profile.terms, **none})
