"""A report as text, and as HTML inside a notebook."""

import io
import re
from html import escape
from itertools import chain

from rich.console import Console

from expertlane.report import terminal
from expertlane.report.document import Answer, Figure, Table, Words
from expertlane.report.folding import folded_figure

_WIDTH = 80


def answer_text(answer: Answer) -> str:
    """What a terminal of 80 columns shows."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=_WIDTH, color_system=None, markup=False, emoji=False, highlight=False
    )
    terminal.draw_answer(answer, console)
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)


def answer_html(answer: Answer) -> str:
    """The answer as a piece of HTML; whatever is in its words is escaped."""
    parts = "".join(map(_part, answer.parts))
    return f"<p>{escape(answer.setting)}<br><b>{escape(answer.headline)}</b></p>{parts}"


def page_frame(page: str) -> str:
    """A whole page as a piece of HTML, in a frame that cannot reach what is around it."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: 700px; border: 0"></iframe>'
    )


def _part(part: Words) -> str:
    match part:
        case str():
            return f"<p>{escape(part)}</p>"
        case Figure():
            lines = chain.from_iterable(folded_figure(line, _WIDTH) for line in part.lines)
            return f"<p>{escape(part.title)}</p><pre>{escape(chr(10).join(lines))}</pre>"
    return _table(part)


def _table(table: Table) -> str:
    sides = ["right" if column.is_number else "left" for column in table.columns]

    def row(cells: tuple[str, ...], kind: str) -> str:
        drawn = (
            f'<{kind} style="text-align: {side}; padding: 0 .6em">{escape(cell)}</{kind}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(drawn)}</tr>"

    headings = tuple(column.heading for column in table.columns)
    caption = (
        f'<caption style="text-align: left">{escape(table.title)}</caption>' if table.title else ""
    )
    rows = "".join(row(cells, "td") for cells in table.rows)
    return f"<table>{caption}<thead>{row(headings, 'th')}</thead><tbody>{rows}</tbody></table>"
