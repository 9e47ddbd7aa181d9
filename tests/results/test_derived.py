import pytest

import example_results as example
from expertlane.results.derived import hidden_by_overlap, scaling_points
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout


def test_hidden_communication_pairs_deployments_that_differ_in_overlap_alone() -> None:
    tensor, expert = example.record(example.TENSOR, 0.5), example.record(example.EXPERT, 0.5)
    overlap = example.record(example.OVERLAP, 0.4)
    (pair,) = hidden_by_overlap([tensor, overlap, expert])
    assert (pair.off, pair.on) == ("EP 16", "EP 16, two-batch overlap")
    assert pair.exposed_s == pytest.approx((0.1 + 15 * 0.3) / 16 * 0.5)
    assert pair.hidden == pytest.approx(0.1 / pair.exposed_s)
    assert hidden_by_overlap([tensor, expert]) == ()


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
    points = scaling_points(results)
    assert [point.name for point in points] == ["EP 1", "EP 2", "EP 16"]
    assert [point.tps for point in points] == [32, 64, 128]
    assert [point.tps_per_rank for point in points] == [32, 32, 8]
    assert [point.relative_tps_per_rank for point in points] == [1, 1, 0.25]
    assert points[2].critical_path_tps_per_rank == pytest.approx(1280 / 16)
    assert points[2].relative_critical_path_tps_per_rank == pytest.approx(0.25)


def test_no_scaling() -> None:
    assert scaling_points(example.results([(example.EXPERT, 0.5)])) == ()
    small = [(example.SMALL, 0.5)]
    alone = example.results([(example.TENSOR, 0.5)], scaling=small, output_len=1)
    assert scaling_points(alone) == ()
