"""The page of a projection, from hand-made values."""

import io
from dataclasses import asdict, replace

import pytest
from rich.cells import cell_len
from rich.console import Console

import example_projection as example
import example_results
from expertlane.report import content, markdown, terminal
from expertlane.report.document import Section, Table
from expertlane.report.projected_paper import against_best, combinations
from expertlane.results.schema import Results
from expertlane.spec.model import PRESETS

PAPER = asdict(PRESETS["paper"])
SMALL = asdict(PRESETS["paper-small"])


def section(results: Results, beginning: str) -> Section:
    found = [each for each in content.sections(results) if each.heading.startswith(beginning)]
    assert found, beginning
    return found[0]


def table(results: Results, beginning: str, number: int = 0) -> Table:
    tables = [part for part in section(results, beginning).parts if isinstance(part, Table)]
    return tables[number]


def words(results: Results, beginning: str) -> str:
    return " ".join(part for part in section(results, beginning).parts if isinstance(part, str))


def test_the_verdict_stands_first_with_every_part() -> None:
    results = example.results(PAPER)
    assert content.sections(results)[0].heading == (
        "Projected: verdict (h100x16, nothing here was measured)"
    )
    assert table(results, "Projected: verdict").rows == (
        ("baseline: TP 8 × PP 2", "32,000", "16.0–64.0", "32.0", "16.0–64.0", "1.00", "0.500"),
        (
            "best baseline: DP 2 × TP 8, EP 2",
            "64,000",
            "32.0–128",
            "16.0",
            "8.00–32.0",
            "2.00",
            "1.00",
        ),
        (
            "best proposal: EP 16 + overlap",
            "134,737",
            "67.4–269",
            "7.60",
            "3.80–15.2",
            "4.21",
            "2.11",
        ),
        (
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
    assert "Nothing was measured here: it needs 16 GB but 1 GB is free." in text
    assert "Top-2: EP 16 + overlap has 4.21× the decode TPS of the first baseline" in text
    assert "With skewed routing the best proposal, EP 16 + overlap, has 2.11× the decode" in text
    assert "Most of it is extrapolated: 90% of these steps' time" in text


def test_steps_that_do_not_fit_are_marked_and_those_that_do_stand_beside() -> None:
    results = example.results(PAPER)
    rows = table(results, "Projected: speed (top-2").rows
    assert rows[0] == ("1", "TP 8 × PP 2", "204,800", "8.00", "16.0", "32.0", "64.0*", "48.0")
    assert "* 1,024 sequences of so many tokens do not fit" in words(results, "Projected: speed")
    assert table(results, "Projected: memory").rows[2][-1] == "768"
    assert "No deployment holds all 1,024 sequences" in words(results, "Projected: memory")


def test_every_condition_has_a_column() -> None:
    results = example.results(PAPER)
    first = table(results, "Projected: routing and execution")
    assert [column.heading for column in first.columns[2:]] == [
        "graph, balanced",
        "graph, skewed",
        "eager, balanced",
        "eager, skewed",
    ]
    assert first.rows[2] == ("3", "EP 16", "8.00", "16.0", "12.0", "24.0")
    text = words(results, "Projected: routing and execution")
    assert "Without graphs a decode step takes up to 50% longer." in text


def test_the_goals_have_evidence() -> None:
    results = example.results(PAPER)
    assert "at once: 16, with #3, #4" in words(results, "Projected, goals 1 and 2")
    overlap = table(results, "Projected, goal 3").rows[0]
    assert overlap == (
        "top-2", "#3, #4", "8.00", "7.60", "1.60", "25%", "0 B", "5.3%",
    )  # fmt: skip
    scaling = words(results, "Projected, goal 4")
    assert "TPS per GPU goes to 0.250×" in scaling
    assert "as if they did: ep=1; ep=1 has 72.0 GB of weights on a GPU where 70.0 GB" in scaling
    assert "GPUs are filled with copies of experts" in scaling


def test_where_the_reported_factor_would_come_from() -> None:
    projection = example.usual()
    found = combinations(projection)
    assert len(found) == 2 * 2 * 4 * 8
    reaching = [each for each in found if each.factor >= 3.75]
    assert {each.baseline.name for each in reaching} == {"TP 8 × PP 2"}
    assert {each.baseline.routing for each in reaching} == {"balanced"}
    assert len(reaching) == 2 * 4 * 4  # both proposals, all contexts, top-k and execution
    best = against_best(found)
    assert len(best) == 2 * 4 * 8
    assert max(each.factor for each in best) == pytest.approx(4 / 1.9)

    results = example.results(PAPER)
    text = words(results, "Projected: where 3.75× would come from")
    assert text.startswith("128 combinations (2 baselines × 2 proposals × 4 contexts × 2 numbers")
    assert "32 reach 3.75×" in text
    assert "share: baseline TP 8 × PP 2 (all), routing balanced (all)" in text
    assert "Against the best baseline of the same conditions and context: 0 of 64 reach it" in text
    numbers = words(results, "Projected: the reported numbers")
    assert "120,000 TPS: within the bounds of" in numbers
    assert "The reported 2.2 ms is above it only up to" in numbers


def test_reported_values_stand_in_a_table_of_their_own() -> None:
    results = example.results(PAPER)
    for each in content.sections(results):
        for part in each.parts:
            if isinstance(part, Table) and "450,000" in str(part.rows):
                assert each.heading == "The paper's table (reported, not projected)"


def test_a_model_that_is_not_the_papers_is_not_held_against_it() -> None:
    headings = [each.heading for each in content.sections(example.results(SMALL))]
    assert not any("reported" in heading or "3.75" in heading for heading in headings)
    assert any(heading.startswith("Projected: speed") for heading in headings)


def test_the_planners_best_is_set_against_each() -> None:
    text = words(example.results(PAPER), "Projected: the best layout")
    assert "the fastest is dp=4,tp=4,ep=16; plain: 160,000 TPS" in text
    assert "5.00× TP 8 × PP 2; 2.50× DP 2 × TP 8, EP 2; 1.25× EP 16; 1.19× EP 16 + overlap" in text
    assert "Top-1, decode at 1,024: of 1,679 deployments (1 too large) none holds all" in text
    assert "with 2.50× the output of TP 8 × PP 2" in text


def test_a_projection_beside_a_measurement_has_sections_of_its_own() -> None:
    measured = example_results.usual()
    plain = content.sections(measured)
    projection = replace(example.usual(), not_measured=None)
    both = content.sections(replace(measured, projection=projection))
    added = [each for each in both if each not in plain]
    assert [each for each in both if each in plain] == list(plain)
    assert all(each.heading.startswith("Projected") for each in added)


def test_all_baselines_and_no_scaling_are_said() -> None:
    projection = example.usual()
    rows = tuple(replace(row, is_baseline=True) for row in projection.deployments)
    alone = replace(projection, deployments=rows, scaling=(), planned=())
    results = example.results(SMALL, alone)
    assert "no deployment is a proposal" in words(results, "Projected: verdict")
    assert "no layouts of growing ep" in words(results, "Projected, goal 4")
    assert "Not looked for" in words(results, "Projected: the best layout")


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("model", [PAPER, SMALL])
def test_no_line_is_wider_than_the_console_and_no_number_cut(model, width: int) -> None:
    results = example.results(model)
    stream = io.StringIO()
    terminal.show(results, Console(file=stream, width=width))
    text = stream.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    for each in content.sections(results):
        for part in each.parts:
            if isinstance(part, Table):
                for row in part.rows:
                    for column, cell in zip(part.columns, row, strict=True):
                        assert not column.is_number or cell in text


def test_markdown_holds_every_section() -> None:
    results = example.results(PAPER)
    page = markdown.render(results)
    for each in content.sections(results):
        assert f"\n## {each.heading}\n" in page.replace("\\", "")
