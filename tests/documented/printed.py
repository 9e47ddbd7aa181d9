"""The outputs that pages show, and what of an output is the same in every run."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from documented.commands import ROOT


@cache
def script() -> ModuleType:
    """`docs/printed.py` as a module."""
    spec = importlib.util.spec_from_file_location("printed", ROOT / "docs" / "printed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Output:
    """An output on a page, with the command that printed it."""

    command: str
    text: str


def printed(page: str, name: str) -> Output:
    """The one output of a command on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = (
        Output(command, match["text"])
        for match, command in script().commands_of(text)
        if command.split()[1] == name
    )
    return found


def shape(comparison: str) -> list[str]:
    """Lines of a comparison's answer without what is measured: setting, columns, names, causes."""
    lines = [re.sub(r" {2,}", "  ", each).strip() for each in comparison.splitlines()]
    (top,) = (place for place, each in enumerate(lines) if each.startswith("deployment "))
    names = [each.partition("  ")[0] for each in lines[top + 1 : lines.index("", top)]]
    (why,) = (re.sub(r" [\d.]+( →|$)", r"\1", each) for each in lines if each.startswith("Why, "))
    return [*lines[:2], lines[top], *names, why]
