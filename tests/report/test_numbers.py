import pytest

from expertlane.report import numbers
from expertlane.results.estimate import Estimate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (9.999, "10.0"),
        (99.99, "100"),
        (99.94, "99.9"),
        (450_000, "450,000"),
        (1234.5, "1,234"),
        (0.01234, "0.0123"),
        (-12.34, "−12.3"),
        (-1234, "−1,234"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert numbers.figures(value) == text


def test_signed() -> None:
    assert [numbers.signed(value) for value in (1.5, 0, -1.5)] == ["+1.50", "0", "−1.50"]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (0.0001, "<0.1%"),
        (0.034, "3.4%"),
        (0.0999, "10%"),
        (0.41, "41%"),
        (-0.12, "−12%"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert numbers.percent(share) == text


def test_a_range_of_one_number_is_none() -> None:
    exact = Estimate(2.0, 2.0, 2.0)
    assert numbers.low_high(exact) == numbers.low_high_compact(exact * 1e4) == "—"
    assert numbers.with_bounds(exact) == "2.00"
    assert numbers.with_bounds(Estimate(2.0, 1.0, 4.0)) == "2.00 (1.00–4.00)"


def test_units() -> None:
    assert numbers.milliseconds(0.0123) == "12.3"
    assert numbers.times(3.75) == "3.75×"
    assert [numbers.bytes_si(n) for n in (0, 999, 1_500, 999_990, 2.5e9)] == [
        "0 B", "999 B", "1.50 kB", "1.00 MB", "2.50 GB",
    ]  # fmt: skip
    assert numbers.rate_si(3.2e10, "FLOP") == "32.0 GFLOP/s"
    assert numbers.rate_si(5, "B") == "5.00 B/s"


def test_counted_and_span() -> None:
    assert numbers.counted(1, "rank") == "1 rank"
    assert numbers.counted(1600, "rank") == "1,600 ranks"
    assert numbers.span({5}) == "5"
    assert numbers.span({6, 5}) == "5–6"
