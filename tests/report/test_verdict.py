from dataclasses import replace

import pytest

import example_projection
import example_results as example
from cli.screen import in_order, tells
from expertlane.report.compared import projected, run
from expertlane.report.setup import cautions
from expertlane.report.verdict import Factor, sentence, verdict
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import LinkSpeed, VirtualTime
from expertlane.results.results import Results
from expertlane.spec.names import Cause


def sentences(results: Results) -> tuple[str, ...]:
    comparison = run(results, "measured")
    assert comparison is not None
    return verdict(comparison, results)


def two(slow_s: float = 0.4, fast_s: float = 0.1) -> Results:
    return example.results([(example.TENSOR, slow_s), (example.EXPERT, fast_s)])


def test_a_significant_ratio_with_its_interval_and_causes_beyond_their_noise() -> None:
    causes_s = {
        Cause.PIPELINE_BUBBLE: Estimate(-0.057, -0.060, -0.054),
        Cause.TP_COLLECTIVES: Estimate(-0.015, -0.017, -0.013),
        Cause.DISPATCH_COMBINE: Estimate(0.072, 0.070, 0.074),  # larger, but against it
        Cause.EXPERTS: Estimate(-0.100, -0.300, 0.100),  # the largest, and no more than noise
    }
    which, _, why, _ = sentences(example.with_pair(two(), Estimate(1.45, 1.38, 1.51), causes_s))
    assert in_order(which, "EP 16 1.45× TP 8 × PP 2 1.38–1.51 decode wall")
    assert in_order(why, "bubble −57.0 −60.0 −54.0 TP −15.0 dispatch +72.0 −300")
    assert "experts −" not in why


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.001, 1.09, "EP 16 is 1.02× as fast as TP 8 × PP 2 (1.00–1.09)"),
        (0.90, 1.04, "Whether EP 16 is faster than TP 8 × PP 2 is not decided (1.02×, 0.90–1.04)"),
        (0.97, 1.09, "Whether EP 16 is faster than TP 8 × PP 2 is not decided (1.02×, 0.97–1.09)"),
        (0.97, 1.04, "EP 16 is level with TP 8 × PP 2 (0.97–1.04)"),
    ],
)
def test_an_interval_that_contains_1_is_level_or_not_decided(low, high, words) -> None:
    which = sentences(example.with_pair(two(), Estimate(1.02, low, high)))[0]
    assert which == f"{words}, in decode, wall time."


FASTER, SLOWER = Estimate(1.66, 1.60, 1.72), Estimate(0.92, 0.9, 0.95)
LEVEL, UNDECIDED = Estimate(1.01, 0.97, 1.04), Estimate(1.08, 0.95, 1.19)


@pytest.mark.parametrize(
    ("first", "best", "words"),
    [
        (FASTER, FASTER, "E is 1.66× as fast as F (1.60–1.72) and 1.66× as fast as B (1.60–1.72)"),
        (FASTER, SLOWER, "E is 1.66× as fast as F (1.60–1.72) but 0.92× as fast as B (0.90–0.95)"),
        (SLOWER, SLOWER, "E is 0.92× as fast as F (0.90–0.95) and 0.92× as fast as B (0.90–0.95)"),
        (FASTER, LEVEL, "E is 1.66× as fast as F (1.60–1.72) and level with B (0.97–1.04)"),
        (
            FASTER,
            UNDECIDED,
            "E is 1.66× as fast as F (1.60–1.72); whether it is faster than B is not decided "
            "(1.08×, 0.95–1.19)",
        ),
        (
            UNDECIDED,
            SLOWER,
            "Whether E is faster than F is not decided (1.08×, 0.95–1.19); it is 0.92× as fast as "
            "B (0.90–0.95)",
        ),
    ],
)
def test_against_the_first_and_the_best(first: Estimate, best: Estimate, words: str) -> None:
    assert sentence("E", (Factor("F", first), Factor("B", best)), "here") == f"{words}, here."


@pytest.mark.parametrize(
    ("slow_tps", "fast_tps", "words"),
    [
        (40.0, 40.0, "EP 16 is 4.00× as fast as TP 8 × PP 2 (3.60–4.40)"),  # as at 1
        (39.0, 44.0, "EP 16 is 4.00× as fast as TP 8 × PP 2 (3.27–4.51)"),
        (
            39.0,
            400.0,
            "Whether EP 16 is faster than TP 8 × PP 2 is not decided (4.00×, 0.36–4.51: depends "
            "on links)",
        ),
    ],
)
def test_the_interval_has_links_half_to_twice_as_fast(slow_tps, fast_tps, words) -> None:
    """The other deployment's TPS on slow and fast links; EP 16's do not change."""
    speeds = (
        LinkSpeed(0.0, (9e9, 160.0)),  # further than twice as fast
        LinkSpeed(0.75, (fast_tps, 160.0)),
        LinkSpeed(1.5, (40.0, 160.0)),
        LinkSpeed(3.0, (slow_tps, 160.0)),
        LinkSpeed(6.0, (1e-9, 160.0)),
    )
    given = example.in_virtual_time(
        example.with_pair(two(), Estimate(4.0, 3.6, 4.4)), VirtualTime("h100", 1.5, 1.0, speeds)
    )
    own = run(given, "virtual")
    assert verdict(own, given)[0] == f"{words}, in decode, virtual time."


def test_nothing_but_noise_has_no_reason() -> None:
    noise = {Cause.EXPERTS: Estimate(-0.1, -0.2, 0.1)}
    _, _, why, _ = sentences(example.with_pair(two(), Estimate(1.05, 0.9, 1.2), noise))
    assert tells(why, "no cause noise")


def test_on_a_clock_where_it_is_slower_the_reasons_are_what_it_pays() -> None:
    causes_s = {
        Cause.DISPATCH_COMBINE: Estimate(0.072, 0.070, 0.074),
        Cause.TP_COLLECTIVES: Estimate(-0.090, -0.095, -0.085),
    }
    which, _, why, _ = sentences(example.with_pair(two(), Estimate(0.9, 0.85, 0.95), causes_s))
    assert in_order(which, "EP 16 0.90× TP 8 × PP 2")
    assert in_order(why, "dispatch combine +72.0")
    assert in_order(why, "Against TP −90.0")


def test_a_slower_proposal_is_still_what_is_asked_about() -> None:
    which, _, why, _ = sentences(example.results([(example.TENSOR, 0.1), (example.EXPERT, 0.4)]))
    assert in_order(which, "EP 16 0.25× TP 8 × PP 2 decode wall")
    assert in_order(why, "experts +150")


def test_without_a_baseline_the_fastest_is_held_against_the_first() -> None:
    fastest = "EP 16 overlap 2.00× EP 16 decode"
    which = sentences(example.results([(example.EXPERT, 0.2), (example.OVERLAP, 0.1)]))[0]
    assert in_order(which, fastest)
    which = sentences(example.results([(example.OVERLAP, 0.1), (example.EXPERT, 0.2)]))[0]
    assert in_order(which, fastest)


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
    assert tells(caveat, f"{name} bfloat16 0.165%")
    assert tuple(before) == sentences(given)


@pytest.mark.parametrize("rounding_ones", [(2,), (4,), (2, 4), (1, 2, 3, 4)])
def test_named_deployments_whose_options_round_alike_compute_the_same(
    rounding_ones: tuple[int, ...],
) -> None:
    given = example.usual()
    changed = [*given.deployments]
    for number in rounding_ones:
        record = changed[number - 1]
        options = replace(record.options, activations="float8", kv_dtype="float8")
        changed[number - 1] = replace(record, options=options)
    caveats = [
        each
        for each in sentences(replace(given, deployments=tuple(changed)))
        if each not in sentences(given)
    ]
    assert len(caveats) == (0 if len(rounding_ones) == 4 else len(rounding_ones))
    assert all(tells(each, "rounds inputs keys values") for each in caveats)


def test_rounding_of_a_deployment_that_is_not_named_is_no_matter_of_the_verdict() -> None:
    given = example.usual()
    assert sentences(rounding(given, 3)) == sentences(given)


@pytest.mark.parametrize(
    ("num_cores", "start"),
    [(2, "16 ranks 2 cores"), (1, "16 ranks 1 core")],
)
def test_ranks_that_share_cores(num_cores: int, start: str) -> None:
    (line,) = cautions(example.results([(example.TENSOR, 0.1)], num_cores=num_cores))
    assert tells(line, start)
    assert tells(line, "critical-path CPU")


def test_a_core_for_each_rank() -> None:
    assert not [*cautions(example.results([(example.TENSOR, 0.1)], num_cores=16))]
    given = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], num_cores=16)
    assert len(sentences(given)) == 3  # nothing on critical paths: wall times stand


@pytest.mark.parametrize(("share", "is_told"), [(0.0, False), (0.04, False), (0.2, True)])
def test_load_of_other_processes(share: float, is_told: bool) -> None:
    given = replace(example.results([(example.TENSOR, 0.2)]), foreign_cpu_share=share)
    lines = [each for each in cautions(given) if "Other processes used" in each]
    assert bool(lines) == is_told
    for line in lines:
        assert tells(line, "20% idle")


def of_projection(results: Results) -> tuple[str, ...]:
    comparison = projected(results)
    assert comparison is not None
    return verdict(comparison, results)


def test_bounds_that_do_not_touch_tell_a_faster_one() -> None:
    results = example_projection.usual()

    def surer(record):
        steps = (
            replace(each, tps=Estimate(each.tps.value, 0.9 * each.tps.value, 1.1 * each.tps.value))
            for each in record.steps
        )
        return replace(record, steps=tuple(steps))

    sure = replace(results, deployments=tuple(map(surer, results.deployments)))
    assert in_order(of_projection(sure)[0], "EP 16 overlap 2.11× DP 2 × TP 8")
