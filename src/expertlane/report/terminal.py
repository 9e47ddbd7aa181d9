"""A report as tables in a terminal."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from expertlane.report.document import Answer, Figure, Report, Table, Words
from expertlane.report.numbers import setting_lines

_GAPS = 2, 1  # blanks between columns, and where two do not fit
_LEAST_HEADING = 8  # columns; headings of number columns are folded to this width
# After a comma or a hyphen within a word; not of a number.
_WITHIN = re.compile(r"(?<=,)(?=[^\d\s])|(?<=[A-Za-z]-)(?=[A-Za-z])")


def folded(text: str, width: int) -> list[str]:
    """Lines of whole words; a word that is too long is folded after commas and hyphens.

    What then is longer than the width stays whole.
    """
    lines = []
    for line in text.split("\n"):
        if cell_len(line) <= width:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        lines += _filled(line.split(), width, indent)
    return lines


def folded_figure(line: str, width: int) -> list[str]:
    """Lines of a figure's line, each with its indent; columns are not broken."""
    if cell_len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    parts = re.split(r"\s{3,}", line.strip())
    if len(parts) == 1:
        return _filled(line.split(), width, indent)
    return _joined([(part, "   ") for part in parts], width, indent)


def _filled(words: Sequence[str], width: int, indent: str) -> list[str]:
    pieces = []
    for word in words:
        parts = _WITHIN.split(word) if len(indent) + cell_len(word) > width else [word]
        pieces += [(part, "") for part in parts[:-1]] + [(parts[-1], " ")]
    return _joined(pieces, width, indent)


def _joined(pieces: Sequence[tuple[str, str]], width: int, indent: str) -> list[str]:
    """Args: pieces: each with what follows it on the same line."""
    lines, line, between = list[str](), "", ""
    for piece, after in pieces:
        if line and cell_len(indent + line + between + piece) > width:
            lines.append(indent + line)
            line, between = "", ""
        line += between + piece
        between = after
    return [*lines, indent + line]


def folded_table(table: Table, width: int) -> tuple[list[str], list[str]]:
    """The lines of the headings, and those of all rows.

    Columns of words are narrowed, the widest first, down to their longest word; then the gaps. What
    still does not fit is wider.
    """
    headings = [
        "\n".join(folded(column.heading, max(_LEAST_HEADING, *_lengths(table, place))))
        if column.is_number
        else column.heading
        for place, column in enumerate(table.columns)
    ]
    cells = [headings, *table.rows]
    widths, least = list[int](), list[int]()
    for place, column in enumerate(table.columns):
        texts = [row[place] for row in cells]
        widths.append(max(cell_len(line) for text in texts for line in text.split("\n")))
        words = [word for text in texts for word in text.split()]
        parts = [part for word in words for part in _WITHIN.split(word)]
        least.append(widths[-1] if column.is_number else max(map(cell_len, parts), default=0))
    gap = next((each for each in _GAPS if _total(least, each) <= width), _GAPS[-1])
    while _total(widths, gap) > width:
        narrowing = [place for place in range(len(widths)) if widths[place] > least[place]]
        if not narrowing:
            break
        widths[max(narrowing, key=widths.__getitem__)] -= 1
    numbers = [column.is_number for column in table.columns]
    drawn = [_row(row, widths, numbers, " " * gap) for row in cells]
    return drawn[0], [line for lines in drawn[1:] for line in lines]


def _lengths(table: Table, place: int) -> list[int]:
    return [0, *(cell_len(row[place]) for row in table.rows)]


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _row(
    cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool], gap: str
) -> list[str]:
    columns = [folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, columns), default=0)):
        parts = []
        for lines_of, width, is_number in zip(columns, widths, numbers, strict=True):
            part = lines_of[number] if number < len(lines_of) else ""
            blanks = " " * (width - cell_len(part))
            parts.append(blanks + part if is_number else part + blanks)
        lines.append(gap.join(parts).rstrip())
    return lines


_INDENT = " "  # indent below a heading


def show_answer(report: Report, console: Console, page: Path | None) -> None:
    """Print the answer, no wider than the console, and where the rest is.

    Args:
        page: the page with the rest, beside `--full`; None where none was written.
    """
    draw_answer(report.answer, console)
    console.print()
    more = ["More: --full"] if page is None else ["More: --full, or", str(page)]
    joined = " ".join(more)
    _print(console, [joined] if cell_len(joined) <= console.width else more)  # a path stays whole


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
