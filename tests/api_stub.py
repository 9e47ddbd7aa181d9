"""Writes `src/expertlane/__init__.pyi`, from what the commands declare: `python tests/api_stub.py`.

Type checkers and editors read it; at run time the same signatures are on the functions.
"""

import ast
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

from expertlane.api import Corrections, Difference, Results, diff, fit_corrections, load_results
from expertlane.engine.llm import LLM as _LLM
from expertlane.errors import ExpertlaneError, RankError, UserError
from expertlane.spec.deployment import Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.names import CheckLevel, CpuIsa, Dtype, OnFailure
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.sampling import Structured
from expertlane.version import __version__

# What the command line reads as text, or what that stands for: `batch=[32, 64]`.
Text = str | int | float | Path | Layout | Sequence[int | float | str]
'''


def stub() -> str:
    """The text of the stub."""
    import expertlane
    from expertlane import api

    names = ",\n    ".join(f'"{name}"' for name in expertlane.__all__)
    commands = "compare", "plan", "simulate", "bench", "drill", "verify"
    functions = [getattr(api, name) for name in commands]
    all_names = f"__all__ = [\n    {names},\n]"
    return "\n".join([_HEAD, all_names, _llm(), *map(_function, functions)])


def _llm() -> str:
    """`LLM` with the settings of `EngineConfig` by name."""
    from expertlane.spec import engine_config

    (config,) = (
        each
        for each in ast.parse(inspect.getsource(engine_config)).body
        if isinstance(each, ast.ClassDef)
    )
    settings = [each for each in config.body if isinstance(each, ast.AnnAssign)]
    wider = {"layout": "str | Layout", "options": "Options | None"}
    listed = "".join(
        f"        {name}: {wider.get(name, ast.unparse(each.annotation))} = ...,\n"
        for each in settings
        for name in [ast.unparse(each.target)]
    )
    return (
        "\nclass LLM(_LLM):\n    def __init__(\n        self,\n        model: str | Path,\n"
        f"        config: EngineConfig | None = None,\n        *,\n{listed}    ) -> None: ...\n"
    )


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
