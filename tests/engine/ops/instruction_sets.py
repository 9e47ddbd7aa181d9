"""Our CPU backends, one for each instruction set of this CPU, made directly: none hides another."""

from collections.abc import Iterable
from functools import cache

import pytest

from expertlane.engine.ops.build import (
    BASELINE,
    ONLY_IF_ASKED_FOR,
    SETS,
    BuildError,
    InstructionSet,
    build,
)
from expertlane.engine.ops.cpu import CpuBackend, VectorBackend


def names_here(sets: Iterable[InstructionSet]) -> list[str]:
    """Those that this CPU has, since of others no test could say a word."""
    names = [each.name for each in sets]
    try:
        baseline = build(BASELINE)
    except BuildError:  # each test says so
        return names or ["none"]
    return [name for name in names if baseline.has_instructions(name.encode())] or ["none"]


ALL_SETS = names_here(SETS)
ARITHMETIC = names_here(each for each in SETS if each not in ONLY_IF_ASKED_FOR)
LACKING = [each.name for each in SETS if each.name not in ALL_SETS]


@cache
def backend_with(name: str) -> CpuBackend | str:
    """That of an instruction set, or why there is none."""
    try:
        baseline = build(BASELINE)
        if name == BASELINE.name:
            return CpuBackend(baseline)
        if name == "none":
            return f"this CPU has no set but the {BASELINE.name}"
        (instructions,) = (each for each in SETS if each.name == name)
        return VectorBackend(baseline, build(instructions), name)
    except BuildError as error:
        return str(error)


def backend_or_skip(name: str) -> CpuBackend:
    found = backend_with(name)
    if isinstance(found, str):
        broken = "failed" in found and "unrecognized" not in found  # our own mistake
        (pytest.fail if broken else pytest.skip)(found)
    return found
