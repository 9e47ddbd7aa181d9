import numpy as np
import pytest

from expertlane.metrics import MachinePeak, summarise, summarise_phase
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase, Stage, Traffic
from records import rank_record, step_record

PEAK = MachinePeak(
    gemm_flops_per_s=1000.0, read_bytes_per_s=100.0, num_units=2, unit="core", dtype="float32"
)


def records(tokens):
    """Two ranks of ep=2 that hold one of two experts each, in one layer."""
    return [
        rank_record(
            rank,
            wall={(0, 0, Stage.EXPERTS): 1.0},
            cpu={(0, 0, Stage.EXPERTS): 0.5},
            process_cpu_s=0.75,
            tokens=[[count if expert == rank else 0 for expert, count in enumerate(tokens)]],
            flops=200,
            weight_bytes=30,
            kv_bytes=10,
            sent={(Stage.DISPATCH, Traffic.PAYLOAD, 1 - rank): 2},
            world_size=2,
            num_collectives=3,
        )
        for rank in range(2)
    ]


def test_counters_are_summed_over_ranks_and_steps() -> None:
    steps = [
        step_record(0.0, 1.0, [0, 1], records((2, 0))),
        step_record(1.0, 2.0, [0, 1], records((1, 1))),
    ]
    metrics = summarise_phase(Layout(dp=2, ep=2), steps, PEAK, 8)
    np.testing.assert_array_equal(metrics.num_tokens_per_expert, [[3, 1]])
    assert metrics.active_expert_share == 0.75
    assert metrics.flops[Stage.EXPERTS] == metrics.flops.sum() == 800
    assert metrics.weight_bytes[Stage.EXPERTS] == 120
    assert metrics.kv_bytes == 40
    assert metrics.num_collectives[Stage.DISPATCH] == 12
    sent_bytes = metrics.traffic.sent_bytes
    assert sent_bytes[Stage.DISPATCH, Traffic.PAYLOAD].tolist() == [[0, 4], [4, 0]]
    assert sent_bytes.sum() == 8
    assert metrics.cpu_s_per_token == 4 * 0.75 / 4
    assert metrics.utilisation.flops == 800 / 2.0 / 1000
    assert metrics.utilisation.read_bytes == 160 / 2.0 / 100
    assert metrics.critical_path.total_s == 1.0
    assert metrics.breakdown_s[Cause.EXPERTS] == 1.0


@pytest.mark.parametrize(
    ("tokens", "share"), [([[1, 0], [0, 0]], 0.5), ([[1, 0], [1, 1]], 0.75), ([[0, 0]], 0.0)]
)
def test_layers_without_experts_do_not_count_as_idle(tokens: list, share: float) -> None:
    steps = [step_record(0.0, 1.0, [0], [rank_record(0, tokens=tokens)])]
    assert summarise_phase(Layout(), steps, PEAK, 8).active_expert_share == share


def test_both_phases() -> None:
    prefill = step_record(0.0, 4.0, [0, 1], records((8, 8)), phase=Phase.PREFILL, num_tokens=16)
    decode = step_record(4.0, 5.0, [0, 1], records((2, 1)))
    metrics = summarise(Layout(dp=2, ep=2), [prefill], [decode], PEAK, 8)
    assert metrics.prefill.latency.tps == 4.0
    assert metrics.decode is not None
    assert metrics.decode.latency.tps == 2.0
    np.testing.assert_array_equal(metrics.num_tokens_per_expert, [[10, 9]])
    assert (metrics.bottleneck.phase, metrics.bottleneck.cause) == (Phase.DECODE, Cause.EXPERTS)


def test_nothing_decoded() -> None:
    prefill = step_record(0.0, 4.0, [0, 1], records((8, 8)), phase=Phase.PREFILL, num_tokens=16)
    metrics = summarise(Layout(dp=2, ep=2), [prefill], [], PEAK, 8)
    assert metrics.decode is None
    assert metrics.bottleneck.phase is Phase.PREFILL
    assert metrics.bottleneck.cause is Cause.ENGINE  # 3 of 4 s


def test_steps_without_records() -> None:
    with pytest.raises(ValueError, match="without rank records"):
        summarise_phase(Layout(), [step_record(0.0, 1.0, [0], [])], PEAK, 8)
