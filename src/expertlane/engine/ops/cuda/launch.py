"""The launch of Triton kernels."""

from collections.abc import Sequence
from typing import Any


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel; do nothing where a size of the grid is 0.

    Multiplications and additions are fused, whatever the version of Triton does by default.
    """
    if 0 not in grid:
        _run(kernel, tuple(grid), arguments, {"enable_fp_fusion": True, **options})


def _run(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch; tests replace this."""
    kernel[grid](*arguments, **options)
