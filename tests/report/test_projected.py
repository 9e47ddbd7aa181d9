"""The page of a projection, from hand-made values."""

from dataclasses import replace

import example_projection as example
import example_results
from cli.screen import in_order, tells
from expertlane.report.document import Table
from expertlane.report.sections import report_of
from expertlane.results.record import EXPERIMENT, FASTEST, SCALING
from expertlane.results.results import Results
from report.shown import section, tables
from report.shown import words as words_of


def usual() -> Results:
    """Of the model's own top-k alone, as a projection is made."""
    found = example.usual()
    own = (each for each in found.deployments if each.conditions and each.conditions.top_k == 2)
    return replace(found, deployments=tuple(own), plans=found.plans[:1])


def table(results: Results, beginning: str, number: int = 0) -> Table:
    return tables(section(report_of(results), beginning))[number]


def words(results: Results, beginning: str) -> str:
    return words_of(section(report_of(results), beginning))


def test_the_verdict_stands_first_with_every_part() -> None:
    results = usual()
    assert tells(report_of(results).of_place("top")[0].heading, "Projected h100x16")
    assert table(results, "Projected: verdict").rows == (
        ("1", "first: TP 8 × PP 2", "32,000", "16.0–64.0", "32.0", "16.0–64.0", "1.00", "0.500"),
        (
            "2",
            "best baseline: DP 2 × TP 8, EP 2",
            "64,000",
            "32.0–128",
            "16.0",
            "8.00–32.0",
            "2.00",
            "1.00",
        ),
        (
            "4",
            "best proposal: EP 16 + overlap",
            "134,737",
            "67.4–269",
            "7.60",
            "3.80–15.2",
            "4.21",
            "2.11",
        ),
        (
            "—",
            "planner's best: dp=4,tp=4,ep=16; plain",
            "160,000",
            "80.0–320",
            "6.40",
            "3.20–12.8",
            "5.00",
            "2.50",
        ),
    )
    text = words(results, "Projected: verdict")
    assert in_order(text, "4.21× TP 8 × PP 2")
    assert tells(text, "skewed EP 16 overlap 2.11×")
    sure = next(each for each in report_of(results).sections if each.chapter == "sure")
    assert tells(" ".join(map(str, sure.parts)), "16 GB 1 free extrapolated 90%")


def test_steps_that_do_not_fit_are_marked_and_those_that_do_stand_beside() -> None:
    results = usual()
    rows = table(results, "Projected: speed (top-2").rows
    assert rows[0] == ("1", "TP 8 × PP 2", "204,800", "8.00", "16.0", "32.0", "64.0*", "48.0")
    assert tells(words(results, "Projected: speed"), "1,024 fit")
    assert table(results, "Projected: memory").rows[2][-1] == "768"
    assert tells(words(results, "Projected: memory"), "No 1,024")


def test_every_condition_has_a_column() -> None:
    results = usual()
    first = table(results, "Projected: routing and execution")
    assert [column.heading for column in first.columns[2:]] == [
        "graph, balanced",
        "graph, skewed",
        "eager, balanced",
        "eager, skewed",
    ]
    assert first.rows[2] == ("3", "EP 16", "8.00", "16.0", "12.0", "24.0")
    text = words(results, "Projected: routing and execution")
    assert tells(text, "CUDA graphs 50% longer")


def test_the_planners_best_is_set_against_each() -> None:
    text = words(usual(), "Projected: the planner's best")
    assert in_order(text, "fastest dp=4,tp=4,ep=16 160,000 80,000–320,000 TPS")
    assert "5.00× TP 8 × PP 2; 2.50× DP 2 × TP 8, EP 2; 1.25× EP 16; 1.19× EP 16 + overlap" in text
    assert in_order(text, "2.50× TP 8 × PP 2")


def test_nothing_fits_a_planner_beside() -> None:
    results = usual()
    rows = tuple(each for each in results.deployments if FASTEST not in each.roles)
    text = words(replace(results, deployments=rows), "Projected: the planner's best")
    assert in_order(text, "1,024 1,679 1 none")


def test_a_projection_beside_a_measurement_has_sections_of_its_own() -> None:
    measured = example_results.usual()
    plain = report_of(measured).sections
    both = report_of(measured.beside(replace(usual(), not_measured=None))).sections
    headings = [each.heading for each in plain if each.heading]
    assert [each.heading for each in both if each.heading in headings] == headings
    same = [each for each in both if each in plain]
    assert {each.heading for each in plain} - {each.heading for each in same} <= {
        "Controlled variables (the same for every deployment)"
    }
    for each in both:
        is_new = "rojected" in each.heading or "Controlled" in each.heading
        assert each in plain or is_new or each.chapter == "sure"


def test_all_baselines_and_no_scaling_are_said() -> None:
    results = usual()
    rows = tuple(
        replace(row, is_baseline=True)
        for row in results.deployments
        if EXPERIMENT in row.roles and SCALING not in row.roles
    )
    alone = replace(results, deployments=rows, plans=())
    said = words(alone, "Projected: verdict")  # the fastest against the first
    assert in_order(said, "EP 16 overlap 4.21× TP 8 × PP 2 decode")
    assert tells(words(alone, "Projected: scaling"), "no layouts ep")
    assert "Not searched" in words(alone, "Projected: the planner's best")
