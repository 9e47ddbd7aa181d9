"""Our kernels, for each instruction set."""

import pytest

from expertlane.ops.build import BASELINE
from expertlane.ops.cpu import CpuBackend
from expertlane.ops.vector import VectorBackend
from ops.instruction_sets import ARITHMETIC, backend_or_skip


@pytest.fixture(params=ARITHMETIC, scope="module")
def kernels(request) -> VectorBackend:
    """With arithmetic of ours."""
    return backend_or_skip(request.param)


@pytest.fixture(params=[BASELINE.name, *ARITHMETIC], scope="module")
def summing(request) -> CpuBackend:
    """With sums of ours."""
    return backend_or_skip(request.param)
