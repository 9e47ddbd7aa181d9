"""Rows from the ranks of a group, in rank order, perhaps where their senders wrote them."""

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
    """[num_rows, width] in parts that each lie in one piece; the rows are numbered through.

    Attributes:
        pointers: [num_parts] int64; where each begins in memory.
        num_rows: [num_parts].
        whole: all rows, if they follow one another.
    """

    pointers: Any
    num_rows: Sequence[int]
    width: int
    dtype: torch.dtype
    whole: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, num_parts: int = 1) -> Self:
        """Equal parts of rows that follow one another.

        Args:
            rows: [num_rows, width], contiguous.
        """
        num, begin = rows.shape[0] // num_parts, rows.data_ptr()
        step = num * rows.shape[1] * rows.itemsize
        pointers = array("q", range(begin, begin + num_parts * step, step) if step else [begin])
        return cls(pointers, [num] * len(pointers), rows.shape[1], rows.dtype, rows)

    def tensor(self) -> Tensor:
        """[num_rows, width]; a copy where the parts are apart."""
        if self.whole is not None:
            return self.whole
        row_bytes = self.width * self.dtype.itemsize
        ends = [num * row_bytes for num in accumulate(self.num_rows)]
        rows = torch.empty(sum(self.num_rows), self.width, dtype=self.dtype)
        for pointer, end, num in zip(self.pointers, ends, self.num_rows, strict=False):
            num_bytes = num * row_bytes
            ctypes.memmove(rows.data_ptr() + end - num_bytes, pointer, num_bytes)
        return rows
