"""Activations of MLPs, on gate and up projections that lie side by side.

Limit: memory. With I inner values of b bytes a row, 3·I·b bytes are read or written (2·I·b without
a gate) over the card's bandwidth.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.launch import is_padding, launch
from expertlane.engine.ops.products import Activation

_BLOCK = 1024


@triton.jit
def _activation_kernel(
    x, counts, out, x_stride, inner, num_groups, limit, alpha,
    IS_GATED: tl.constexpr, IS_CLAMPED: tl.constexpr, IS_GELU: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if counts is not None:  # noqa: SIM102 - of constants alone
        if is_padding(row, counts, num_groups, GROUPS):
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < inner
    values = tl.load(x + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    up = values
    if IS_GATED:
        up = tl.load(x + row * x_stride + inner + columns, mask=is_there, other=0.0).to(tl.float32)
    if IS_CLAMPED:
        values = tl.minimum(values, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
    if IS_GELU:
        values = values * 0.5 * (1 + tl.erf(values * 0.7071067811865476))
    else:
        values = values / (1 + tl.exp(-values * alpha))
    if IS_GATED:
        values = values * up
    tl.store(out + row * inner + columns, values.to(out.dtype.element_ty), mask=is_there)


def activate(
    x: Tensor, activation: Activation, *, is_gated: bool, counts: Tensor | None = None
) -> Tensor:
    """Activations [num_rows, inner], computed in float32 and rounded once.

    Args:
        x: gate and up projections [num_rows, 2 · inner]; without a gate, up's [num_rows, inner].
        counts: [num_groups]; rows from their sum on are padding, and are left out.
    """
    num_rows, inner = x.shape[0], x.shape[1] // 2 if is_gated else x.shape[1]
    num_groups = 0 if counts is None else counts.shape[0]
    out = x.new_empty(num_rows, inner)
    is_clamped = activation.swiglu_limit is not None
    block = min(_BLOCK, triton.next_power_of_2(max(1, inner)))
    launch(
        _activation_kernel,
        (num_rows, triton.cdiv(inner, block)),
        *(x, counts, out, x.stride(0), inner, num_groups, activation.swiglu_limit or 0.0),
        activation.swiglu_alpha if is_clamped else 1.0,
        IS_GATED=is_gated,
        IS_CLAMPED=is_clamped,
        IS_GELU=activation.hidden_act == "gelu" and not is_clamped,
        GROUPS=triton.next_power_of_2(max(1, num_groups)),
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return out
