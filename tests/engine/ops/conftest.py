"""Our kernels, for each instruction set."""

import pytest

from engine.ops.instruction_sets import ARITHMETIC, backend_or_skip
from expertlane.engine.ops.build import BASELINE
from expertlane.engine.ops.cpu import VectorBackend
from expertlane.engine.ops.torch_backend import TorchBackend


@pytest.fixture(params=ARITHMETIC, scope="module")
def kernels(request) -> VectorBackend:
    """With arithmetic of ours."""
    return backend_or_skip(request.param)


@pytest.fixture(params=["torch", *ARITHMETIC], scope="module")
def ops(request) -> TorchBackend:
    """Torch's operations, and arithmetic of ours."""
    return TorchBackend() if request.param == "torch" else backend_or_skip(request.param)


@pytest.fixture(params=["torch", BASELINE.name, *ARITHMETIC], scope="module")
def summing(request) -> TorchBackend:
    """Torch's sums, and ours."""
    return TorchBackend() if request.param == "torch" else backend_or_skip(request.param)
