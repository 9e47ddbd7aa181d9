"""A report as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from expertlane.report import content
from expertlane.report.document import Table
from expertlane.results import Results


def show(results: Results, console: Console) -> None:
    """Print the whole report, no wider than the console."""
    console.print(Rule(Text(content.title(results), style="bold"), characters="═"))
    for section in content.sections(results):
        console.print()
        console.print(Text(section.heading, style="bold cyan"))
        for part in section.parts:
            if isinstance(part, Table):
                console.print(_table(part))
            else:
                console.print(Padding(Text(part), (0, 0, 0, 1)))


def _table(table: Table) -> RichTable:
    drawn = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        collapse_padding=True,
    )
    for column in table.columns:
        drawn.add_column(
            Text(column.heading),
            justify="right" if column.is_number else "left",
            overflow="fold",
            vertical="top",
        )
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
