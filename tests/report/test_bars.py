"""Rows of bars: throughput with its range, the causes of a step, and how one becomes another."""

import pytest

from cli.screen import tells
from expertlane.report.charts.bars import (
    FASTER,
    ROW_PX,
    SLOWER,
    Bar,
    step_title,
    throughput_chart,
    waterfall_chart,
)
from expertlane.report.compared import StepDifference
from expertlane.report.document import Chart
from expertlane.results.estimate import Estimate
from report.shown import values

MARKUP = '</script><b title="x">&'


def throughput(*bars: Bar) -> Chart | None:
    return throughput_chart("title", "tokens/s", bars, between="slowest–fastest run")


def test_bars_stand_by_their_length_with_value_and_range():
    chart = throughput(
        Bar("a", Estimate(10.0, 9.0, 12.0), SLOWER),
        Bar(MARKUP, Estimate(30.0)),
        Bar("c", Estimate(20.0, 18.0, 21.0), FASTER),
    )
    assert [(each["row"], each["value"], each["low"], each["high"]) for each in values(chart)] == [
        (MARKUP, 30.0, None, None),
        ("c", 20.0, 18.0, 21.0),
        ("a", 10.0, 9.0, 12.0),
    ]
    assert [each["said"] for each in values(chart)] == [
        "30.0",
        "20.0 (18.0–21.0)",
        "10.0 (9.00–12.0)",
    ]
    assert [each["role"] for each in values(chart)] == ["other", FASTER, SLOWER]
    assert chart.table.rows[1] == ("c", "20.0", "18.0–21.0")
    assert tells(chart.note, "slowest–fastest")


def test_a_long_name_ends_before_its_value():
    chart = throughput(*(Bar(name * 80, Estimate(10.0, 9.0, 12.0)) for name in "abc"))
    limit = chart.spec["layer"][-2]["mark"]["limit"]["expr"]
    assert limit.endswith(f"{7.0 * len('10.0 (9.00–12.0)') + 8}))")


def test_on_a_phone_what_is_said_is_below_names_that_leave_no_room_for_it():
    short, long = (
        throughput(*(Bar(name * times, Estimate(10.0, 9.0, 12.0)) for name in "abc")).spec
        for times in (10, 40)
    )
    assert short["height"] == long["height"] == 3 * ROW_PX
    assert short["narrow"]["height"] == short["height"] < long["narrow"]["height"]


def test_two_values_are_a_sentence_s():
    assert throughput() is None
    assert throughput(Bar("a", Estimate(1.0))) is None
    assert throughput(Bar("a", Estimate(1.0)), Bar("b", Estimate(2.0))) is None
    assert throughput(*(Bar(name, Estimate(1.0)) for name in "abc")).note == ""


def test_a_waterfall_goes_from_one_step_to_the_other():
    found = StepDifference(10.0, 7.0, (("bubble", -5.0), (MARKUP, 2.5), ("other", -0.5)))
    chart = waterfall_chart("title", "slow", "fast", found)
    rows = [(each["row"], each["begin"], each["end"], each["said"]) for each in values(chart)]
    assert rows == [
        ("slow", 0.0, 10.0, "10.0 ms"),
        ("bubble", 10.0, 5.0, "−5.00"),
        (MARKUP, 5.0, 7.5, "+2.50"),
        ("other", 7.5, 7.0, "−0.500"),
        ("fast", 0.0, 7.0, "7.00 ms"),
    ]
    assert [each["kind"] for each in values(chart)] == ["slow", "saves", "adds", "saves", "fast"]
    assert [each.get("next") for each in values(chart)] == ["bubble", MARKUP, "other", "fast", None]
    assert [row[0] for row in chart.table.rows] == ["slow", "bubble", MARKUP, "other", "fast"]
    assert "Most: bubble, −5.00 ms." in chart.words


@pytest.mark.parametrize(
    ("causes", "after", "title"),
    [
        ((("bubble", -5.0), ("experts", 2.0)), 7.0, "3.00 ms shorter bubble −5.00"),
        (
            (("bubble", -1.0), ("experts", 3.0)),
            12.0,
            "2.00 ms longer experts +3.00",
        ),
        ((("bubble", -0.05),), 9.95, "long"),
        ((), 10.0, "long"),
    ],
)
def test_what_a_waterfall_finds(causes, after, title):
    assert tells(step_title("a", "b", StepDifference(10.0, after, causes)), f"b a {title}")
