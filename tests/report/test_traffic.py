from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import example_results as example
from cli.screen import in_order, tells
from expertlane.report import markdown
from expertlane.report.charts.squares import matrix
from expertlane.report.compared import run
from expertlane.report.document import Figure, Table
from expertlane.report.sections import report_of
from expertlane.report.traffic import details, hot_spots
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from report.shown import in_terminal, with_traffic


def shown(results, width):
    return in_terminal(results.with_traffic(), width)


def sections(results):
    return details(run(results, "measured"), results.machine.ranks_per_node)


def facts(results, number):
    section = sections(results)[number - 1]
    return dict(section.parts[-1].rows)


def test_ranks_stand_apart_by_node():
    figure = matrix([[0, 1500, 20, 0], [40, 0, 0, 0], [0, 0, 0, 12_000], [0, 0, 999_400, 0]], 2)
    assert figure == Figure(
        "Payload in kB, one repetition: from rank (row) to rank (column)",
        (
            "      0   1│   2   3",
            "  0   · 1.5│ <.1   ·",
            "  1 <.1   ·│   ·   ·",
            "───────────┼────────",
            "  2   ·   ·│   ·  12",
            "  3   ·   ·│ 999   ·",
        ),
    )


def test_one_node_and_ranks_each_on_its_own_have_no_borders():
    for ranks_per_node in (1, 8):
        figure = matrix([[0, 7], [8, 0]], ranks_per_node)
        assert figure.lines == ("      0   1", "  0   · 7.0", "  1 8.0   ·")
        assert figure.title.startswith("Payload in B,")


def test_many_ranks_are_drawn_by_node():
    figure = matrix([[1] * 20 for _ in range(20)], 8)  # nodes of 8, 8 and 4 ranks
    assert tells(figure.title, "B node row column")
    assert figure.lines == (
        "      0   1   2",
        "  0  64  64  32",
        "  1  64  64  32",
        "  2  32  32  16",
    )


def test_what_is_not_drawn():
    assert tells(matrix([[0]], 8), "One no traffic")
    assert tells(matrix([[1] * 17 for _ in range(17)], 1), "17 nodes many")


def test_nothing_sent_has_no_unit_to_find():
    assert matrix([[0, 0], [0, 0]], 2).lines == ("      0   1", "  0   ·   ·", "  1   ·   ·")


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 10**15), min_size=4, max_size=4), st.integers(1, 3))
def test_lines_are_of_one_width(cells, ranks_per_node):
    figure = matrix([cells[:2], cells[2:]], ranks_per_node)
    assert len({len(line) for line in figure.lines}) == 1


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_console_and_no_matrix_is_broken(width):
    results = example.usual()
    text = shown(results, width)
    assert max(map(cell_len, text.splitlines())) <= width
    for section in sections(results):
        for part in section.parts:
            if isinstance(part, Figure):
                assert all(f" {line}" in text for line in part.lines)


def test_the_short_form_is_always_there_and_the_long_one_if_asked_for():
    results = example.usual()
    page = markdown.render(report_of(results))
    full = markdown.render(report_of(results.with_traffic()))
    for text in (page, full):
        assert "\n## Spread and hot spots of decode\n" in text
    assert "Traffic of #3" not in page
    assert "\n## Traffic of #3 EP 16, decode\n" in full
    assert "```text\n      0   1   2   3   4   5   6   7│   8" in full


def test_the_short_form_by_hand():
    # Of four tokens one reaches one rank, three two; one reaches two nodes.
    section = hot_spots(run(example.usual(), "measured"))
    spread, hottest = (part for part in section.parts if isinstance(part, Table))
    padding = "0.3%"  # 15 × 5 of 16 × 15 × 108 bytes
    assert spread.rows[2] == ("3", "EP 16", "1.75", "1.25", "0.500", "0.250", padding)
    receives = "0 (1.04×)"  # 15 × 113 of 15 × 108 + 75 / 16 in the mean
    assert hottest.rows[2] == (
        "3", "EP 16", receives, "0 (1.00×)", "0/0 (6.2%)", "0 (1.00×)", "0 (100%)",
    )  # fmt: skip
    assert hottest.rows[0][-1] == "—"  # tensor parallel: no dispatch at which anybody waits


def test_the_long_form_by_hand():
    found = facts(example.usual(), 4)
    assert found["payload per step, intra-node"] == "11.2 kB"  # 16 × 7 × 100
    assert found["payload per step, inter-node"] == "12.8 kB"
    assert found["tokens by ranks reached"] == "1: 25%, 2: 75%"
    assert in_order(found["copies between nodes"], "64 rank 32 node 50%")
    assert found["receives most"] == "rank 0: 3.39 kB, 1.04× the mean"  # two steps of 1,695
    assert tells(found["stragglers"], "rank 0 100% 2")


def test_steps_that_differ_are_told_by_mean_and_ends():
    results = example.usual()
    first = results.deployments[0]
    changed = with_traffic(
        first, payload_bytes_of_step={"intra-node": (1000, 2000, 6000), "inter-node": (0, 0, 0)}
    )
    found = facts(replace(results, deployments=(changed, *results.deployments[1:])), 1)
    assert found["payload per step, intra-node"] == "3.00 kB on average, 1.00 kB to 6.00 kB"
    assert found["payload per step, inter-node"] == "0 B"


def test_one_rank_alone():
    alone = example.results([(Deployment("alone", Layout()), 0.1)], output_len=1)
    assert tells(shown(alone, 80), "One no traffic")
    assert "Traffic of #1 alone, prefill" in shown(alone, 80)


def test_records_without_fan_out_say_nothing_of_it():
    results = example.usual()
    first = results.deployments[0]
    changed = with_traffic(
        first, fan_out=None, receiver=None, busiest=None, expert=None, layer=None
    )
    given = replace(results, deployments=(changed, *results.deployments[1:]))
    found = facts(given, 1)
    assert "copies between nodes" not in found
    assert found["receives most"] == found["computes most"] == "—"
    spread = hot_spots(run(given, "measured")).parts[0]
    assert spread.rows[0][2:6] == ("—",) * 4
    assert report_of(given.with_traffic())


def test_a_narrower_payload_says_what_it_changes():
    results = example.usual()
    first = with_traffic(results.deployments[0], payload_error=0.0263)
    rounded = replace(first, options=replace(first.options, payload="float8"))
    given = replace(results, deployments=(rounded, *results.deployments[1:]))
    assert tells(hot_spots(run(given, "measured")).parts[-1], "#1 float8 2.63%")
