"""Reading slices of a Hugging Face checkpoint; nothing else of it is read."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expertlane.errors import SpecError
from expertlane.model.checkpoint_names import TensorLocation
from expertlane.model.stored_tensors import (
    MAX_MAPPED_BYTES,
    PLAIN_TYPES,
    VALUES_OF_INT32,
    StoredTensors,
)
from expertlane.ops.mxfp4 import Mxfp4Weight
from expertlane.ops.narrow import NarrowWeight
from expertlane.spec.hf_config import MXFP4_BLOCK
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import Shape

_MAX_COPIED_BYTES = MAX_MAPPED_BYTES // 4  # at a time

Index = tuple[int | slice, ...]


class Checkpoint(StoredTensors):
    """A folder with a `config.json` and safetensors, as tensors of torch."""

    def __init__(self, folder: Path, model: ModelConfig | None = None) -> None:
        super().__init__(folder, model, "pt")

    def tensor(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A logical tensor, or a slice of it, in memory of its own.

        Args:
            name: one of `spec.tensors`.
            rows, columns: of the logical shape, in steps of 1; None for all. Vectors have rows.
            dtype: of the result, quantised or not; None for the model's.

        Returns:
            [len(rows), len(columns)], or [len(rows)] of a vector; contiguous.

        Raises:
            SpecError: the tensor is missing, has another shape than `config.json` asks for, or is
                stored in a type that cannot be read.
        """
        stored, shape = self._locate(name)
        dtype = dtype or getattr(torch, self.model.dtype)
        parts = [range(shape[0]) if rows is None else rows]
        if len(shape) > 1:
            parts.append(range(shape[1]) if columns is None else columns)
        if not all(parts):
            return torch.empty([len(part) for part in parts], dtype=dtype)
        if self._is_mxfp4(stored):
            first = parts[1].start % MXFP4_BLOCK
            whole = self._read_mxfp4(stored, shape, parts, dtype).widened()
            return whole[:, first : first + len(parts[1])].contiguous()
        if self._is_narrow(stored):
            return self._read_narrow(stored, shape, parts, dtype).widened()
        if self._stored_type(stored.name) not in PLAIN_TYPES:
            raise self._refused_type(stored.name)
        out = torch.empty([len(part) for part in parts], dtype=dtype)
        into = out.t() if stored.transposed else out
        self._copy(stored.name, _index(stored, parts, shape[0]), into)
        return out

    def _copy(self, stored_name: str, index: Index, out: Tensor) -> None:
        """Copy stored values into `out`, a block of its first dimension at a time."""
        shape = self._shards.slice(stored_name).get_shape()
        at = next(i for i, part in enumerate(index) if isinstance(part, slice))
        along = index[at]
        assert isinstance(along, slice)
        step = along.step or 1
        # Whole rows are counted, about: a slice of their columns touches most of their pages.
        row_bytes = step * out.itemsize
        for size in shape[at + 1 :]:
            row_bytes *= size
        num_rows = max(1, _MAX_COPIED_BYTES // row_bytes)
        for start in range(0, len(out), num_rows):
            part = out[start : start + num_rows]
            first = along.start + start * step
            rows = slice(first, first + (len(part) - 1) * step + 1, along.step)
            part.copy_(self._shards.slice(stored_name)[(*index[:at], rows, *index[at + 1 :])])
            self._shards.count_read(len(part) * row_bytes)

    def narrow(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> NarrowWeight | None:
        """A matrix that is stored in one byte, or a slice of it, as `tensor`; None for others.

        Args:
            dtype: that it is widened to.
        """
        stored, shape = self._locate(name)
        if not self._is_narrow(stored):
            return None
        dtype = dtype or getattr(torch, self.model.dtype)
        parts = [
            range(n) if part is None else part
            for part, n in zip((rows, columns), shape, strict=True)
        ]
        return self._read_narrow(stored, shape, parts, dtype)

    def _read_narrow(
        self, stored: TensorLocation, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> NarrowWeight:
        scheme = self.scheme
        assert scheme is not None, "it is narrow"
        name, (rows, columns) = self._values_name(stored), parts
        if scheme.is_packed:
            values = self._unpacked(name, rows, columns)
        else:
            kind = torch.int8 if scheme.type == "int8" else torch.float8_e4m3fn
            values = torch.empty(len(rows), len(columns), dtype=kind)
            self._copy(name, _index(stored, parts, shape[0]), values)
        size = scheme.rows or shape[0], scheme.columns or shape[1]
        blocks = [
            slice(part.start // n, -(-part.stop // n)) for part, n in zip(parts, size, strict=True)
        ]
        scales = torch.empty([block.stop - block.start for block in blocks])
        name = f"{stored.name}{scheme.scale}"
        if self._shards.slice(name).get_shape() in ([], [1]):
            scales.fill_(float(self._shards.tensor(name)))
        else:
            self._copy(name, tuple(blocks), scales)
        if not torch.isfinite(scales).all():
            raise SpecError(f"{self.folder}: tensor {name} holds NaN or infinite scales")
        if scheme.type == "float8" and ((values.view(torch.uint8) & 0x7F) == 0x7F).any():
            raise SpecError(f"{self.folder}: tensor {self._values_name(stored)} holds NaN")
        return with_block_scales(values, scales, size, (rows.start, columns.start), dtype)

    def _unpacked(self, name: str, rows: range, columns: range) -> Tensor:
        """Values of 8 bits plus 128, four in an int32, the first in its lowest bits."""
        per = VALUES_OF_INT32
        inside = range(columns.start // per, -(-columns.stop // per))
        words = torch.empty(len(rows), len(inside), dtype=torch.int32)
        self._copy(name, (slice(rows.start, rows.stop), slice(inside.start, inside.stop)), words)
        first = columns.start - inside.start * per
        values = (words.view(torch.uint8) ^ 0x80).view(torch.int8)
        return values[:, first : first + len(columns)]

    def _read_mxfp4(
        self, stored: TensorLocation, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> Mxfp4Weight:
        """All blocks that the columns touch."""
        rows, columns = parts
        inside = range(columns.start // MXFP4_BLOCK, -(-columns.stop // MXFP4_BLOCK))
        index = _index(replace(stored, transposed=False), [rows, inside], shape[0])
        blocks = torch.empty(len(rows), len(inside), MXFP4_BLOCK // 2, dtype=torch.uint8)
        scales = torch.empty(len(rows), len(inside), dtype=torch.uint8)
        self._copy(f"{stored.name}_blocks", (*index, slice(None)), blocks)
        self._copy(f"{stored.name}_scales", index, scales)
        return Mxfp4Weight(blocks.flatten(1), scales, dtype)


def _index(stored: TensorLocation, parts: list[range], num_rows: int) -> Index:
    """Logical rows and columns as indices of the stored tensor.

    Args:
        num_rows: all rows of the logical tensor.
    """
    rows = slice(parts[0].start, parts[0].stop)
    if stored.half is not None and stored.interleaved:
        rows = slice(2 * rows.start + stored.half, 2 * rows.stop, 2)
    elif stored.half is not None:
        rows = slice(stored.half * num_rows + rows.start, stored.half * num_rows + rows.stop)
    index: list[int | slice] = [rows, *(slice(part.start, part.stop) for part in parts[1:])]
    if stored.transposed:
        index.reverse()
    return tuple(index) if stored.expert is None else (stored.expert, *index)


def with_block_scales(
    values: Tensor,
    scales: Tensor,
    block_size: tuple[int, int],
    first: tuple[int, int],
    dtype: torch.dtype,
) -> NarrowWeight:
    """A matrix whose scales belong to blocks of rows and columns (DeepSeek-AI 2024, V3).

    Args:
        values: [num_rows, num_columns] int8 or float8_e4m3fn; a slice of a matrix.
        scales: those of the blocks that the slice touches, one a block.
        block_size: rows and columns of a block.
        first: row and column of the matrix at which the slice begins.
    """
    block_rows, block_columns = block_size
    of_row = (torch.arange(len(values)) + first[0] % block_rows) // block_rows
    of_columns = block_columns, first[1] % block_columns
    if scales.shape[1] == 1:  # one for all columns
        of_columns = max(1, values.shape[1]), 0
    return NarrowWeight(values, scales.float()[of_row], *of_columns, dtype)
