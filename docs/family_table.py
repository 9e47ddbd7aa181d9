"""Write the table of families.md: what each family can do, as `expertlane list families` says.

Run it after a change of a family: `python docs/family_table.py`. A test says where the page is out
of date.
"""

from pathlib import Path

from expertlane.spec.hf_config import FAMILIES, Family

PAGE = Path(__file__).with_name("families.md")
_BEGIN, _END = "<!-- docs/family_table.py -->\n", "<!-- end -->\n"
_HEAD = """| family | architectures | mixers | run, serve | draft | tools | reasoning |
| --- | --- | --- | --- | --- | --- | --- |
"""


def _row(name: str, family: Family) -> str:
    """A family's line."""
    runs = not family.is_planned_only
    cells = [
        f"`{name}`",
        ", ".join(f"`{each}`" for each in (family.architecture, *family.wrappers)),
        family.mixers,
        "yes" if runs else "",
        "yes" if family.has_drafts else "",
        ", ".join(family.calls) if runs else "",
        ", ".join(family.thoughts) if runs else "",
    ]
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def render(page: str) -> str:
    """The page with its table as the code has it."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise SystemExit("families.md lacks the marks around its table")
    table = _HEAD + "".join(_row(name, family) for name, family in FAMILIES.items())
    return before + begin + table + end + after


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
