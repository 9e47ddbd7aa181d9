"""The structure of a report, whatever its subject and output format."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from expertlane.printable import printable
from expertlane.report.numbers import NONE
from expertlane.results.record import RUN, Source

_FEWEST, _MOST = 4, 8  # numbers of a row that folds; fewer fit a phone, more are a matrix
ColumnSource = Source | Literal["wall"] | None
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Heading:
    """A drawn column's heading and the side its cells lean to."""

    heading: str
    is_number: bool = True


@dataclass(frozen=True)
class Column(Heading, Generic[T]):
    """A column of a table, with its value for each item.

    Attributes:
        get: gets the value of an item; None is shown as a dash.
        show: formats the value.
        source: of the records that have it: `measured` is of virtual time too, `wall` of wall
            time alone; None where it is said of all.
    """

    get: Callable[[T], Any] = str
    show: Callable[[Any], str] = str
    source: ColumnSource = None

    def cell(self, item: T) -> str:
        """The item's value as text."""
        value = self.get(item)
        return NONE if value is None else self.show(value)

    def of(self, part: Callable[[U], T | None]) -> "Column[U]":
        """The same column for items that have a `part`; a dash where it is None."""

        def get(whole: U) -> Any:
            found = part(whole)
            return None if found is None else self.get(found)

        return Column(self.heading, self.is_number, get, self.show, self.source)


def text(heading: str, get: Callable[[T], Any], source: ColumnSource = None) -> Column[T]:
    """A column of words."""
    return Column(heading, False, get, str, source)


def number(
    heading: str,
    get: Callable[[T], Any],
    show: Callable[[Any], str] = str,
    source: ColumnSource = None,
) -> Column[T]:
    """A column of numbers."""
    return Column(heading, True, get, show, source)


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: may be empty.
        rows: each as long as `columns`.
    """

    title: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls,
        title: str,
        columns: Iterable[Column[T]],
        items: Iterable[T],
        source: Source | None = None,
    ) -> "Table":
        """A row for each item, with the columns for records of this source."""
        of: set[ColumnSource] = {None, "measured" if source in RUN else source}
        of |= {"wall"} if source == "measured" else set()
        columns = [each for each in columns if each.source in of]
        rows = (tuple(column.cell(item) for column in columns) for item in items)
        headings = tuple(Heading(each.heading, each.is_number) for each in columns)
        return cls(title, headings, tuple(rows))

    @classmethod
    def across(
        cls, title: str, facts: Sequence[Column[T]], items: Sequence[tuple[str, T]]
    ) -> "Table":
        """A column for each item under its name, a row for each fact that any of them has."""
        rows = [(fact.heading, *(fact.cell(item) for _, item in items)) for fact in facts]
        headings = (Heading("", False), *(Heading(name) for name, _ in items))
        return cls(title, headings, tuple(row for row in rows if {*row[1:]} != {NONE}))

    @property
    def folds(self) -> bool:
        """True if narrow screens show each row's numbers below its name: rows of a few numbers."""
        num_numbers = sum(each.is_number for each in self.columns)
        is_named = bool(self.columns) and not self.columns[0].is_number
        return is_named and _FEWEST <= num_numbers <= _MOST

    @classmethod
    def facts(cls, rows: Iterable[tuple[str, str]], title: str = "") -> "Table":
        """A table of facts, a name and a value each."""
        return cls(title, (Heading("what", False), Heading("value", False)), tuple(rows))


@dataclass(frozen=True)
class Figure:
    """Lines of characters that are aligned with each other."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Legend:
    """Legend of a colour.

    Attributes:
        colour: a variable of the page's style sheet, `--blue`.
        opacity: opacity of the mark, where a shade of the colour stands for an amount.
    """

    label: str
    colour: str
    shape: str = "square"
    opacity: float = 1.0


@dataclass(frozen=True)
class Segment:
    """Begin and duration of something in a row of `Lanes`; `lane` counts from the top."""

    row: int
    lane: int
    begin_us: float
    duration_us: float


@dataclass(frozen=True)
class Lanes:
    """Rows with a few lanes each over one time axis.

    Attributes:
        rows: names of the rows, from the top.
        until_us: end of the time axis.
        segments: by kind, as in the chart's legend.
    """

    rows: tuple[str, ...]
    num_lanes: int
    until_us: float
    segments: Mapping[str, tuple[Segment, ...]]


@dataclass(frozen=True)
class Chart:
    """A plot of a page, with the numbers in it as a table.

    Attributes:
        words: description for those who can't see it.
        spec: Vega-Lite, or a timeline; colours may be variables of the page's style sheet.
        table: all that is plotted, or, of very many values, what matters of them.
        note: how to read it; may be empty.
    """

    title: str
    words: str
    spec: dict[str, Any] | Lanes
    table: Table
    legend: Sequence[Legend] = ()
    note: str = ""


@dataclass(frozen=True)
class Multiples:
    """Small plots of one kind beside each other, all seen at once, each legible at 200 px width.

    Attributes:
        legend: legend of all plots.
    """

    title: str
    charts: tuple[Chart, ...]
    note: str = ""
    legend: Sequence[Legend] = ()


@dataclass(frozen=True)
class Timelines:
    """Timelines by name, on one time axis; those in `open` are seen at once."""

    title: str
    charts: tuple[tuple[str, Chart], ...]
    open: frozenset[str]


@dataclass(frozen=True)
class Commands:
    """Commands for one choice among several, such as an engine.

    Attributes:
        title: the choice; empty where there is only one.
        parts: commands, each on a line of its own, and notes on them.
    """

    title: str
    parts: tuple[str | Figure, ...]


Words = str | Table | Figure
# Of a page: the answer, what to run, what else was found, other loads and sizes, where time goes,
# how it was measured and how sure it is, what was the same for all.
ChapterName = Literal["answer", "run", "found", "loads", "why", "sure", "setup"]
Plot = Chart | Multiples | Timelines


@dataclass(frozen=True)
class Section:
    """A heading, then paragraphs, tables, figures and plots in order.

    Attributes:
        heading: empty where it continues the section before; a page shows it elsewhere.
        place: beside the answer on a page's first screen (plots without a heading), on top of what
            follows, among the plots, which are on pages alone, or with the tables.
        chapter: its chapter of the page; None on pages without chapters.
    """

    heading: str
    parts: tuple[Words | Commands | Plot, ...]
    place: Literal["first", "top", "plots", "tables"] = "tables"
    chapter: ChapterName | None = None

    @property
    def words(self) -> Iterator[Words]:
        """All parts but the plots."""
        for part in self.parts:
            if isinstance(part, Commands):
                yield from filter(None, (part.title, *part.parts))
            elif isinstance(part, Words):
                yield part


@dataclass(frozen=True)
class Chapter:
    """Sections that stand together on a page.

    Attributes:
        name: key used by its sections and by links.
        says: its content in a sentence.
        is_box: whether it stands open below the answer, its commands first.
    """

    name: ChapterName
    heading: str
    says: str
    is_box: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer, which fits on one screen.

    Attributes:
        setting: model, question and clock: a line.
        headline: the finding, in a sentence or two.
        parts: the numbers behind it, and why.
    """

    setting: str
    headline: str
    parts: tuple[Words, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report; unsafe characters of names in its words are escaped.

    Attributes:
        source: `measured`, `projected`, or another label for all of its numbers.
        command, created: the command that made it, and when (ISO 8601).
        sections: all sections, including what the answer says.
        chapters: chapters of its page, the answer first; empty for a page without.

    Raises:
        ValueError: a section has no chapter of the page.
    """

    title: str
    answer: Answer
    source: str
    command: str
    created: str
    sections: tuple[Section, ...]
    chapters: tuple[Chapter, ...] = ()

    def __post_init__(self) -> None:
        filled = tuple(each for each in self.sections if each.parts)
        known = {each.name for each in self.chapters}
        if lost := [each.heading for each in filled if known and each.chapter not in known]:
            raise ValueError(f"in no chapter: {lost}")
        shown = {"title": self.title, "answer": self.answer, "sections": filled}
        for name, value in shown.items():
            object.__setattr__(self, name, _printable(value))

    def of_place(self, *places: str) -> list[Section]:
        """The sections that belong to the given places."""
        return [each for each in self.sections if each.place in places]


def _printable(part: Any) -> Any:
    """The part with unsafe characters escaped in all words but those of plots."""
    match part:
        case str():
            return printable(part)
        case tuple():
            return tuple(map(_printable, part))
        case Section() | Table() | Figure() | Commands() | Heading() | Answer():
            return replace(part, **{name: _printable(each) for name, each in vars(part).items()})
    return part
