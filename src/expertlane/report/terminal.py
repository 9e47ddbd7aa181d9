"""A report as tables in a terminal."""

import textwrap
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from expertlane.report.document import Answer, Figure, Report, Table, Words
from expertlane.report.numbers import setting_lines

# Headings of number columns are broken to this width, so that words have the room.
_NUM_HEADING_COLUMNS = 8


def show_answer(report: Report, console: Console, page: Path | None) -> None:
    """Print what fits on one screen, no wider than the console, and where the rest is.

    Args:
        page: has it, beside `--full`; None where no page was written.
    """
    draw_answer(report.answer, console)
    console.print()
    console.print(Text(f"More: --full{'' if page is None else f', or {page}'}"), soft_wrap=True)


def draw_answer(answer: Answer, console: Console) -> None:
    """Print the answer alone."""
    setting = " |\n".join(setting_lines(answer.setting, console.width))
    console.print(Text(setting, style="dim"))
    console.print(Text(answer.headline, style="bold"))
    for part in answer.parts:
        console.print()
        if not isinstance(part, str) and part.title:
            console.print(Text(part.title))
        console.print(_drawn(part, compact=True))


def show(report: Report, console: Console) -> None:
    """Print all but the plots, no wider than the console."""
    console.print(Rule(Text(report.title, style="bold"), characters="═"))
    for section in report.of_place("top", "tables"):
        console.print()
        console.print(Text(section.heading, style="bold cyan"))
        for position, part in enumerate(section.words):
            if isinstance(part, str):
                console.print(Padding(Text(part), (0, 0, 0, 1), expand=False))
                continue
            if position:
                console.print()
            if part.title:
                console.print(Padding(Text(part.title, style="italic"), (0, 0, 0, 1), expand=False))
            console.print(Padding(_drawn(part), (0, 0, 0, 1), expand=False))


def _drawn(part: Words, compact: bool = False) -> Text | RichTable:
    match part:
        case str():
            return Text(part)
        case Figure():
            return Text("\n".join(part.lines))
    return _table(part, compact)


def _table(table: Table, compact: bool = False) -> RichTable:
    """Compact: no rule under the headings, more between columns."""
    drawn = RichTable(
        box=None if compact else box.SIMPLE_HEAD,
        padding=(0, 2 if compact else 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        show_header=any(column.heading for column in table.columns),
        header_style="bold",
    )
    for position, column in enumerate(table.columns):
        heading = column.heading
        if column.is_number:
            widest = max((len(row[position]) for row in table.rows), default=0)
            width = max(widest, _NUM_HEADING_COLUMNS)
            heading = textwrap.fill(heading, width, break_long_words=False)
        drawn.add_column(
            Text(heading),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
            vertical="top",
        )
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
