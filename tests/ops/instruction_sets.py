"""Our CPU backends, one for each instruction set, made directly: one set hides no other."""

from functools import cache

import pytest

from expertlane.ops.build import BASELINE, ONLY_IF_ASKED_FOR, SETS, BuildError, build
from expertlane.ops.cpu import CpuBackend
from expertlane.ops.vector import VectorBackend

ARITHMETIC = [each.name for each in SETS if each not in ONLY_IF_ASKED_FOR] or ["none"]


@cache
def backend_with(name: str) -> CpuBackend | str:
    """That of an instruction set, or why there is none."""
    try:
        baseline = build(BASELINE)
        if name == BASELINE.name:
            return CpuBackend(baseline)
        if not baseline.has_instructions(name.encode()):
            return f"this CPU lacks {name}"
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
