"""Tokens and what travels with them as rows of bytes: one collective in place of three."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors side by side: [num_rows, bytes of a row].

    Args:
        parts: each [num_rows, columns], of any dtype; widest alignment first.
    """
    widths = [part.shape[1] * part.itemsize for part in parts]
    packed = torch.empty((len(parts[0]), sum(widths)), dtype=torch.uint8, device=parts[0].device)
    begin = 0
    for part, width in zip(parts, widths, strict=True):
        # Typed views: a byte view of a one-column tensor with stride 0 fails.
        packed[:, begin : begin + width].view(part.dtype)[:] = part
        begin += width
    return packed


def unpack(packed: Tensor, columns: Sequence[tuple[torch.dtype, int]]) -> list[Tensor]:
    """The parts that `pack` was given, as views.

    Args:
        columns: dtype and number of columns of each part.
    """
    parts, begin = [], 0
    for dtype, num_columns in columns:
        end = begin + num_columns * dtype.itemsize
        parts.append(packed[:, begin:end].view(dtype))
        begin = end
    return parts
