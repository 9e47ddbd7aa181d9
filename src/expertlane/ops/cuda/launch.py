"""How kernels are launched."""

from collections.abc import Sequence
from typing import Any


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel; nothing where a size of the grid is 0.

    Multiplications and additions are fused, whatever the version of Triton does by default.
    """
    if 0 not in grid:
        kernel[tuple(grid)](*arguments, enable_fp_fusion=True, **options)
