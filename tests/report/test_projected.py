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
