from dataclasses import replace

import pytest

import example_projection
import example_results as example
from expertlane.report.compared import projected, run
from expertlane.report.setup import cautions
from expertlane.report.verdict import verdict
from expertlane.results.estimate import Estimate
from expertlane.results.record import EXPERIMENT
from expertlane.results.results import Results


def sentences(results: Results) -> tuple[str, ...]:
    comparison = run(results, "measured")
    assert comparison is not None
    return verdict(comparison, results)


def test_proposal_against_the_best_baseline_and_the_first() -> None:
    which, why, critical = sentences(example.usual())
    assert which == (
        "Faster here: EP 16, two-batch overlap, with 2.67× the throughput of the best baseline, "
        "TP 8 × PP 2, 2 micro-batches rotating: 133 against 50.0 decode TPS; TPOT 120 ms against "
        "320 ms (2.67× lower). Against the first deployment, TP 8 × PP 2: 3.33× the throughput, "
        "TPOT 3.33× lower."
    )
    assert why == (
        "Why: per decode step, the largest difference is experts: 160 ms (50%) with "
        "TP 8 × PP 2, 2 micro-batches rotating, 60.0 ms (50%) with EP 16, two-batch overlap."
    )
    # One expert stage's 0.1 of a step for the one, chained over two pipeline stages for the other.
    assert critical == (
        "By critical-path CPU time (one core per rank, transfers free), EP 16, "
        "two-batch overlap is ahead, with 5.33× the throughput of TP 8 × PP 2, 2 micro-batches "
        "rotating: 1,333 against 250 TPS. This favours deployments that communicate most."
    )


def test_a_faster_baseline_is_called_so() -> None:
    which, why, _ = sentences(example.results([(example.TENSOR, 0.1), (example.EXPERT, 0.4)]))
    assert which == (
        "Faster here: the best baseline, TP 8 × PP 2, with 4.00× the throughput of EP 16: 160 "
        "against 40.0 decode TPS; TPOT 100 ms against 400 ms (4.00× lower)."
    )
    assert "experts: 200 ms (50%) with EP 16, 50.0 ms (50%) with TP 8 × PP 2" in why


def test_critical_paths_may_say_the_contrary() -> None:
    # Tensor parallelism has twice the critical path at equal steps: two pipeline stages.
    critical = sentences(example.results([(example.TENSOR, 0.15), (example.EXPERT, 0.2)]))[2]
    assert "EP 16 is ahead, with 1.50× the throughput of TP 8 × PP 2: " in critical


def test_the_largest_part_of_the_faster_is_named_where_it_is_another() -> None:
    _, why, _ = sentences(example.results([(example.TENSOR, 0.201), (example.EXPERT, 0.2)]))
    assert "the largest difference is TP collectives: " in why
    assert why.endswith("Largest cost of EP 16: experts, 100 ms (50%).")


def test_equally_fast() -> None:
    which = sentences(example.results([(example.TENSOR, 0.2), (example.EXPERT, 0.2)]))[0]
    assert which == (
        "Within error here: EP 16 and the best baseline, TP 8 × PP 2: 80.0 against 80.0 "
        "decode TPS; TPOT 200 ms against 200 ms (the same)."
    )


def test_without_a_baseline_the_fastest_is_held_against_the_first() -> None:
    which = sentences(example.results([(example.EXPERT, 0.2), (example.OVERLAP, 0.1)]))[0]
    assert which.startswith("Faster here: EP 16, two-batch overlap, with 2.00× the throughput of")
    which = sentences(example.results([(example.OVERLAP, 0.1), (example.EXPERT, 0.2)]))[0]
    assert which.startswith("Faster here: EP 16, two-batch overlap, with 2.00× the throughput of")


def test_one_deployment() -> None:
    assert sentences(example.results([(example.EXPERT, 0.2)])) == (
        "EP 16 alone here: 80.0 decode TPS, TPOT 200 ms; nothing to compare it with.",
    )


def test_prefill_alone() -> None:
    given = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], output_len=1)
    which, why, _ = sentences(given)
    assert "64.0 against 16.0 prefill TPS; TTFT 1,000 ms against 4,000 ms" in which
    assert why.startswith("Why: over the prefill, ")


def rounding(results: Results, number: int) -> Results:
    """The same with a deployment that sends hidden states as bfloat16; `number`: from 1."""
    changed = [*results.deployments]
    given = changed[number - 1]
    steps = tuple(
        replace(each, traffic=replace(each.traffic, payload_error=0.00165)) for each in given.steps
    )
    options = replace(given.options, payload="bfloat16")
    changed[number - 1] = replace(given, options=options, steps=steps)
    return replace(results, deployments=tuple(changed))


@pytest.mark.parametrize(
    ("number", "name"),
    [(2, "TP 8 × PP 2, 2 micro-batches rotating"), (4, "EP 16, two-batch overlap")],
)
def test_a_named_deployment_that_rounds_does_not_compute_the_same(number: int, name: str) -> None:
    given = example.usual()
    *before, caveat = sentences(rounding(given, number))
    assert caveat == (
        f"{name} rounds hidden states to bfloat16 on their way to experts, by 0.165% (root mean "
        "square): its outputs differ slightly."
    )
    assert tuple(before) == sentences(given)


def test_rounding_of_a_deployment_that_is_not_named_is_no_matter_of_the_verdict() -> None:
    given = example.usual()
    assert sentences(rounding(given, 3)) == sentences(given)


@pytest.mark.parametrize(
    ("num_cores", "start"),
    [(2, "16 ranks share 2 cores: wall times"), (1, "16 ranks share 1 core: wall times")],
)
def test_ranks_that_share_cores(num_cores: int, start: str) -> None:
    (line,) = cautions(example.results([(example.TENSOR, 0.1)], num_cores=num_cores))
    assert line.startswith(start)
    assert line.endswith("critical-path CPU time is the figure closest to one core per rank.")


def test_a_core_for_each_rank() -> None:
    assert not [*cautions(example.results([(example.TENSOR, 0.1)], num_cores=16))]
    given = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], num_cores=16)
    assert len(sentences(given)) == 2  # nothing on critical paths: wall times stand


def test_runs_that_overlap_are_too_close_to_call() -> None:
    given = example.results([(example.TENSOR, 0.2), (example.EXPERT, 0.1)])
    tensor, expert = given.deployments
    steps = tuple(replace(each, tps_of_runs=(70.0, 250.0)) for each in expert.steps)
    given = replace(given, deployments=(tensor, replace(expert, steps=steps)))
    assert sentences(given)[0].startswith("Within error here: EP 16 and the best baseline")


@pytest.mark.parametrize(("share", "is_told"), [(0.0, False), (0.04, False), (0.2, True)])
def test_load_of_other_processes(share: float, is_told: bool) -> None:
    given = replace(example.results([(example.TENSOR, 0.2)]), foreign_cpu_share=share)
    lines = [each for each in cautions(given) if "cores during the run" in each]
    assert bool(lines) == is_told
    for line in lines:
        assert line.startswith("Other processes used 20% of the cores during the run")


def of_projection(results: Results) -> tuple[str, ...]:
    comparison = projected(results)
    assert comparison is not None
    return verdict(comparison, results)


def test_a_projection_is_judged_in_the_same_words() -> None:
    which, why, by_context, prefill, skewed = of_projection(example_projection.usual())
    assert which == (
        "Within error on h100x16, projected: EP 16 + overlap and the best baseline, DP 2 × "
        "TP 8, EP 2: 134,737 against 64,000 decode TPS; TPOT 7.60 ms against 16.0 ms (2.11× "
        "lower). Against the first deployment, TP 8 × PP 2: 4.21× the throughput, TPOT 4.21× lower."
    )
    assert why.startswith(
        "Why: per decode step at 1,024 tokens of context, the largest difference is "
        "weight reads: 8.00 ms (50%) with DP 2 × TP 8, EP 2, 3.80 ms (50%) with EP 16 + overlap."
    )
    assert by_context == (
        "From 1 to 10,000 tokens of context EP 16 + overlap has 2.11× the decode TPS of DP 2 × "
        "TP 8, EP 2 and 4.21× that of TP 8 × PP 2."
    )
    assert prefill.startswith("Prefill: 862,316 TPS with EP 16 + overlap, 409,600 with DP 2 × TP 8")
    assert skewed.startswith("With skewed routing the best proposal, EP 16 + overlap, has 2.11× ")


def test_bounds_that_do_not_touch_tell_a_faster_one() -> None:
    results = example_projection.usual()

    def surer(record):
        steps = (
            replace(each, tps=Estimate(each.tps.value, 0.9 * each.tps.value, 1.1 * each.tps.value))
            for each in record.steps
        )
        return replace(record, steps=tuple(steps))

    sure = replace(results, deployments=tuple(map(surer, results.deployments)))
    assert of_projection(sure)[0].startswith(
        "Faster on h100x16, projected: EP 16 + overlap, with 2.11× the throughput of the best "
    )


def test_a_projection_of_baselines_alone() -> None:
    results = example_projection.usual()
    rows = tuple(
        replace(each, is_baseline=EXPERIMENT in each.roles) for each in results.deployments
    )
    said = of_projection(replace(results, deployments=rows))
    assert "No deployment is a proposal; all are baselines." in said
