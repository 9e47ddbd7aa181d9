import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import pytest
from rich.console import Console

import example_pages
import example_results as example
import example_serving
from cli.screen import in_order, tells
from expertlane.report import markdown, terminal
from expertlane.report.document import Figure, Heading, Report, Section, Table
from expertlane.report.sections import report_of
from expertlane.report.setup import same_tokens, setup
from expertlane.report.terminal import folded, folded_figure, folded_table
from expertlane.results.results import Results
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from report.shown import in_terminal, tables, with_traffic
from report.test_snapshots import rebalanced


def many() -> Results:
    """Ten deployments: more than stand side by side."""
    return example.results(
        [
            (Deployment(f"TP 8 × PP 2, {n} micro-batches", Layout(tp=8, pp=2),
                        Options(num_micro_batches=n), is_baseline=True), 12.3456 + n)
            for n in range(1, 9)
        ]
        + [(example.EXPERT, 1.6), (example.OVERLAP, 1.7)],
        scaling=[(example.SMALL, 0.2)],
    )  # fmt: skip


def alone() -> Results:
    return example.results([(example.SMALL, 0.1)], output_len=1, num_cores=1)


def pieces(texts: Iterable[str]) -> Counter[str]:
    """Words, and the parts of those that may be folded."""
    return Counter(part for text in texts for word in text.split() for part in parts(word))


def parts(word: str) -> list[str]:
    """What a word may be folded into, after its commas and hyphens."""
    return [each for each in re.findall(r"[^,-]*[,-]*", word) if each]


@pytest.mark.smoke(4)
@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("make", [example.usual, many, alone, rebalanced])
def test_no_heading_and_no_cell_vanishes_and_no_word_is_broken(make, width: int) -> None:
    for part in report_of(make()).of_place("top", "tables"):
        for table in tables(part):
            headings = (column.heading for column in table.columns)
            cells = (cell for row in table.rows for cell in row)
            assert pieces(chain(*folded_table(table, width))) == pieces(chain(headings, cells))


@pytest.mark.smoke(4)
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_no_word_of_an_answer_or_of_all_tables_is_broken(make, columns: int) -> None:
    report = report_of(make())
    answer = report.answer
    wide, narrow = io.StringIO(), io.StringIO()
    for stream, width in ((wide, 1_000), (narrow, columns)):
        console = Console(file=stream, width=width)
        terminal.draw_answer(answer, console)
        terminal.show(replace(report, title=""), console)
    drawn = [
        pieces(line for line in each.getvalue().splitlines() if line.strip(" ─═"))
        for each in (wide, narrow)
    ]
    for each in drawn:
        for word in [word for word in each if set(word) <= {"─", "═"}]:
            del each[word]
    assert drawn[0] == drawn[1]


def test_folding() -> None:
    assert folded("a deployment rotating", 12) == ["a deployment", "rotating"]
    assert folded("--max-num-batched-tokens 1", 12) == ["--max-num-", "batched-", "tokens 1"]
    assert folded("dp=16,ep=16 1,024", 8) == ["dp=16,", "ep=16", "1,024"]
    assert folded("unbreakable", 4) == ["unbreakable"]
    line = "  bubble −57   dispatch +22   waiting +10"
    assert folded_figure(line, 32) == ["  bubble −57   dispatch +22", "  waiting +10"]
    names = Table("", (Heading("deployment", False), Heading("n")), (("rotating, overlap", "1"),))
    assert folded_table(names, 15) == (["deployment    n"], ["rotating,     1", "overlap"])
    assert folded_table(names, 4) == (["deployment n"], ["rotating,  1", "overlap"])  # wider


def test_markdown_escapes_what_it_would_read() -> None:
    odd = Deployment("a|b *c* <d> `e`", Layout())
    page = markdown.render(report_of(example.results([(odd, 0.1)])))
    assert r"| 1 | a\|b \*c\* \<d> \`e\` |" in page


def test_other_tokens_of_deployments_that_round_are_told_so() -> None:
    def of(*changes: tuple[bool, bool]) -> str:
        """Of three deployments; which round, and whose tokens are others."""
        exact = example.usual().deployments[0]
        rounded = with_traffic(exact, payload_error=0.002)
        return same_tokens(
            [
                replace(rounded if rounds else exact, tokens_sha256=("1" if is_other else "0") * 64)
                for rounds, is_other in changes
            ]
        )

    equal = "identical 1 3"
    assert in_order(of((False, False), (True, True), (True, True)), f"{equal} #2 #3 hidden")
    assert in_order(
        of((False, False), (False, True), (True, True)), f"{equal} #3 hidden #2 nothing"
    )
    assert in_order(of((True, False), (False, True), (False, True)), f"{equal} #2 #3 first hidden")
    assert tells(of((True, False), (True, False), (True, False)), "identical all 3")


def test_other_tokens_of_deployments_whose_options_round_are_told_so() -> None:
    exact = example.usual().deployments[0]

    def of(*options: Options) -> str:
        return same_tokens(
            [
                replace(exact, options=each, tokens_sha256=str(number) * 64)
                for number, each in enumerate(options)
            ]
        )

    activations, cache = Options(activations="float8"), Options(kv_dtype="float8")
    both = Options(weights="int8", kv_dtype="float8")
    equal = "identical 1 4"
    assert in_order(
        of(Options(), Options(), activations, both),
        f"{equal} #3 inputs #4 weights, keys #2 nothing",
    )
    assert in_order(of(cache, cache, activations, both), f"{equal} #2 #3 #4 first keys values")


NASTY = "[red]EP[/red] [link=http://x]\x1b]0;t\x07\x9b2J\u202e|`\n# no heading\n```"
ESCAPED = "[red]EP[/red] [link=http://x]\\x1b]0;t\\x07\\x9b2J\\u202e|`\\n# no heading\\n```"


def test_names_neither_move_a_cursor_nor_break_a_table() -> None:
    results = example_serving.RESULTS
    results = replace(results, question={**results.question, "model": NASTY}, command=NASTY)
    shown = in_terminal(results, 400)
    text = markdown.render(report_of(results))
    for each in (shown, text):
        assert not set(each) & set("\x1b\x07\x9b\u202e\r")
    assert ESCAPED in shown
    assert "# no heading" not in text.splitlines()
    named = [line for line in text.splitlines() if "no heading" in line and line[0] == "|"]
    assert named
    for line in named:
        assert "\\|\\`" in line
        assert "\\[red]" in line


def test_a_fence_is_longer_than_what_is_in_it() -> None:
    part = Figure("a", ("x ```", "````", "<script>"))
    text = markdown.render(Report("", "", "", "", "", (Section("b", (part,)),)))
    assert text.endswith("\n`````text\nx ```\n````\n<script>\n`````\n")


def test_what_a_model_lacks_is_not_listed() -> None:
    table = setup(example.usual(), "Setup").parts[0]
    (model,) = (row[1] for row in table.rows if row[0] == "model")
    assert "num_experts 16, " in model
    assert "routing (scoring_func softmax, norm_topk_prob, " in model
    assert not {"None", "False", "True", "[]"} & set(model.replace(",", " ").split())
    assert "{" not in model
