import hashlib
from dataclasses import replace

import numpy as np
import pytest

import example_results as example
from expertlane.compare.assumptions import assumptions
from expertlane.compare.collect import (
    deployment_result,
    hidden_by_overlap,
    scaling_points,
)
from expertlane.engine.commands import HeldBytes
from expertlane.memory import workload_limits
from expertlane.metrics import summarise
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload


def test_a_deployments_row() -> None:
    result = example.result(example.EXPERT, 0.5)
    assert (result.name, result.source, result.is_baseline) == ("EP 16", "measured", False)
    assert result.num_ranks == 16
    assert result.prefill.tps == 16 * 4 / 5.0
    assert result.prefill.ttft_s.median == 5.0
    assert result.decode is not None
    assert result.decode.tps == 16 / 0.5
    assert (result.decode.tpot_s.median, result.decode.tpot_s.p95) == (0.5, 0.5)
    # One step of prefill and two of decoding, 16 ranks that each report one pair an expert.
    assert result.expert_load.num_tokens_per_expert == ((48,) * 16,) * 4
    assert result.expert_load.max_over_mean == (1.0,) * 4
    assert result.decode.flops == {"experts": 2 * 16 * 1000}
    # Rank 0 waits 0.1 of a step, the others 0.3: for 0.1 all wait on the transfer.
    assert result.per_rank[0].waiting_s[Phase.DECODE] == 0
    assert result.per_rank[1].waiting_s[Phase.DECODE] == pytest.approx(2 * 0.2 * 0.5)
    assert result.per_rank[1].stage_s[Phase.DECODE]["dispatch"] == pytest.approx(2 * 0.2 * 0.5)
    assert result.bottleneck.straggler == 0
    assert result.tokens_sha256 == hashlib.sha256(bytes(8 * 16 * 3)).hexdigest()


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        (Layout(dp=3, ep=3), (6, 6, 6, 6), (5, 5, 5, 5)),
        (Layout(pp=2), (16, 16, 0, 0), (0, 0, 16, 16)),
        (Layout(dp=2, tp=2, ep=2), (8, 8, 8, 8), (8, 8, 8, 8)),
    ],
)
def test_experts_of_each_rank(layout: Layout, first: tuple, last: tuple) -> None:
    ranks = example.result(Deployment("any", layout), 0.5).per_rank
    assert ranks[0].num_experts_per_layer == first
    assert ranks[-1].num_experts_per_layer == last


def test_tokens_and_memory_must_fit() -> None:
    deployment, workload = example.SMALL, Workload(16, 4, 3)
    metrics = summarise(
        deployment.layout,
        example.steps(deployment, Phase.PREFILL, start_s=0, step_s=1, num_rounds=1),
        [],
        example.PEAK,
        8,
    )
    memory = [HeldBytes(1000, 100)]
    with pytest.raises(ValueError, match="tokens of shape"):
        deployment_result(
            deployment,
            example.MODEL,
            workload,
            metrics,
            memory,
            np.zeros((16, 2), int),
            False,
            8,
            {},
        )
    with pytest.raises(ValueError, match="memory of 0 ranks"):
        deployment_result(
            deployment, example.MODEL, workload, metrics, [], np.zeros((16, 3), int), False, 8, {}
        )


def test_hidden_communication_pairs_deployments_that_differ_in_overlap_alone() -> None:
    tensor, expert = example.result(example.TENSOR, 0.5), example.result(example.EXPERT, 0.5)
    overlap = example.result(example.OVERLAP, 0.4)
    (pair,) = hidden_by_overlap([tensor, overlap, expert])
    assert (pair.off, pair.on) == ("EP 16", "EP 16, two-batch overlap")
    assert pair.exposed_s == pytest.approx((0.1 + 15 * 0.3) / 16 * 0.5)
    assert pair.hidden == pytest.approx(0.1 / pair.exposed_s)
    assert hidden_by_overlap([tensor, expert]) == ()


def test_scaling_takes_in_deployments_of_its_family() -> None:
    two = Deployment("EP 2", Layout(dp=2, ep=2))
    mixed = Deployment("literal", Layout(dp=2, tp=8, ep=2))
    points = scaling_points(
        [example.result(two, 0.25), example.result(example.SMALL, 0.5)],
        [
            example.result(example.TENSOR, 0.5),
            example.result(mixed, 0.5),
            example.result(example.EXPERT, 0.125),
            example.result(example.OVERLAP, 0.1),
        ],
    )
    assert [point.name for point in points] == ["EP 1", "EP 2", "EP 16"]
    assert [point.tps for point in points] == [32, 64, 128]
    assert [point.tps_per_rank for point in points] == [32, 32, 8]
    assert [point.relative_tps_per_rank for point in points] == [1, 1, 0.25]
    assert points[2].critical_path_tps_per_rank == pytest.approx(1280 / 16)
    assert points[2].relative_critical_path_tps_per_rank == pytest.approx(0.25)


def test_no_scaling() -> None:
    assert scaling_points([], [example.result(example.EXPERT, 0.5)]) == ()
    assert scaling_points([example.result(example.SMALL, 0.5, output_len=1)], []) == ()


def test_assumptions_name_the_experiments_own_numbers() -> None:
    found = {each.name: each.value for each in example.usual().assumptions}
    assert found["experts per token"] == "2 of 16"
    assert found["micro-batches"] == "1, 2"
    assert found["precision"] == "float32"
    assert found["baseline"] == "pp=2,tp=8"


def test_assumptions_when_the_cache_holds_everything() -> None:
    found = {each.name: each.value for each in example.usual().assumptions}
    assert found["context"] == "4 prompt + 3 output tokens, all 16 sequences resident"
    assert "key/value cache" not in found


def test_assumptions_when_a_cache_is_too_small() -> None:
    experiment = Experiment(
        "example", example.MODEL, example.WORKLOAD, (example.TENSOR, example.EXPERT)
    )
    limits = {
        each.name: workload_limits(experiment.workload, experiment.model, each.layout)
        for each in experiment.deployments
    }
    assert [each.num_blocks for each in limits.values()] == [32, 2]  # a sequence: 1 and a reserve
    limits["TP 8 × PP 2"] = replace(limits["TP 8 × PP 2"], num_blocks=3)
    rows = assumptions(experiment, example.machine(), limits)
    found = {each.name: each.value for each in rows}
    assert found["context"] == (
        "4 prompt + 3 output tokens, 16 sequences, as many at once as the cache holds"
    )
    assert found["key/value cache"] == "TP 8 × PP 2: 48 of 512 positions"
    limits["EP 16"] = replace(limits["EP 16"], num_blocks=1)
    rows = assumptions(experiment, example.machine(), limits)
    found = {each.name: each.value for each in rows}
    assert found["key/value cache"] == (
        "TP 8 × PP 2: 48 of 512 positions; EP 16: 256 of 512 positions"
    )


def test_rotating_options_are_kept() -> None:
    result = example.result(example.ROTATING, 0.5)
    assert result.options == Options(num_micro_batches=2, micro_batch_schedule="rotating")
