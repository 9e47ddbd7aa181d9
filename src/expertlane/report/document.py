"""The shape of a report, the same for the terminal and for Markdown."""

from dataclasses import dataclass, replace
from typing import Any

from expertlane.spec.printable import printable


@dataclass(frozen=True)
class Column:
    """A column's heading and the side its cells lean to."""

    heading: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: may be empty.
        rows: each as long as `columns`.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """Lines of characters that stand under each other."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A heading, then paragraphs, tables and figures in order.

    Attributes:
        leads: whether it belongs on top of a page.
    """

    heading: str
    parts: tuple[str | Table | Figure, ...]
    leads: bool = False


def printable_section(section: Section) -> Section:
    """The section with its unsafe characters escaped: names in it are anybody's."""
    return replace(
        section,
        heading=printable(section.heading),
        parts=tuple(map(_printable_part, section.parts)),
    )


def _printable_part(part: str | Table | Figure) -> str | Table | Figure:
    match part:
        case str():
            return printable(part)
        case Table():
            return Table(
                printable(part.title),
                tuple(replace(each, heading=printable(each.heading)) for each in part.columns),
                tuple(tuple(map(printable, row)) for row in part.rows),
            )
        case Figure():
            return Figure(printable(part.title), tuple(map(printable, part.lines)))


def text(heading: str) -> Column:
    """A column of words."""
    return Column(heading, is_number=False)


def number(heading: str) -> Column:
    """A column of numbers."""
    return Column(heading)


@dataclass(frozen=True)
class Legend:
    """What a colour stands for; `colour` is a variable of the page's style sheet, `--blue`."""

    label: str
    colour: str
    shape: str = "square"


@dataclass(frozen=True)
class Chart:
    """A plot of a page, with the numbers in it as a table.

    Attributes:
        words: what it shows, for who can't see it.
        spec: Vega-Lite; colours may be variables of the page's style sheet.
        table: all that is plotted, or, of very many values, what matters of them.
        note: how to read it; may be empty.
        data: of a timeline, what the page's script draws; None of other plots.
    """

    title: str
    words: str
    spec: dict[str, Any]
    table: Table
    legend: tuple[Legend, ...] = ()
    note: str = ""
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Tabs:
    """Plots of which one is shown at a time, by what they are called."""

    title: str
    charts: tuple[tuple[str, Chart], ...]


@dataclass(frozen=True)
class Timelines:
    """Plots under each other on one time axis, by what they are called; `open` are seen at once."""

    title: str
    charts: tuple[tuple[str, Chart], ...]
    open: frozenset[str]


@dataclass(frozen=True)
class PageSection:
    """A part of a page, with plots among its words and tables."""

    heading: str
    parts: tuple[str | Table | Figure | Chart | Tabs | Timelines, ...]
