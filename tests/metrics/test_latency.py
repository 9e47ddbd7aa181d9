from dataclasses import replace

import pytest

from expertlane.metrics import latency
from expertlane.spec.names import Phase
from records import rank_record, step_record

NO_RECORDS = ()


def test_one_prefill_step() -> None:
    step = step_record(10.0, 12.0, [0, 1], NO_RECORDS, phase=Phase.PREFILL, num_tokens=8)
    result = latency([step])
    assert result.num_tokens == 8
    assert result.wall_s == 2.0
    assert result.tps == 4.0
    assert (result.token_median_s, result.token_p95_s) == (2.0, 2.0)
    assert (result.num_steps, result.num_rounds, result.step_median_s) == (1, 1, 2.0)


def test_intervals_are_between_the_tokens_of_a_sequence() -> None:
    steps = [
        step_record(10.0, 11.0, [0, 1], NO_RECORDS),
        step_record(11.5, 12.0, [0, 1], NO_RECORDS),
        step_record(12.0, 14.0, [0], NO_RECORDS),
    ]
    result = latency(steps)
    # Sequence 0: 1, 1, 2 s; sequence 1: 1, 1 s. 95 % of the way along sorted 1, 1, 1, 1, 2 is 1.8.
    assert result.token_median_s == 1.0
    assert result.token_p95_s == pytest.approx(1.8)
    assert result.tps == 5 / 4.0
    assert result.step_median_s == 1.0
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
    assert result.token_median_s == 2.5
    assert (result.wall_s, result.tps) == (6.0, 4 / 6)
    assert result.step_median_s == 2.25  # of 2, 2.5, 2, 3
    assert (result.num_steps, result.num_rounds) == (4, 2)


def test_ttft_of_a_rotating_prefill_is_per_sequence() -> None:
    steps = [
        step_record(0.0, 2.0, [0], NO_RECORDS, phase=Phase.PREFILL, num_tokens=4),
        step_record(0.0, 5.0, [1], NO_RECORDS, phase=Phase.PREFILL, num_tokens=4),
    ]
    result = latency(steps)
    assert result.token_median_s == 3.5
    assert result.token_p95_s == pytest.approx(4.85)
    assert result.num_rounds == 1


def test_replicas_run_side_by_side() -> None:
    steps = [
        step_record(0.0, 2.0, [0], NO_RECORDS),
        step_record(1.0, 4.0, [1], NO_RECORDS, replica=1),
    ]
    assert latency(steps).tps == 2 / 4.0


def test_an_empty_micro_batch_counts_as_a_step_alone() -> None:
    steps = [step_record(0.0, 1.0, [0], NO_RECORDS), step_record(1.0, 2.0, [], [rank_record(0)])]
    result = latency(steps)
    assert (result.num_tokens, result.num_steps, result.num_rounds) == (1, 2, 1)


@pytest.mark.parametrize("steps", [[], [step_record(0.0, 1.0, [], NO_RECORDS)]])
def test_nothing_to_measure(steps: list) -> None:
    with pytest.raises(ValueError, match="no step with a sequence"):
        latency(steps)


def test_runs_are_timed_by_themselves() -> None:
    """Two runs of two steps of one sequence, 100 s apart; what lies between them does not count."""
    steps = [
        replace(step_record(start, start + length, [0], []), run=run)
        for run, start, length in [(0, 0.0, 1.0), (0, 1.0, 1.0), (1, 102.0, 2.0), (1, 104.0, 2.0)]
    ]
    speed = latency(steps)
    assert speed.wall_s == 2 + 4
    assert speed.tps_of_runs == (1.0, 0.5)
    assert speed.tps == 4 / 6
    assert speed.num_rounds == 4
    assert speed.token_median_s == 1.5
