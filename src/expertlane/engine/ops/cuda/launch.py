"""Launching of kernels, padding rows, and splits of work over programs.

Where a card has more multiprocessors than a result has tiles, several programs share the work.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

# Those of an H100; used where the device cannot be queried.
_FEW_MULTIPROCESSORS = 132
_SHARED_BYTES = 227 << 10  # of a program


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


def adjacent(x: Tensor) -> Tensor:
    """x, with the values of its last dimension side by side; copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def is_padding(row, counts, num_counts, COUNTS: tl.constexpr):
    """Whether a row comes after all that are counted."""
    number = tl.arange(0, COUNTS)
    return row >= tl.sum(tl.load(counts + number, mask=number < num_counts, other=0), axis=0)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H100's where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _FEW_MULTIPROCESSORS


def stages_within(wanted: int, stage_bytes: int, device: torch.device) -> int:
    """Stages of a loop, `wanted` at most, whose loads fit into shared memory."""
    return max(1, min(wanted, shared_bytes(device) // stage_bytes))


def shared_bytes(device: torch.device) -> int:
    """The most shared memory of a program, in bytes; small cards have 99 KiB."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return getattr(properties, "shared_memory_per_block_optin", _SHARED_BYTES)
    return _SHARED_BYTES


def architecture() -> int:
    """Compute capability of the card that Triton compiles for, as 90; an H100's without one."""
    try:
        return int(driver.active.get_current_target().arch)
    except RuntimeError:  # in the interpreter
        return 90


@triton.jit
def share_of(begin, end, split, num_splits, STEP: tl.constexpr):
    """The part of a range that a split takes: equal shares of whole steps, perhaps none."""
    steps = (end - begin + STEP - 1) // STEP
    share = (steps + num_splits - 1) // num_splits * STEP
    begin += split * share
    return begin, tl.minimum(end, begin + share)
