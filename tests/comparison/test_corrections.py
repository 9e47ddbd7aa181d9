"""Corrections fitted to measured results with a planted mistake, and the carry-over to others."""

from dataclasses import replace
from math import exp, log
from statistics import median

import pytest

from comparison.planted import MISTAKES, Case, results_of
from expertlane.comparison.corrections import fit_corrections
from expertlane.comparison.points import WHOLE, find_subject, points_of
from expertlane.comparison.reprojection import Reprojection
from expertlane.cost.laws.profile import Execution
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.results.estimate import NORMAL
from expertlane.results.record import ServerRecord

HOST = Case(
    "host",
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


def fit(results, *more):
    return fit_corrections(results, Progress(), *more)


@pytest.fixture(scope="module")
def fitted(results):
    return fit([results])


def test_a_tripled_overhead_is_corrected(fitted):
    assert fitted.factors["host"].factor == pytest.approx(3.0, rel=0.15)
    others = {name: each.factor for name, each in fitted.factors.items() if name != "host"}
    assert all(0.5 < factor < 2 for factor in others.values()), others


def test_corrections_name_what_they_were_fitted_to(fitted, results):
    on = fitted.fitted_on
    assert on.deployments == HOST.layouts
    assert on.num_points > 4  # two steps of each, and their parts
    assert (on.num_ranks, on.num_seqs) == ((8, 8), (64, 64))
    assert on.error_before > 0.2
    assert on.error_after < on.error_before / 4
    assert "expertlane" in on.engine
    assert on.created == results.created


def test_uncorrected_numbers_are_those_of_the_projection(results):
    reprojection = Reprojection(find_subject(results, results), points_of(results))
    projected = {
        (record.name, f"{step.phase.value} step"): step.round_s.value
        for record in results.select("projected")
        for step in record.steps
    }
    values = reprojection({})
    for at, each in enumerate(reprojection.numbers):
        if each.metric in WHOLE:
            name = reprojection.points[each.place].record.name
            assert exp(values[at]) == pytest.approx(projected[name, each.where], rel=0.02)


def test_parts_add_up_to_the_step(results):
    reprojection = Reprojection(find_subject(results, results), points_of(results))
    projected = reprojection({})
    for of in ("measured", "projected"):
        whole, parts = {}, {}
        for at, each in enumerate(reprojection.numbers):
            value = each.measured if of == "measured" else projected[at]
            key, seconds = (each.place, each.where), reprojection.shown(each, value)
            if each.metric in WHOLE:
                whole[key] = seconds
            else:
                parts[key] = parts.get(key, 0.0) + seconds
        assert parts == pytest.approx(whole, rel=0.03)


def measured_half(results):
    """What was measured, without a word of a projection."""
    question = {key: each for key, each in results.question.items() if key != "projection"}
    return replace(results, deployments=results.select("measured"), cluster=None, question=question)


@pytest.mark.full
def test_measured_and_planned_results_may_be_two(results, fitted):
    planned = replace(results, deployments=results.select("projected"), machine=None)
    assert fit([measured_half(results), planned]).factors == fitted.factors


@pytest.mark.full
def test_measured_results_alone_are_projected_as_a_plan_would():
    """On the cluster that is given, with graphs: nothing measured names the execution."""
    measured = measured_half(results_of(replace(HOST, execution=Execution.GRAPH)))
    assert fit([measured], "b200x16").factors["host"].factor > 2


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


def test_another_device_is_refused(results):
    machine = replace(results.machine, device="cpu")
    with pytest.raises(UserError, match="same device"):
        fit([replace(results, machine=machine)])


def test_nothing_measured_or_projected_is_refused(results):
    planned = replace(results, deployments=results.select("projected"), machine=None)
    with pytest.raises(UserError, match="no measured deployments"):
        fit([planned])
    question = {"experiment": results.question["experiment"]}
    measured = replace(
        results,
        deployments=results.select("measured"),
        question=question,
        cluster=None,
    )
    with pytest.raises(UserError, match="--cluster"):
        fit([measured])


@pytest.mark.parametrize(
    ("engine", "message"),
    [(None, "on several engines, vLLM, SGLang"), ("trt", "measured: vLLM, SGLang")],
)
def test_several_engines_are_refused(results, engine, message):
    names = dict(zip(HOST.layouts, ("vLLM", "SGLang"), strict=True))

    def served(record):
        return replace(record, server=ServerRecord(names[record.name]))

    with pytest.raises(UserError, match=message):
        fit([results.changed(served)], None, engine)


@pytest.mark.full
@pytest.mark.parametrize("has_terms", [True, False])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_corrections_halve_the_error_of_a_planted_mistake(mistake, has_terms):
    layouts = ("tp=8,pp=2", "dp=16,ep=16")
    case = replace(HOST, mistake=mistake, layouts=layouts, prompt_len=512, has_terms=has_terms)
    on = fit([results_of(case)]).fitted_on
    assert on.error_after < max(on.error_before / 2, 0.05)


@pytest.mark.full
def test_corrections_of_three_deployments_carry_over_to_others():
    """Corrections by three layouts, judged on three others."""
    link = replace(HOST, mistake="latency", execution=Execution.GRAPH)
    seen = replace(link, layouts=("tp=8", "dp=8,ep=8", "dp=16,ep=16"))
    others = replace(link, layouts=("tp=8,pp=2", "tp=4,dp=2,ep=8", "tp=4,dp=4,ep=16"), seed=12)
    fitted = fit([results_of(seen)])
    measured = results_of(others)
    subject = find_subject(measured, measured)
    reprojection = Reprojection(subject, points_of(measured))
    before = reprojection({})
    changes = {name: log(each.factor) for name, each in fitted.factors.items() if name != "skew"}
    after = reprojection(changes)
    whole = [at for at, each in enumerate(reprojection.numbers) if each.metric in WHOLE]
    errors = [
        median(abs(reprojection.measured.values[at] - values[at]) for at in whole)
        for values in (before, after)
    ]
    assert errors[1] < max(errors[0] / 2, 0.05)
