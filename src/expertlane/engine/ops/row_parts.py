"""Rows received from the ranks of a group, in rank order, perhaps left where senders wrote them."""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowParts:
    """A matrix [num_rows, width] in parts of rows, each contiguous; rows count across parts.

    Attributes:
        pointers: [num_parts] int64; address of each part.
        num_rows: [num_parts]; rows of each part.
        whole: the matrix as one tensor, if the parts are adjacent.
    """

    pointers: Any
    num_rows: Sequence[int]
    width: int
    dtype: torch.dtype
    whole: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, num_parts: int = 1) -> Self:
        """Divide contiguous rows [num_rows, width] into equal parts."""
        num, begin = rows.shape[0] // num_parts, rows.data_ptr()
        step = num * rows.shape[1] * rows.itemsize
        pointers = array("q", range(begin, begin + num_parts * step, step) if step else [begin])
        return cls(pointers, [num] * len(pointers), rows.shape[1], rows.dtype, rows)

    def tensor(self) -> Tensor:
        """The matrix [num_rows, width] as one tensor; a copy where the parts are not adjacent."""
        if self.whole is not None:
            return self.whole
        row_bytes = self.width * self.dtype.itemsize
        ends = [num * row_bytes for num in accumulate(self.num_rows)]
        rows = torch.empty(sum(self.num_rows), self.width, dtype=self.dtype)
        for pointer, end, num in zip(self.pointers, ends, self.num_rows, strict=False):
            num_bytes = num * row_bytes
            ctypes.memmove(rows.data_ptr() + end - num_bytes, pointer, num_bytes)
        return rows
