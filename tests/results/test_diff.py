"""What changed between two results: pairs, intervals, verdicts, and what cannot be compared."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import example_pages
import example_results
from cli.screen import telling
from example_plan import PLAN
from example_results import EXPERT, TENSOR
from example_simulation import SIMULATION
from expertlane.errors import UserError
from expertlane.report.diff import report_of_difference
from expertlane.results.diff import Difference, difference
from expertlane.results.estimate import Estimate
from expertlane.results.results import Results


def diff(first: Results, second: Results, threshold: float = 0.05) -> Difference:
    return difference(first, second, ("A", "B"), threshold)


def measured(*step_s: float, runs: float | None = None, num_runs: int = 3) -> Results:
    """Two deployments with these step times; with repetitions that differ by a share if given."""
    found = example_results.results(list(zip((TENSOR, EXPERT), step_s, strict=True)))
    if runs is None:
        return found
    deployments = [
        replace(
            record,
            steps=tuple(
                replace(
                    step,
                    tps_of_runs=tuple(
                        step.tps.value * (1 + each)
                        for each in np.linspace(-runs, runs, num_runs).tolist()
                    ),
                )
                for step in record.steps
            ),
        )
        for record in found.deployments
    ]
    return replace(found, deployments=tuple(deployments))


def served(*tps: Estimate) -> Results:
    """A simulation of one load."""
    (record,) = SIMULATION.deployments
    serving = tuple(replace(record.serving[0], output_tps=each) for each in tps)
    return replace(SIMULATION, deployments=(replace(record, serving=serving),))


def test_a_deployment_that_got_slower_beyond_its_noise_is_a_regression():
    before, after = (measured(0.4, each, runs=0.01) for each in (0.1, 0.125))
    found = diff(before, after)
    changed = found.of_verdict("slower")
    assert [(each.deployment, each.where) for each in changed] == [
        ("EP 16", "prefill"),
        ("EP 16", "decode"),
    ]
    assert found.regressions == changed
    assert changed[1].gain == pytest.approx(-0.2)
    assert changed[1].ratio is not None
    assert changed[1].ratio.bounds == pytest.approx((0.8 * 0.99 / 1.01, 0.8, 0.8 * 1.01 / 0.99))
    assert not diff(after, before).regressions


@pytest.mark.parametrize(
    ("step_s", "runs", "threshold", "verdict", "is_regression"),
    [
        (0.125, 0.15, 0.05, "not significant", False),
        (0.103, 0.001, 0.05, "slower", False),  # beyond the noise, within the threshold
        (0.103, 0.001, 0.02, "slower", True),
        (0.2, None, 0.05, "noise unknown", False),
    ],
)
def test_a_regression_is_beyond_noise_and_threshold(
    step_s, runs, threshold, verdict, is_regression
):
    found = diff(measured(0.4, 0.1, runs=runs), measured(0.4, step_s, runs=runs), threshold)
    assert found.changes[-1].verdict == verdict
    assert bool(found.regressions) == is_regression


@pytest.mark.parametrize(
    ("num_runs", "busy", "is_known"),
    [
        ((2, 2), 0, False),
        ((2, 3), 0, False),
        ((3, 3), 0.049, True),
        ((2, 5), 0, True),
        ((5, 5), 0, True),
        ((3, 3), 0.05, False),
    ],
)
def test_noise_is_known_of_repetitions_on_a_quiet_machine(num_runs, busy, is_known):
    first, second = (
        measured(0.4, step_s, runs=0.01, num_runs=num)
        for step_s, num in zip((0.1, 0.2), num_runs, strict=True)
    )
    found = diff(first, replace(second, foreign_cpu_share=busy))
    assert found.changes[-1].verdict == ("slower" if is_known else "noise unknown")
    assert bool(found.regressions) == is_known


def test_projections_do_not_depend_on_a_busy_machine():
    busy = replace(served(Estimate(50.0)), foreign_cpu_share=0.5)
    assert diff(served(Estimate(100.0)), busy).regressions


_TURNED = {"faster": "slower", "slower": "faster", "only in A": "only in B"}
_TURNED |= {after: before for before, after in _TURNED.items()}


@st.composite
def _drawn_results(draw: st.DrawFn) -> Results:
    """Results of one command: measured, simulated or planned; times in steps of 1 %."""
    size = st.integers(50, 150).map(lambda percent: percent / 100)
    kind = draw(st.sampled_from(["measured", "served", "plan"]))
    if kind == "served":
        values = draw(st.lists(size, min_size=1, max_size=1))
        bounds = [draw(st.sampled_from([(None, None), (0.9, 1.1), (0.5, 1.2)])) for _ in values]
        return served(
            *(
                Estimate(each, *(None if bound is None else each * bound for bound in ends))
                for each, ends in zip(values, bounds, strict=True)
            )
        )
    if kind == "plan":
        records = draw(st.lists(st.sampled_from(PLAN.deployments), min_size=1, unique_by=id))
        return replace(PLAN, deployments=tuple(records))
    runs = draw(st.sampled_from([None, 0.001, 0.05, 0.2]))
    found = measured(draw(size), draw(size), runs=runs, num_runs=draw(st.integers(2, 9)))
    some = draw(st.sampled_from([slice(None), slice(1), slice(1, 2)]))
    return replace(found, deployments=found.deployments[some])


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(_drawn_results(), _drawn_results(), st.sampled_from([0.0, 0.05, 0.3]))
def test_turned_round_it_is_the_same_the_other_way(first, second, threshold):
    try:
        there = diff(first, second, threshold)
    except UserError:
        with pytest.raises(UserError):
            diff(second, first, threshold)
        return
    back = diff(second, first, threshold)
    assert (back.source, back.has_few_pairs) == (there.source, there.has_few_pairs)
    assert {(n, b, a) for n, a, b in back.settings} == {*there.settings}

    def of(change):
        return " → ".join(sorted(change.deployment.split(" → "))), change.where, change.metric

    changes, others = sorted(there.changes, key=of), sorted(back.changes, key=of)
    for one, other in zip(changes, others, strict=True):
        assert of(one) == of(other)
        assert (one.before, one.after) == (other.after, other.before)
        assert one.verdict == _TURNED.get(other.verdict, other.verdict)
        assert (one.gain is None) == (other.gain is None)
        if one.ratio is None or other.ratio is None:
            assert one.ratio is other.ratio
            continue
        low, value, high = one.ratio.bounds
        assert other.ratio.bounds == pytest.approx((1 / high, 1 / value, 1 / low))
    assert not {*map(of, there.regressions)} & {*map(of, back.regressions)}


def test_less_than_a_thousandth_is_no_change():
    before = served(Estimate(1000.0, 900.0, 1100.0))
    for tps, verdict in ((999.5, "not significant"), (998.0, "slower")):
        after = served(Estimate(tps, 0.9 * tps, 1.1 * tps))
        assert diff(before, after).changes[0].verdict == verdict


def test_a_deployment_that_runs_fewer_is_the_same_one():
    first, second = (
        replace(
            SIMULATION.deployments[0],
            serving=(replace(SIMULATION.deployments[0].serving[0], batch=None, num_running=num),),
        )
        for num in (235, 224)
    )
    found = diff(
        *(replace(SIMULATION, deployments=(each,)) for each in (first, second)),
    )
    assert {each.where for each in found.changes} == {"235 at once → 224 at once"}
    assert not found.num_unpaired


def test_intervals_of_medians_are_combined_in_quadrature():
    results = [measured(0.4, each, runs=0.1, num_runs=5) for each in (0.1, 0.12)]
    change = diff(*results).of_verdict("slower")[1]
    assert change.ratio is not None
    assert change.ratio.value == pytest.approx(1 / 1.2)
    low = math.exp(-math.hypot(math.log(1 / 0.9), math.log(1.1)))
    assert change.ratio.low == pytest.approx(low / 1.2)
    assert change.ratio.high == pytest.approx(1 / 1.2 / low)
    ranges = [measured(0.4, each, runs=0.1, num_runs=4) for each in (0.1, 0.12)]
    assert diff(*ranges).changes[-1].verdict == "not significant"  # at their worst


def test_a_deployment_that_one_lacks_is_said():
    first = example_results.usual()
    found = diff(first, replace(first, deployments=first.deployments[1:]))
    missing = found.of_verdict("only in A")
    assert {each.deployment for each in missing} == {"TP 8 × PP 2"}
    assert all(each.after is None and each.gain is None for each in missing)
    assert not found.regressions


def test_errors_that_projections_share_cancel_on_the_same_devices():
    before, after = Estimate(100.0, 60.0, 130.0), Estimate(90.0, 54.0, 117.0)
    change = diff(served(before), served(after)).changes[0]
    assert (change.metric, change.verdict) == ("tokens/s", "slower")
    assert change.ratio is not None
    assert change.ratio.bounds == pytest.approx((0.9, 0.9, 0.9))
    assert SIMULATION.cluster is not None
    elsewhere = replace(served(after), cluster=replace(SIMULATION.cluster, device="other"))
    apart = diff(served(before), elsewhere).changes[0]
    assert apart.verdict == "not significant"
    assert apart.ratio is not None
    assert apart.ratio.bounds == pytest.approx((54 / 130, 0.9, 117 / 60))


def test_more_latency_is_slower():
    results = example_pages.serving()
    (record,) = results.deployments
    load, *others = record.serving
    assert load.tpot_s is not None
    assert load.tpot_s.median is not None
    slower = replace(load, tpot_s=replace(load.tpot_s, median=load.tpot_s.median * 1.5))
    second = replace(results, deployments=(replace(record, serving=(slower, *others)),))
    (change,) = diff(results, second).of_verdict("noise unknown")
    assert (change.where, change.metric) == ("batch 1", "TPOT ms")
    assert change.gain == pytest.approx(-0.5)


@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_results_of_every_kind_do_not_differ_from_themselves(make):
    found = diff(make(), make())
    assert found.changes
    assert {each.verdict for each in found.changes} == {"identical"}
    assert not found.settings


def test_two_plans_are_compared_by_their_choice_first():
    best, *others = PLAN.deployments
    second = replace(PLAN, deployments=(replace(best, name="another"), *others))
    found = diff(PLAN, second)
    assert found.changes[0].deployment == f"{best.name} → another"
    assert found.changes[0].verdict == "identical"
    assert {each.deployment for each in found.of_verdict("only in A")} == {best.name}
    renamed = replace(
        PLAN, deployments=tuple(replace(e, name=f"{e.name}!") for e in PLAN.deployments)
    )
    found = diff(PLAN, renamed)
    assert 2 * found.num_unpaired > len(found.changes)
    assert not found.has_few_pairs


def test_another_model_is_refused_but_not_another_name_or_setting_of_one():
    model = SIMULATION.question["model"]

    def of(**changed):
        question = SIMULATION.question | {"model": model | changed}
        return replace(SIMULATION, question=question)

    with pytest.raises(UserError, match=telling("A B another model")):
        diff(SIMULATION, of(name="another", num_hidden_layers=7))
    renamed = diff(SIMULATION, of(name="another")).settings
    assert renamed == (("model.name", SIMULATION.model_name, "another"),)
    assert diff(SIMULATION, of(num_experts_per_tok=3)).changes


def test_the_clock_that_both_have_counts():
    alone, both = example_results.usual(), example_pages.both()
    assert diff(alone, both).source == "measured"
    with pytest.raises(UserError, match=telling("nothing A measured projected")):
        diff(alone, example_pages.projected())


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (PLAN, SIMULATION, "A plan B simulation simulate --plan RESULTS#ROW simulation"),
        (example_pages.projected(), PLAN, "A comparison B plan compare --project"),
    ],
)
def test_different_commands_are_refused(first, second, says):
    with pytest.raises(UserError, match=telling(says)):
        diff(first, second)


def _of_question(**changed):
    return replace(SIMULATION, question=SIMULATION.question | changed)


def _of_workload(**changed):
    return _of_question(workload=SIMULATION.question["workload"] | changed)


@pytest.mark.parametrize(
    ("second", "setting"),
    [
        (replace(SIMULATION, cluster=replace(SIMULATION.cluster, name="h200x16")), "cluster"),
        (_of_workload(prompt_len="77"), "workload.prompt_len"),
        (_of_workload(seed=5), "workload.seed"),
    ],
)
def test_settings_that_differ_are_in_the_answer(second, setting):
    found = diff(SIMULATION, second)
    assert [name for name, _, _ in found.settings] == [setting]
    answer = report_of_difference(found, "", "").answer
    assert any(
        str(each).startswith(f"Not the same in A and B: {setting} ") for each in answer.parts
    )


def test_another_machine_is_a_setting():
    first = measured(0.4, 0.1)
    second = replace(first, machine=replace(first.machine, cpu_name="Other CPU"))
    assert diff(first, second).settings == (("machine.cpu_name", "Example CPU", "Other CPU"),)
