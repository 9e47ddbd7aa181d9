import hashlib
from dataclasses import replace

import numpy as np
import pytest

import example_results as example
from cli.screen import tells
from expertlane.comparison.assumptions import measured_assumptions
from expertlane.comparison.records import measured_record
from expertlane.cost.memory import workload_limits
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout


def test_a_deployments_row() -> None:
    result = example.record(example.EXPERT, 0.5)
    assert (result.name, result.source, result.is_baseline) == ("EP 16", "measured", False)
    assert result.num_ranks == 16
    prefill, decode = result.steps
    assert prefill.tps.value == 16 * 4 / 5.0
    assert prefill.token_s.median.value == 5.0
    assert decode.tps.value == 16 / 0.5
    assert (decode.token_s.median.value, decode.token_s.p95.value) == (0.5, 0.5)
    # One step of prefill and two of decoding, 16 ranks that each report one pair an expert.
    assert result.num_tokens_per_expert == ((48,) * 16,) * 4
    assert result.expert_max_over_mean == (1.0,) * 4
    assert decode.flops == {"experts": 2 * 16 * 1000}
    # Rank 0 waits 0.1 of a step, the others 0.3: for 0.1 all wait on the transfer.
    assert decode.waiting_s[0] == 0
    assert decode.waiting_s[1] == pytest.approx(2 * 0.2 * 0.5)
    assert decode.stage_s["dispatch"][1] == pytest.approx(2 * 0.2 * 0.5)
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
    ranks = example.record(Deployment("any", layout), 0.5).held
    assert ranks[0].num_experts_per_layer == first
    assert ranks[-1].num_experts_per_layer == last


def test_memory_must_be_of_all_ranks() -> None:
    phases = example.record(example.SMALL, 0.5).steps
    tokens = np.zeros((16, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="memory of 0 ranks"):
        measured_record(example.SMALL, example.MODEL, phases, [], tokens)


def test_assumptions_name_the_experiments_own_numbers() -> None:
    found = {each.name: each.value for each in example.usual().assumptions}
    assert found["experts per token"] == "2 of 16"
    assert found["micro-batches"] == "1, 2"
    assert found["precision"] == "float32"
    assert found["baseline"] == "pp=2,tp=8"


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
    rows = measured_assumptions(experiment, example.machine(), limits)
    found = {each.name: each.value for each in rows}
    assert tells(found["context"], "4 prompt 3 tokens 16 cache")
    assert found["KV cache"] == "TP 8 × PP 2: 48 of 512 tokens"
    limits["EP 16"] = replace(limits["EP 16"], num_blocks=1)
    rows = measured_assumptions(experiment, example.machine(), limits)
    found = {each.name: each.value for each in rows}
    assert found["KV cache"] == ("TP 8 × PP 2: 48 of 512 tokens; EP 16: 256 of 512 tokens")
