"""Rows of bars: throughput with its range, the causes of a step, and how one becomes another."""

import pytest

import example_results
from cli.screen import in_order, tells
from example_results import EXPERT, OVERLAP, ROTATING, TENSOR
from expertlane.report.charts.bars import (
    FASTER,
    ROW_PX,
    SLOWER,
    Bar,
    causes_chart,
    step_title,
    throughput_chart,
    waterfall_chart,
)
from expertlane.report.compared import StepDifference
from expertlane.report.document import Chart, Section
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate
from expertlane.results.results import Results
from expertlane.spec.names import Cause
from report.shown import charts, values

MARKUP = '</script><b title="x">&'


def throughput(*bars: Bar) -> Chart | None:
    return throughput_chart("title", "tokens/s", bars, between="slowest–fastest run")


def first(results: Results) -> Section | None:
    return next(iter(report_of(results).of_place("first")), None)


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


def test_bars_of_shares_are_equally_long():
    given = example_results.usual().deployments[0]
    steps = {"prefill": given.prefill, "decode": given.decode}
    chart = causes_chart(steps, "mean step", note="", as_shares=True)
    for name, step in steps.items():
        of_step = [each for each in values(chart) if each["row"] == name]
        assert of_step[-1]["end"] == pytest.approx(1.0)
        whole_ms = 1e3 * sum(step.breakdown_s.values())
        assert sum(each["ms"] for each in of_step) == pytest.approx(whole_ms)


def test_two_values_are_a_sentence_s():
    assert throughput() is None
    assert throughput(Bar("a", Estimate(1.0))) is None
    assert throughput(Bar("a", Estimate(1.0)), Bar("b", Estimate(2.0))) is None
    assert throughput(*(Bar(name, Estimate(1.0)) for name in "abc")).note == ""


def test_the_first_screen_has_throughput_and_what_makes_the_difference():
    given = example_results.results(
        [(TENSOR, 0.4), (ROTATING, 0.32), (EXPERT, 0.16), (OVERLAP, 0.12)]
    )
    speed, why = charts(first(given))
    roles = {each["row"]: each["role"] for each in values(speed)}
    assert roles == {
        "EP 16, two-batch overlap": FASTER,
        "EP 16": "other",
        "TP 8 × PP 2, 2 micro-batches rotating": SLOWER,
        "TP 8 × PP 2": "other",
    }
    assert in_order(speed.title, "EP 16 2.67× TP 8 × PP 2")
    ends = [(each["row"], each["ms"]) for each in (values(why)[0], values(why)[-1])]
    assert ends == [
        ("TP 8 × PP 2, 2 micro-batches rotating", pytest.approx(320)),
        ("EP 16, two-batch overlap", pytest.approx(120)),
    ]


def test_one_deployment_has_no_first_screen_and_two_no_bars():
    assert first(example_results.results([(EXPERT, 0.1)])) is None
    (why,) = charts(first(example_results.results([(TENSOR, 0.2), (EXPERT, 0.1)])))
    assert in_order(why.title, "EP 16 100 ms TP 8 × PP 2")


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


def test_parts_of_a_step_stand_end_to_end():
    given = example_results.usual().select("measured")[2]
    chart = causes_chart({"a": given.decode, MARKUP: given.decode}, "decode step", note="")
    own = [each for each in values(chart) if each["row"] == MARKUP]
    assert own[0]["begin"] == 0.0
    assert [each["end"] for each in own[:-1]] == [each["begin"] for each in own[1:]]
    assert own[-1]["end"] == pytest.approx(160)
    by_cause = {each["cause"]: each["ms"] for each in own}
    # Half of 160 ms computing, a tenth without waiting in dispatch, the last tenth nowhere.
    assert by_cause[Cause.EXPERTS] == pytest.approx(80)
    assert by_cause[Cause.ENGINE] == pytest.approx(16)
    assert own[0]["said"] == "160 ms"
    assert [each.get("said") for each in own[1:]] == [None] * (len(own) - 1)
    assert tells(chart.title, f"50% a's {Cause.EXPERTS}")
