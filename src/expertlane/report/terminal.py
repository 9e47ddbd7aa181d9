"""A report as tables in a terminal."""

from collections.abc import Iterable
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from expertlane.report.document import Answer, Figure, Report, Table, Words
from expertlane.report.folding import folded, folded_figure, folded_table
from expertlane.report.numbers import setting_lines

_INDENT = " "  # indent below a heading


def show_answer(report: Report, console: Console, page: Path | None) -> None:
    """Print the answer, no wider than the console, and where the rest is.

    Args:
        page: the page with the rest, beside `--full`; None where none was written.
    """
    draw_answer(report.answer, console)
    console.print()
    _print(console, [f"More: --full{'' if page is None else f', or {page}'}"])


def draw_answer(answer: Answer, console: Console) -> None:
    """Print the answer alone."""
    setting = " |\n".join(setting_lines(answer.setting, console.width))
    _print(console, folded(setting, console.width), "dim")
    _print(console, folded(answer.headline, console.width), "bold")
    for part in answer.parts:
        console.print()
        if not isinstance(part, str) and part.title:
            _print(console, folded(part.title, console.width))
        _draw(part, console)


def show(report: Report, console: Console) -> None:
    """Print all but the plots, no wider than the console."""
    console.print(Rule(Text(report.title, style="bold"), characters="═"))
    width = console.width - len(_INDENT)
    for section in report.of_place("top", "tables"):
        if section.heading:
            console.print()
            _print(console, folded(section.heading, console.width), "bold cyan")
        for position, part in enumerate(section.words):
            if not isinstance(part, str):
                if position:
                    console.print()
                if part.title:
                    _print(console, folded(part.title, width), "italic", _INDENT)
            _draw(part, console, _INDENT, has_rule=True)


def _draw(part: Words, console: Console, indent: str = "", has_rule: bool = False) -> None:
    """Args: has_rule: whether a line is drawn under a table's headings."""
    width = console.width - len(indent)
    match part:
        case str():
            _print(console, folded(part, width), indent=indent)
        case Figure():
            lines = (folded_figure(line, width) for line in part.lines)
            _print(console, (line for each in lines for line in each), indent=indent)
        case Table():
            headings, rows = folded_table(part, width)
            if any(column.heading for column in part.columns):
                _print(console, headings, "bold", indent)
                if has_rule:
                    _print(console, ["─" * max(map(cell_len, headings + rows))], indent=indent)
            _print(console, rows, indent=indent)


def _print(console: Console, lines: Iterable[str], style: str = "", indent: str = "") -> None:
    """Print lines as they are, whatever the console's width."""
    for line in lines:
        console.print(Text(indent) + Text(line, style=style), soft_wrap=True)
