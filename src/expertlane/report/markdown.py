"""A report as Markdown: `report.md`."""

import re

from expertlane.report.document import Figure, Report, Table, Words


def render(report: Report) -> str:
    """The report as Markdown, without its plots."""
    blocks = [f"# {_escaped(report.title)}"]
    for section in report.of_place("top", "tables"):
        if section.heading:
            blocks.append(f"## {_escaped(section.heading)}")
        blocks += map(_part, section.words)
    return "\n\n".join(blocks) + "\n"


def _part(part: Words) -> str:
    if isinstance(part, Table):
        return table(part)
    if isinstance(part, Figure):
        longest = max(map(len, re.findall("`+", "\n".join(part.lines))), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join([f"**{_escaped(part.title)}**", "", f"{fence}text", *part.lines, fence])
    return _escaped(part)


def table(part: Table) -> str:
    """A table, below its title."""
    lines = [f"**{_escaped(part.title)}**", ""] if part.title else []
    lines.append(_row([column.heading for column in part.columns]))
    lines.append(_row(["---:" if column.is_number else "---" for column in part.columns]))
    lines += [_row(row) for row in part.rows]
    return "\n".join(lines)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown prints as it is."""
    for character in "\\`*_|<[":
        text = text.replace(character, "\\" + character)
    return text
