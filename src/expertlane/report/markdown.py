"""A report as Markdown: `report.md`."""

from expertlane.report import content
from expertlane.report.document import Table
from expertlane.results.schema import Results


def render(results: Results) -> str:
    """The whole report."""
    blocks = [f"# {_escaped(content.title(results))}"]
    for section in content.sections(results):
        blocks.append(f"## {_escaped(section.heading)}")
        blocks += [
            _table(part) if isinstance(part, Table) else _escaped(part) for part in section.parts
        ]
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> str:
    lines = [f"**{_escaped(table.title)}**", ""] if table.title else []
    lines.append(_row([column.heading for column in table.columns]))
    lines.append(_row(["---:" if column.is_number else "---" for column in table.columns]))
    lines += [_row(row) for row in table.rows]
    return "\n".join(lines)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown prints as it is."""
    for character in "\\`*_|<[":
        text = text.replace(character, "\\" + character)
    return text
