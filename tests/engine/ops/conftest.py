"""Our kernels, for each instruction set."""

import pytest

from engine.ops.instruction_sets import ARITHMETIC, backend_or_skip
from expertlane.engine.ops.build import BASELINE
from expertlane.engine.ops.cpu import CpuBackend, VectorBackend


@pytest.fixture(params=ARITHMETIC, scope="module")
def kernels(request) -> VectorBackend:
    """With arithmetic of ours."""
    return backend_or_skip(request.param)


@pytest.fixture(params=[BASELINE.name, *ARITHMETIC], scope="module")
def summing(request) -> CpuBackend:
    """With sums of ours."""
    return backend_or_skip(request.param)
