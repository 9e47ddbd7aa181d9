from dataclasses import replace

import pytest

from cli.screen import telling
from expertlane.results.hardware import MachinePeak
from expertlane.results.metrics import find_bottleneck, latency, num_tokens_per_expert, phase_record
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase, Stage, Traffic
from records import rank_record, step_record

NO_RECORDS = ()


def test_one_prefill_step() -> None:
    step = step_record(10.0, 12.0, [0, 1], NO_RECORDS, phase=Phase.PREFILL, num_tokens=8)
    result = latency([step])
    assert result.num_tokens == 8
    assert result.wall_s.value == 2.0
    assert result.tps.value == 4.0
    assert (result.token_s.median.value, result.token_s.p95.value) == (2.0, 2.0)
    assert (result.num_steps, result.num_rounds, result.step_s.median.value) == (1, 1, 2.0)


def test_intervals_are_between_the_tokens_of_a_sequence() -> None:
    steps = [
        step_record(10.0, 11.0, [0, 1], NO_RECORDS),
        step_record(11.5, 12.0, [0, 1], NO_RECORDS),
        step_record(12.0, 14.0, [0], NO_RECORDS),
    ]
    result = latency(steps)
    # Sequence 0: 1, 1, 2 s; sequence 1: 1, 1 s. 95 % of the way along sorted 1, 1, 1, 1, 2 is 1.8.
    assert result.token_s.median.value == 1.0
    assert result.token_s.p95.value == pytest.approx(1.8)
    assert result.tps.value == 5 / 4.0
    assert result.step_s.median.value == 1.0
    assert result.num_rounds == 3


def test_rotating_micro_batches_in_flight_together() -> None:
    steps = [
        step_record(0.0, 2.0, [0], NO_RECORDS),
        step_record(0.5, 3.0, [1], NO_RECORDS),
        step_record(2.0, 4.0, [0], NO_RECORDS),
        step_record(3.0, 6.0, [1], NO_RECORDS),
    ]
    result = latency(steps[::-1])
    # From the phase's start: sequence 0 after 2, 2 s; sequence 1 after 3, 3 s.
    assert result.token_s.median.value == 2.5
    assert (result.wall_s.value, result.tps.value) == (6.0, 4 / 6)
    assert result.step_s.median.value == 2.25  # of 2, 2.5, 2, 3
    assert (result.num_steps, result.num_rounds) == (4, 2)


def test_ttft_of_a_rotating_prefill_is_per_sequence() -> None:
    steps = [
        step_record(0.0, 2.0, [0], NO_RECORDS, phase=Phase.PREFILL, num_tokens=4),
        step_record(0.0, 5.0, [1], NO_RECORDS, phase=Phase.PREFILL, num_tokens=4),
    ]
    result = latency(steps)
    assert result.token_s.median.value == 3.5
    assert result.token_s.p95.value == pytest.approx(4.85)
    assert result.num_rounds == 1


def test_replicas_run_side_by_side() -> None:
    steps = [
        step_record(0.0, 2.0, [0], NO_RECORDS),
        step_record(1.0, 4.0, [1], NO_RECORDS, replica=1),
    ]
    assert latency(steps).tps.value == 2 / 4.0


def test_an_empty_micro_batch_counts_as_a_step_alone() -> None:
    steps = [step_record(0.0, 1.0, [0], NO_RECORDS), step_record(1.0, 2.0, [], [rank_record(0)])]
    result = latency(steps)
    assert (result.num_tokens, result.num_steps, result.num_rounds) == (1, 2, 1)


@pytest.mark.parametrize("steps", [[], [step_record(0.0, 1.0, [], NO_RECORDS)]])
def test_nothing_to_measure(steps: list) -> None:
    with pytest.raises(ValueError, match=telling("no step sequence")):
        latency(steps)


def test_runs_are_timed_by_themselves() -> None:
    """Two runs of two steps of one sequence, 100 s apart; what lies between them does not count."""
    steps = [
        replace(step_record(start, start + length, [0], []), run=run)
        for run, start, length in [(0, 0.0, 1.0), (0, 1.0, 1.0), (1, 102.0, 2.0), (1, 104.0, 2.0)]
    ]
    speed = latency(steps)
    assert speed.wall_s.value == 2 + 4
    assert speed.tps_of_runs == (1.0, 0.5)
    assert speed.tps.value == 4 / 6
    assert speed.num_rounds == 4
    assert speed.token_s.median.value == 1.5


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
    metrics = phase_record(Layout(dp=2, ep=2), steps, PEAK, 8)
    assert num_tokens_per_expert(steps) == ((3, 1),)
    assert metrics.active_expert_share == 0.75
    assert metrics.flops == {"experts": 800}
    assert metrics.weight_bytes == {"experts": 120}
    assert metrics.kv_bytes == 40
    assert metrics.num_collectives == {"dispatch": 12}
    assert metrics.traffic.sent_bytes == {
        "payload": ((0, 4), (4, 0)), "metadata": ((0, 0), (0, 0)), "padding": ((0, 0), (0, 0)),
    }  # fmt: skip
    assert metrics.traffic.by_stage.keys() == {"dispatch"}
    assert metrics.cpu_s_per_token == 4 * 0.75 / 4
    assert metrics.flops_utilisation == 800 / 2.0 / 1000
    assert metrics.read_utilisation == 160 / 2.0 / 100
    assert metrics.critical_path.total_s == 1.0
    assert metrics.breakdown_s[Cause.EXPERTS] == 1.0


@pytest.mark.parametrize(
    ("tokens", "share"), [([[1, 0], [0, 0]], 0.5), ([[1, 0], [1, 1]], 0.75), ([[0, 0]], 0.0)]
)
def test_layers_without_experts_do_not_count_as_idle(tokens: list, share: float) -> None:
    steps = [step_record(0.0, 1.0, [0], [rank_record(0, tokens=tokens)])]
    assert phase_record(Layout(), steps, PEAK, 8).active_expert_share == share


def test_both_phases() -> None:
    layout = Layout(dp=2, ep=2)
    prefill = step_record(0.0, 4.0, [0, 1], records((8, 8)), phase=Phase.PREFILL, num_tokens=16)
    decode = step_record(4.0, 5.0, [0, 1], records((2, 1)))
    before, after = (phase_record(layout, [each], PEAK, 8) for each in (prefill, decode))
    assert (before.phase, before.tps.value) == (Phase.PREFILL, 4.0)
    assert (after.phase, after.tps.value) == (Phase.DECODE, 2.0)
    assert num_tokens_per_expert([prefill, decode]) == ((10, 9),)
    decoding = find_bottleneck(layout, after)
    assert (decoding.phase, decoding.cause) == (Phase.DECODE, Cause.EXPERTS)
    prefilling = find_bottleneck(layout, before)
    assert prefilling.phase is Phase.PREFILL
    assert prefilling.cause is Cause.ENGINE  # 3 of 4 s


def test_steps_without_records() -> None:
    with pytest.raises(ValueError, match=telling("without rank records")):
        phase_record(Layout(), [step_record(0.0, 1.0, [0], [])], PEAK, 8)
