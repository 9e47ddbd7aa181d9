import io
from dataclasses import replace

import pytest
from rich.box import Box
from rich.cells import cell_len
from rich.console import Console

import example_results as example
import example_serving
from expertlane.report import content, markdown, terminal
from expertlane.report.document import Figure, Section, Table
from expertlane.report.rounding import same_tokens
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.schema import Results
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

# The report's own box, with borders that can be seen; the line below the headings has none.
_WITH_BORDERS = Box("    \n  │ \n ── \n  │ \n    \n    \n  │ \n    \n")


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


def shown(results: Results, width: int) -> str:
    stream = io.StringIO()
    terminal.show(results, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("make", [example.usual, many, alone])
def test_no_line_is_wider_than_the_console(make, width: int) -> None:
    assert max(map(cell_len, shown(make(), width).splitlines())) <= width


@pytest.mark.parametrize("width", [80, 100])
def test_no_number_is_cut(width: int) -> None:
    text = shown(many(), width)
    for table in (part for section in content.sections(many()) for part in section.parts):
        if isinstance(table, Table):
            for row in table.rows:
                for column, cell in zip(table.columns, row, strict=True):
                    assert not column.is_number or cell in text
    assert "…" not in text


def rebalanced() -> Results:
    """Decisions with large numbers."""
    taken = RebalanceResult(
        replica=0,
        step=123_456,
        switched=123_789,
        gain_s=1234.5,
        cost_s=5432.1,
        num_bytes=987_000_000,
        predicted_before=12.3,
        predicted_after=10.1,
        load_before=12.3,
        load_after=10.2,
        experts_s_before=1234.5,
        experts_s_after=1111.1,
    )
    given = example.usual()
    *others, last = given.deployments
    late = replace(taken, switched=None, gain_s=9999.9, load_after=None, experts_s_after=None)
    return replace(given, deployments=(*others, replace(last, rebalances=(taken, late))))


def columns_as_drawn(table: Table, width: int) -> list[str]:
    """Of each column its heading and cells one after another, without any space."""
    drawn = terminal._table(table)
    drawn.box = _WITH_BORDERS
    stream = io.StringIO()
    Console(file=stream, width=width - 1).print(drawn)  # the report is one column to the right
    lines = [line.split("│") for line in stream.getvalue().splitlines() if "│" in line]
    return ["".join("".join(column).split()) for column in zip(*lines, strict=True)]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("make", [example.usual, many, alone, rebalanced])
def test_no_heading_and_no_cell_vanishes(make, width: int) -> None:
    for section in content.sections(make(), traffic=True):
        for table in (part for part in section.parts if isinstance(part, Table)):
            headings = (column.heading for column in table.columns)
            expected = [
                "".join("".join(column).split())
                for column in zip(headings, *table.rows, strict=True)
            ]
            assert columns_as_drawn(table, width) == expected


def test_both_renderers_hold_every_part() -> None:
    given = example.usual()
    page = markdown.render(given)
    text = " ".join(shown(given, 100).split())
    for section in content.sections(given):
        assert section.heading in text
        assert f"\n## {section.heading}\n" in page
        for part in section.parts:
            if isinstance(part, str):
                assert " ".join(part.split()) in text


def test_markdown_tables_are_rectangular() -> None:
    lines = [line for line in markdown.render(many()).splitlines() if line.startswith("|")]
    page = markdown.render(many())
    assert page.startswith("# expertlane: example, top-2\n\n## Verdict\n\nFaster here: ")
    assert (
        "| # | deployment | layout | ranks | each rank holds, weights |\n"
        "| --- | --- | --- | ---: | --- |" in page
    )
    assert (
        "| 9 | EP 16 | dp=16,ep=16 | 16 | 4 layers × 1 expert, all of each; up to 1.02 kB |" in page
    )
    assert len(lines) > 80


def test_markdown_escapes_what_it_would_read() -> None:
    odd = Deployment("a|b *c* <d> `e`", Layout())
    page = markdown.render(example.results([(odd, 0.1)]))
    assert r"| 1 | a\|b \*c\* \<d> \`e\` |" in page


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    odd = Deployment("[red]x[/red]", Layout())
    assert "[red]x[/red]" in shown(example.results([(odd, 0.1)]), 100)


def test_shared_cores_are_told() -> None:
    assert "16 ranks share 2 cores" in markdown.render(example.usual())
    own = example.results([(example.TENSOR, 0.1), (example.EXPERT, 0.1)], num_cores=16)
    assert "ranks share" not in markdown.render(own)


def test_the_papers_numbers_are_labelled_and_apart() -> None:
    sections = content.sections(example.usual())
    paper = sections[-1]
    assert "reported, other hardware" in paper.heading
    table = next(part for part in paper.parts if isinstance(part, Table))
    assert table.rows == (
        ("baseline: TP=8, PP=2", "reported", "120,000", "8.3", "1.00×", "1.00×"),
        ("proposed: EP=16", "reported", "450,000", "2.2", "3.75×", "3.77×"),
    )
    for section in sections[:-1]:
        for part in section.parts:
            assert not isinstance(part, Table) or "450,000" not in str(part.rows)


def test_other_tokens_are_told() -> None:
    given = example.usual()
    other = replace(given.deployments[2], tokens_sha256="0" * 64)
    changed = replace(given, deployments=(*given.deployments[:2], other, given.deployments[3]))
    assert "identical in all 4 deployments" in markdown.render(given)
    assert "identical to the first deployment's in 3 of 4; others with #3 (nothing is rounded)" in (
        markdown.render(changed).replace("\\", "")
    )


def test_other_tokens_of_deployments_that_round_are_told_so() -> None:
    def of(*changes: tuple[bool, bool]) -> str:
        """Of three deployments; which round, and whose tokens are others."""
        exact = example.usual().deployments[0]
        (phase,) = {*exact.traffic} - {Phase.PREFILL}
        rounded = {phase: replace(exact.traffic[phase], payload_error=0.002)}
        return same_tokens(
            [
                replace(
                    exact,
                    traffic=rounded if rounds else exact.traffic,
                    tokens_sha256="1" * 64 if is_other else "0" * 64,
                )
                for rounds, is_other in changes
            ]
        )

    equal = "identical to the first deployment's in 1 of 3; others with "
    assert of((False, False), (True, True), (True, True)) == (
        f"{equal}#2, #3 (hidden states are rounded)"
    )
    assert of((False, False), (False, True), (True, True)) == (
        f"{equal}#3 (hidden states are rounded) and with #2 (nothing is rounded)"
    )
    assert of((True, False), (False, True), (False, True)) == (
        f"{equal}#2, #3: the first rounds hidden states"
    )
    assert of((True, False), (True, False), (True, False)).startswith("identical in all 3 ")


def test_gains_against_the_best_baseline_stand_apart_where_it_is_not_the_first() -> None:
    def titles(results: Results) -> list[str]:
        gains = next(part for part in content.sections(results) if part.heading == "Gains")
        return [part.title for part in gains.parts if isinstance(part, Table)]

    assert titles(example.usual()) == [
        "Against the first, TP 8 × PP 2",
        "Against the best baseline, TP 8 × PP 2, 2 micro-batches rotating",
    ]
    one = example.results([(example.TENSOR, 0.2), (example.EXPERT, 0.1)])
    assert titles(one) == ["Against the first, TP 8 × PP 2, also the best baseline"]


NASTY = "[red]EP[/red] [link=http://x]\x1b]0;t\x07\x9b2J\u202e|`\n# no heading\n```"
ESCAPED = "[red]EP[/red] [link=http://x]\\x1b]0;t\\x07\\x9b2J\\u202e|`\\n# no heading\\n```"


def test_names_neither_move_a_cursor_nor_break_a_table() -> None:
    results = replace(example_serving.RESULTS, model=NASTY, command=NASTY)
    stream = io.StringIO()
    terminal.show(results, Console(file=stream, width=400))
    text = markdown.render(results)
    for each in (stream.getvalue(), text):
        assert not set(each) & set("\x1b\x07\x9b\u202e\r")
    assert ESCAPED in stream.getvalue()
    assert "# no heading" not in text.splitlines()
    named = [line for line in text.splitlines() if "no heading" in line and line[0] == "|"]
    assert named
    for line in named:
        assert "\\|\\`" in line
        assert "\\[red]" in line


def test_a_fence_is_longer_than_what_is_in_it(monkeypatch) -> None:
    part = Figure("a", ("x ```", "````", "<script>"))
    monkeypatch.setattr(markdown.kinds, "sections", lambda *_, **__: (Section("b", (part,)),))
    text = markdown.render(alone())
    assert text.endswith("\n`````text\nx ```\n````\n<script>\n`````\n")
