from dataclasses import replace

import pytest

import example_projection
import example_results as example
from cli.screen import telling
from expertlane.report.compared import (
    OTHER,
    Row,
    hidden_share,
    projected,
    run,
    scaling,
    step_difference,
)
from expertlane.results.record import EXPERIMENT
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase


def test_factors_against_the_first_and_the_best_baseline() -> None:
    comparison = run(
        example.usual(), "measured"
    )  # steps of 0.4, 0.32, 0.16, 0.12 s for 16 sequences
    assert comparison.phase is Phase.DECODE
    assert comparison.best_baseline is comparison.rows[1]
    assert comparison.best_proposal is comparison.fastest is comparison.rows[3]
    assert comparison.cast == [comparison.rows[place] for place in (0, 1, 3)]
    expert = comparison.rows[2]
    assert expert.number == 3
    assert [row.tps for row in comparison.rows[:3]] == pytest.approx([40, 50, 100])
    assert [row.latency_s for row in comparison.rows[:3]] == pytest.approx([0.4, 0.32, 0.16])


def test_prefill_is_compared_where_nothing_was_decoded() -> None:
    given = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], output_len=1)
    comparison = run(given, "measured")
    assert (comparison.phase, comparison.latency_name) == (Phase.PREFILL, "TTFT")
    assert comparison.rows[1].latency_s == pytest.approx(1.0)
    assert comparison.rows[1].tps / comparison.first.tps == pytest.approx(4)


def test_a_deployment_without_the_step_is_refused() -> None:
    results = example_projection.usual()
    broken = tuple(
        replace(each, steps=()) if EXPERIMENT in each.roles and place == 2 else each
        for place, each in enumerate(results.deployments)
    )
    with pytest.raises(ValueError, match=telling("EP 16")):
        projected(replace(results, deployments=broken))


def test_pairs_differ_in_overlap_alone() -> None:
    deployments = [(example.TENSOR, 0.5), (example.OVERLAP, 0.4), (example.EXPERT, 0.5)]
    (pair,) = run(example.results(deployments), "measured").overlapped
    assert (pair.off.name, pair.on.name) == ("EP 16", "EP 16, two-batch overlap")
    assert pair.exposed_s == pytest.approx((0.1 + 15 * 0.3) / 16 * 0.5)
    assert pair.hidden == pytest.approx(0.2)  # of 0.5 s and of 0.4 s the same share is blocked
    assert run(example.results(deployments[::2]), "measured").overlapped == []


def test_scaling_takes_in_deployments_of_its_family() -> None:
    two = Deployment("EP 2", Layout(dp=2, ep=2))
    mixed = Deployment("literal", Layout(dp=2, tp=8, ep=2))
    results = example.results(
        [
            (example.TENSOR, 0.5),
            (mixed, 0.5),
            (example.EXPERT, 0.125),
            (example.OVERLAP, 0.1),
        ],
        scaling=[(two, 0.25), (example.SMALL, 0.5)],
    )
    sizes = scaling(results, "measured")
    assert [each.record.name for each in sizes] == ["EP 1", "EP 2", "EP 16"]
    assert [each.tps for each in sizes] == [32, 64, 128]
    assert [each.tps_per_rank for each in sizes] == [32, 32, 8]
    assert sizes[2].critical_path_tps_per_rank == pytest.approx(1280 / 16)


def test_overlap_is_judged_alike_whatever_the_source() -> None:
    (pair,) = run(example.usual(), "measured").overlapped
    assert (pair.off.number, pair.on.number) == (3, 4)
    # Blocked: rank 0 a tenth of 160 ms, 15 ranks three tenths: 46 ms; of 120 ms 34.5 ms.
    assert pair.exposed_s == pytest.approx(0.046)
    assert pair.hidden == pytest.approx(1 - 34.5 / 46)
    (pair,) = projected(example_projection.usual()).overlapped
    assert pair.exposed_s == pytest.approx(0.2 * 8e-3)
    assert pair.hidden == pytest.approx(1 - 1.52 / 1.6)
    nothing = replace(pair.off.step, breakdown_s={})
    assert replace(pair, off=Row(3, pair.off.record, nothing)).hidden is None


@pytest.mark.parametrize(
    ("hidden_s", "exposed_s", "share"),
    [(1.0, 4.0, 0.25), (5.0, 4.0, 1.0), (-1.0, 4.0, 0.0), (1.0, 0.0, None)],
)
def test_a_hidden_share_is_between_none_and_all(hidden_s, exposed_s, share) -> None:
    assert hidden_share(hidden_s, exposed_s) == share


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
