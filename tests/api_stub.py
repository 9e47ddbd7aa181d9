"""Writes `src/expertlane/__init__.pyi`, from what the commands declare: `python tests/api_stub.py`.

Type checkers and editors read it; at run time the same signatures are on the functions.
"""

import inspect
import textwrap
from pathlib import Path

STUB = Path(__file__).parents[1] / "src" / "expertlane" / "__init__.pyi"

_HEAD = '''\
# Written by tests/api_stub.py from the options that the commands declare; a test compares.
"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from expertlane.api import Difference, Results, diff, load_results
from expertlane.engine.llm import LLM
from expertlane.errors import ExpertlaneError, RankError, UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.structured import Structured
from expertlane.version import __version__

# What the command line reads as text, or what that stands for: `batch=[32, 64]`.
Text = str | int | float | Path | Layout | Sequence[int | float | str]
'''


def stub() -> str:
    """The text of the stub."""
    import expertlane
    from expertlane import api

    names = ",\n    ".join(f'"{name}"' for name in expertlane.__all__)
    functions = [getattr(api, name) for name in ("compare", "plan", "simulate", "bench")]
    return "\n".join([_HEAD, f"__all__ = [\n    {names},\n]", *map(_function, functions)])


def _function(function: object) -> str:
    parameters = []
    for each in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if each.kind is each.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        default = "" if each.default is each.empty else f" = {each.default!r}"
        parameters.append(f"{each.name}: {each.annotation}{default}")
    doc = inspect.cleandoc(function.__doc__ or "")
    listed = "".join(f"    {each},\n" for each in parameters)
    body = textwrap.indent(f'"""{doc}\n"""', " " * 4, lambda line: bool(line.strip()))
    return f"\ndef {function.__name__}(\n{listed}) -> Results:\n{body}\n"  # type: ignore[attr-defined]


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
