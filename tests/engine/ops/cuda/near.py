"""What tests of the Triton kernels share: where they run, draws, bounds."""

import functools
import inspect
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


needs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and _version(triton) < (3, 7) and _version(numpy) >= (2, 4),
    reason="Triton's interpreter before 3.7 cannot take numpy from 2.4 on",
)
if needs_kernels.args == (False,) and DEVICE.type == "cpu":
    # Before each launch the interpreter looks through its language: a quarter of its time.
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: object) -> list[tuple[str, object]]:
        return [
            each for each in inspect.getmembers(package) if interpreter.tl.core.is_builtin(each[1])
        ]

    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _builtins})
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
# The interpreter cuts off what bfloat16 cannot hold, where a GPU rounds.
ROUNDING = {
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0 ** (-8 if DEVICE.type == "cuda" else -7),
}
# Nor does it multiply matrices of bfloat16: `tl.dot` there takes their bits for whole numbers.
_NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
PRODUCT_DTYPES = st.sampled_from([torch.float32, _NARROW])
# Not shrunk: interpreted kernels take too long to be run hundreds of times.
drawn = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, steps: float = 1.0) -> None:
    """Within some roundings of the largest value."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.numel():
        error = (found.double() - expected.double()).abs().max()
        assert error <= steps * ROUNDING[found.dtype] * expected.double().abs().max()
