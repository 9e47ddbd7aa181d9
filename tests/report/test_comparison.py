import pytest

import example_results as example
from expertlane.report.comparison import compare
from expertlane.spec.names import Phase


def test_factors_against_the_first_and_the_best_baseline() -> None:
    comparison = compare(example.usual())  # steps of 0.4, 0.32, 0.16, 0.12 s for 16 sequences
    assert comparison.phase is Phase.DECODE
    assert comparison.best_baseline is comparison.rows[1]
    assert comparison.best_proposal is comparison.fastest is comparison.rows[3]
    expert = comparison.rows[2]
    assert expert.number == 3
    assert expert.against_first.tps == pytest.approx(100 - 40)
    assert expert.against_first.throughput_factor == pytest.approx(2.5)
    assert expert.against_first.latency_s == pytest.approx(-0.24)
    assert expert.against_first.latency_factor == pytest.approx(2.5)
    assert expert.against_best is not None
    assert expert.against_best.tps == pytest.approx(100 - 50)
    assert expert.against_best.throughput_factor == pytest.approx(2.0)


def test_the_first_against_itself() -> None:
    first = compare(example.usual()).rows[0].against_first
    assert (first.tps, first.throughput_factor) == (0, 1)
    assert (first.latency_s, first.latency_factor) == (0, 1)


def test_without_baselines() -> None:
    comparison = compare(example.results([(example.EXPERT, 0.2), (example.OVERLAP, 0.1)]))
    assert comparison.best_baseline is None
    assert [row.against_best for row in comparison.rows] == [None, None]
    assert comparison.rows[1].against_first.throughput_factor == pytest.approx(2)


def test_only_baselines() -> None:
    assert compare(example.results([(example.TENSOR, 0.2)])).best_proposal is None


def test_prefill_is_compared_where_nothing_was_decoded() -> None:
    given = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], output_len=1)
    comparison = compare(given)
    assert (comparison.phase, comparison.latency_name) == (Phase.PREFILL, "TTFT")
    assert comparison.rows[1].latency_s.median == pytest.approx(1.0)
    assert comparison.rows[1].against_first.throughput_factor == pytest.approx(4)
