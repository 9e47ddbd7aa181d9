"""Mistakes that are planted into measured results, and found again; corrections that carry over."""

from dataclasses import replace
from math import exp, log
from statistics import median

import pytest

from comparison.planted import Case, draw, results_of
from expertlane.comparison.judge import _cautions, judge
from expertlane.comparison.judged import COMPUTING, WHOLE, find_subject, points_of
from expertlane.comparison.reprojection import Reprojection
from expertlane.cost.laws.profile import Execution
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.results.estimate import NORMAL
from expertlane.results.record import DeploymentRecord
from expertlane.spec.names import ProjectedCause

HOST = Case(
    "host",
    "paper-small",
    "b200x16",
    Execution.EAGER,
    ("tp=8", "dp=8,ep=8"),
    64,
    128,
    True,
    11,
)


@pytest.fixture(scope="module")
def results():
    return results_of(HOST)


@pytest.fixture(scope="module")
def judgement(results):
    return judge([results], Progress())


def test_a_tripled_overhead_is_named(judgement):
    found = judgement
    assert found.likeliest == ("host",)
    assert found.candidates[0].factor == pytest.approx(3.0, rel=0.15)
    assert found.candidates[0].confidence > 0.9
    assert not found.is_noise


def test_all_deployments_are_told_as_measured(judgement, results):
    numbers = judgement.whole
    assert {each.deployment for each in numbers} == set(HOST.layouts)
    measured = {
        (record.name, f"{step.phase.value} step"): step.round_s.value
        for record in results.select("measured")
        for step in record.steps
    }
    for each in numbers:
        assert each.measured == pytest.approx(measured[each.deployment, each.where], rel=1e-6)
        assert each.projected > 0


def test_projected_numbers_are_those_of_the_projection(judgement, results):
    projected = {
        (record.name, step.phase): step.round_s.value
        for record in results.select("projected")
        for step in record.steps
    }
    for each in judgement.whole:
        (own,) = (
            seconds
            for (name, phase), seconds in projected.items()
            if (name, f"{phase.value} step") == (each.deployment, each.where)
        )
        assert each.projected == pytest.approx(own, rel=0.02)


def test_terms_add_up_to_the_step(judgement):
    for deployment in HOST.layouts:
        for where in ("decode step", "prefill step"):
            own = [
                each
                for each in judgement.numbers
                if (each.deployment, each.where) == (deployment, where)
            ]
            whole = next(each for each in own if each.metric in WHOLE)
            for of in ("measured", "projected"):
                terms = sum(getattr(each, of) for each in own if each.metric not in WHOLE)
                assert terms == pytest.approx(getattr(whole, of), rel=0.03)


def test_corrections_say_what_they_were_fitted_on(judgement):
    on = judgement.corrections.fitted_on
    assert on.deployments == HOST.layouts
    assert on.num_points == len(judgement.numbers)
    assert on.num_ranks == (8, 8)
    assert on.num_seqs == (64, 64)
    assert on.error_after < on.error_before
    assert "expertlane" in on.engine


def measured_half(results):
    """What was measured, without a word of a projection."""
    question = {key: each for key, each in results.question.items() if key != "projection"}
    return replace(results, deployments=results.select("measured"), cluster=None, question=question)


@pytest.mark.full
def test_measured_and_planned_results_may_be_two(results, judgement):
    planned = replace(results, deployments=results.select("projected"), machine=None)
    found = judge([measured_half(results), planned], Progress())
    assert found.candidates == judgement.candidates


@pytest.mark.full
def test_measured_results_alone_are_projected_as_a_plan_would():
    """On the cluster that is given, with graphs, which nothing measured says otherwise of."""
    measured = measured_half(results_of(replace(HOST, execution=Execution.GRAPH)))
    assert "host" in judge([measured], Progress(), "b200x16").likeliest


@pytest.mark.full
def test_causes_by_bound_count_as_computing(results):
    def by_bound(record: DeploymentRecord) -> DeploymentRecord:
        if record.source != "measured":
            return record
        steps = []
        for step in record.steps:
            causes = dict(step.breakdown_s)
            for old in ("attention", "router", "experts", "embedding and head"):
                seconds = causes.pop(old, 0.0)
                cause = ProjectedCause.WEIGHT_READS
                causes[cause] = causes.get(cause, 0.0) + seconds
            steps.append(replace(step, breakdown_s=causes))
        return replace(record, steps=tuple(steps))

    found = judge([results.changed(by_bound)], Progress())
    assert COMPUTING in {each.metric for each in found.numbers}
    assert found.likeliest == ("host",)


def test_a_workload_is_that_of_its_own_results():
    def without_context(record):
        return replace(record, steps=tuple(replace(each, context=None) for each in record.steps))

    for prompt_len in (128, 512):
        results = results_of(replace(HOST, prompt_len=prompt_len)).changed(without_context)
        (decode, prefill), _ = (point.steps for point in points_of(results))
        assert decode.size.num_cached == prompt_len + 3
        assert prefill.size.num_new == prompt_len


def test_noise_is_pooled_over_the_repetitions_of_all_deployments():
    def repeated(runs):
        def change(record):
            step, *_ = record.steps
            return replace(record, steps=(replace(step, tps_of_runs=runs[record.name]),))

        results = results_of(HOST).changed(change)
        return [point.steps[0].seconds for point in points_of(results)]

    # logarithms of the two are √½ off their mean: noise of 1
    two, one = repeated({"tp=8": (100.0, 100.0 * exp(2**0.5)), "dp=8,ep=8": (100.0,)})
    assert log(two.high / two.value) == pytest.approx(NORMAL * 1.25 / 2**0.5, rel=0.01)
    assert log(one.high / one.value) == pytest.approx(NORMAL * 1.25, rel=0.01)
    plain = repeated({"tp=8": (100.0,), "dp=8,ep=8": (100.0,)})
    assert all(each.low is None for each in plain)


def test_a_warm_prefix_cache_is_said():
    def warm(record):
        cached = tuple(replace(each, num_cached_tokens=4096) for each in record.serving)
        return replace(record, serving=cached)

    results = results_of(replace(HOST, layouts=("tp=8",), has_terms=False))
    for seen, num in ((results, 0), (results.changed(warm), 1)):
        said = [*_cautions([seen], points_of(seen))]
        assert len(said) == num
        assert all("50% of the prompt tokens of tp=8" in each for each in said)


def test_another_device_is_refused(results):
    machine = replace(results.machine, device="cpu")
    with pytest.raises(UserError, match="same device"):
        judge([replace(results, machine=machine)], Progress())


def test_nothing_measured_or_projected_is_refused(results):
    planned = replace(results, deployments=results.select("projected"), machine=None)
    with pytest.raises(UserError, match="no measured deployments"):
        judge([planned], Progress())
    question = {"experiment": results.question["experiment"]}
    measured = replace(
        results,
        deployments=results.select("measured"),
        question=question,
        cluster=None,
    )
    with pytest.raises(UserError, match="--cluster"):
        judge([measured], Progress())


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_the_right_assumption_is_named_from_causes(seed):
    case = draw(seed)
    assert judge([results_of(case)], Progress()).likeliest == (case.mistake,)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_from_whole_times_it_is_named_or_said_to_be_unclear(seed):
    case = draw(seed, has_terms=False)
    found = judge([results_of(case)], Progress())
    assert case.mistake in found.likeliest


@pytest.mark.full
def test_corrections_of_three_deployments_carry_over_to_others():
    """Corrections by three layouts, judged on three others."""
    link = replace(HOST, mistake="latency", execution=Execution.GRAPH)
    seen = replace(link, layouts=("tp=8", "dp=8,ep=8", "dp=16,ep=16"))
    others = replace(link, layouts=("tp=8,pp=2", "tp=4,dp=2,ep=8", "tp=4,dp=4,ep=16"), seed=12)
    fitted = judge([results_of(seen)], Progress()).corrections
    measured = results_of(others)
    subject = find_subject(measured, measured)
    reprojection = Reprojection(subject, points_of(measured))
    before = reprojection({})
    after = reprojection(reprojection.changes_of(fitted))
    whole = [at for at, each in enumerate(reprojection.numbers) if each.metric in WHOLE]
    errors = [
        median(abs(reprojection.measured.values[at] - values[at]) for at in whole)
        for values in (before, after)
    ]
    assert errors[1] < max(errors[0] / 2, 0.05)
