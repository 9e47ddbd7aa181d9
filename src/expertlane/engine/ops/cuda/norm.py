"""Root-mean-square norms of rows, optionally after a residual is added.

Limit: memory. A row of H values of b bytes is read and written once each, with a residual twice:
2·H·b or 4·H·b bytes over the card's bandwidth; FLOPs, 4·H a row, never count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.launch import adjacent, launch

_WARP_VALUES = 512  # of a row to a warp: 16 a thread


@triton.jit
def _rms_norm_kernel(
    x, added, weight, total, out, x_stride, added_stride, size, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_there = columns < size
    values = tl.load(x + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if added is not None:
        other = tl.load(added + row * added_stride + columns, mask=is_there, other=0.0)
        rounded = (values + other.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * size + columns, rounded, mask=is_there)
        values = rounded.to(tl.float32)  # normalise the rounded sum, as later layers use it
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    values = values * scale * tl.load(weight + columns, mask=is_there, other=0.0)
    tl.store(out + row * size + columns, values.to(out.dtype.element_ty), mask=is_there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [num_rows, size], as `TorchBackend.rms_norm` defines it."""
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its norm, as `TorchBackend.add_rms_norm` defines them."""
    return _norm(x, added, weight, eps)


def _norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, size = x.shape
    x = adjacent(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x
    if added is not None:
        added, total = adjacent(added), torch.empty_like(out)
    block = triton.next_power_of_2(size)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        *(x, added, weight, total, out, x.stride(0)),
        *(0 if added is None else added.stride(0), size, eps),
        BLOCK=block,
        num_warps=min(16, max(1, block // _WARP_VALUES)),
    )
    return total, out
