"""The shape of a report, the same for the terminal and for Markdown."""

from dataclasses import dataclass


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
    """A heading, then paragraphs, tables and figures in order."""

    heading: str
    parts: tuple[str | Table | Figure, ...]


def text(heading: str) -> Column:
    """A column of words."""
    return Column(heading, is_number=False)


def number(heading: str) -> Column:
    """A column of numbers."""
    return Column(heading)
