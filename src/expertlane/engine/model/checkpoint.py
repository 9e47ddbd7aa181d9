"""Slices of a Hugging Face checkpoint's tensors, of which no more is read than asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expertlane.engine.model.stored_tensors import (
    PLAIN_TYPES,
    VALUES_OF_INT32,
    StoredTensors,
    TensorLocation,
)
from expertlane.engine.ops.device import STAGED_BYTES, copier_to
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.errors import SpecError
from expertlane.spec.hf_config import MXFP4_BLOCK
from expertlane.spec.mixers import Shape
from expertlane.spec.model import ModelConfig

_HOST = torch.device("cpu")

Index = tuple[int | slice, ...]
Check = Callable[[Tensor], None]


class Checkpoint(StoredTensors):
    """A checkpoint whose tensors are read with torch.

    Args:
        device: device of the tensors; large ones pass through the host's memory in pieces.
    """

    def __init__(
        self, folder: Path, model: ModelConfig | None = None, device: torch.device = _HOST
    ) -> None:
        super().__init__(folder, model, "pt")
        self._device, self._copy_to = device, copier_to(device)

    def tensor(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A logical tensor, or a slice of it, in memory of its own.

        Args:
            name: one of `spec.model`.
            rows, columns: ranges of the logical shape with step 1; None for all. Vectors have rows.
            dtype: dtype of the result, stored quantised or not; None for the model's.

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
            return self._empty([len(part) for part in parts], dtype)
        if self._is_mxfp4(stored):
            first = parts[1].start % MXFP4_BLOCK
            whole = self._read_mxfp4(stored, shape, parts, dtype).widened()
            return whole[:, first : first + len(parts[1])].contiguous()
        if self._is_narrow(stored):
            return self._read_narrow(stored, shape, parts, dtype).widened()
        if self._stored_type(stored.name) not in PLAIN_TYPES:
            raise self._refused_type(stored.name)
        out = self._empty([len(part) for part in parts], dtype)
        into = out.t() if stored.transposed else out
        self._copy(stored.name, _index(stored, parts, shape[0]), into, None)
        return out

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _copy(self, stored_name: str, index: Index, out: Tensor, check: Check | None) -> None:
        """Copy stored values into `out`, a block of its first dimension at a time.

        Args:
            check: called with each block while it is on the host.
        """
        shape = self._shards.slice(stored_name).get_shape()
        at = next(i for i, part in enumerate(index) if isinstance(part, slice))
        along = index[at]
        assert isinstance(along, slice)
        step = along.step or 1
        # Whole rows are counted, roughly: a slice of their columns touches most of their pages.
        row_bytes = step * out.itemsize
        for size in shape[at + 1 :]:
            row_bytes *= size
        num_rows = max(1, STAGED_BYTES // row_bytes)
        for start in range(0, len(out), num_rows):
            part = out[start : start + num_rows]
            first = along.start + start * step
            rows = slice(first, first + (len(part) - 1) * step + 1, along.step)
            values = self._shards.slice(stored_name)[(*index[:at], rows, *index[at + 1 :])]
            if check is not None:
                check(values)
            self._copy_to(part, values)
            self._shards.count_read(len(part) * row_bytes)

    def narrow(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> NarrowWeight | None:
        """A matrix that is stored as one-byte values, or a slice of it; None for other matrices.

        Args:
            name, rows, columns: see `tensor`.
            dtype: the type that it is widened to; None for the model's.

        Raises:
            SpecError: see `tensor`; or values are NaN, or scales not finite.
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

    def mxfp4(self, name: str, dtype: torch.dtype) -> Mxfp4Weight | None:
        """A whole matrix that is stored in MXFP4; None for other matrices.

        Args:
            dtype: the type that it is widened to.
        """
        stored, shape = self._locate(name)
        if not self._is_mxfp4(stored):
            return None
        return self._read_mxfp4(stored, shape, [range(size) for size in shape], dtype)

    def _read_narrow(
        self, stored: TensorLocation, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> NarrowWeight:
        scheme = self.scheme
        assert scheme is not None, "it is narrow"
        name, (rows, columns) = self._values_name(stored), parts
        if scheme.is_packed:
            values = self._unpacked(name, rows, columns)
        else:
            is_int8 = scheme.type == "int8"
            kind = torch.int8 if is_int8 else torch.float8_e4m3fn
            values = self._empty([len(rows), len(columns)], kind)
            check = None if is_int8 else self._refusing(_is_nan, name, "NaN")
            self._copy(name, _index(stored, parts, shape[0]), values, check)
        size = scheme.rows or shape[0], scheme.columns or shape[1]
        blocks = [
            slice(part.start // n, -(-part.stop // n)) for part, n in zip(parts, size, strict=True)
        ]
        scales = self._empty([block.stop - block.start for block in blocks], torch.float32)
        name = f"{stored.name}{scheme.scale}"
        check = self._refusing(_is_not_finite, name, "NaN or infinite scales")
        if self._shards.slice(name).get_shape() in ([], [1]):
            scale = self._shards.tensor(name)
            check(scale)
            scales.fill_(float(scale))
        else:
            self._copy(name, tuple(blocks), scales, check)
        return with_block_scales(values, scales, size, (rows.start, columns.start), dtype)

    def _refusing(self, is_bad: Callable[[Tensor], Tensor], stored_name: str, what: str) -> Check:
        def check(values: Tensor) -> None:
            if is_bad(values).any():
                raise SpecError(f"{self.folder}: tensor {stored_name} holds {what}")

        return check

    def _unpacked(self, name: str, rows: range, columns: range) -> Tensor:
        """int8 values of packed ones: four in an int32, first in the lowest bits, each plus 128."""
        per = VALUES_OF_INT32
        inside = range(columns.start // per, -(-columns.stop // per))
        words = self._empty([len(rows), len(inside)], torch.int32)
        index = slice(rows.start, rows.stop), slice(inside.start, inside.stop)
        self._copy(name, index, words, None)
        first = columns.start - inside.start * per
        values = (words.view(torch.uint8) ^ 0x80).view(torch.int8)
        return values[:, first : first + len(columns)]

    def _read_mxfp4(
        self, stored: TensorLocation, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> Mxfp4Weight:
        """Rows of an MXFP4 matrix, with all blocks that the columns touch."""
        rows, columns = parts
        inside = range(columns.start // MXFP4_BLOCK, -(-columns.stop // MXFP4_BLOCK))
        index = _index(replace(stored, transposed=False), [rows, inside], shape[0])
        blocks = self._empty([len(rows), len(inside), MXFP4_BLOCK // 2], torch.uint8)
        scales = self._empty([len(rows), len(inside)], torch.uint8)
        self._copy(f"{stored.name}_blocks", (*index, slice(None)), blocks, None)
        self._copy(f"{stored.name}_scales", index, scales, None)
        return Mxfp4Weight(blocks.flatten(1), scales, dtype)


def _is_nan(float8: Tensor) -> Tensor:
    return (float8.view(torch.uint8) & 0x7F) == 0x7F


def _is_not_finite(scales: Tensor) -> Tensor:
    return ~torch.isfinite(scales)


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
    first = 0 if stored.in_row else stored.expert
    return tuple(index) if first is None else (first, *index)


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
        scales: one for each block that the slice touches, by rows and columns of blocks.
        block_size: rows and columns of a block.
        first: row and column of the matrix at which the slice begins.
    """
    block_rows, block_columns = block_size
    of_row = torch.arange(len(values), device=values.device) + first[0] % block_rows
    of_columns = block_columns, first[1] % block_columns
    if scales.shape[1] == 1:  # one for all columns
        of_columns = max(1, values.shape[1]), 0
    rows = 1 if first[0] % block_rows else block_rows
    return NarrowWeight(values, scales.float()[of_row // block_rows], *of_columns, dtype, rows)
