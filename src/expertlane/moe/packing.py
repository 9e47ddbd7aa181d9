"""Tokens and what travels with them as rows of bytes: one collective in place of three."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(metadata: Sequence[Tensor], x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Put metadata and the hidden states that they belong to side by side.

    Args:
        metadata: each [num_rows, columns], of any dtype; widest alignment first.
        x: [num_tokens, hidden_size].
        tokens: [num_rows]; the token of each row; None where rows are tokens.

    Returns:
        [num_rows, bytes of a row].
    """
    width = sum(part.shape[1] * part.itemsize for part in (*metadata, x))
    packed = x.new_empty((len(metadata[0]), width), dtype=torch.uint8)
    # Typed views: a byte view of a one-column tensor with stride 0 fails.
    *places, hidden = unpack(packed, columns_of([*metadata, x]))
    for place, part in zip(places, metadata, strict=True):
        place.copy_(part)
    if tokens is None:
        hidden.copy_(x)
    else:
        torch.index_select(x, 0, tokens, out=hidden)  # ten times as fast as x[tokens]
    return packed


def columns_of(parts: Sequence[Tensor]) -> list[tuple[torch.dtype, int]]:
    """What `unpack` needs to know of parts [num_rows, columns]."""
    return [(part.dtype, part.shape[1]) for part in parts]


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
