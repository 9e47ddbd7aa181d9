"""Reads slices of a Hugging Face checkpoint's tensors, and no more of them.

Its matrices rounded to int8 may be kept in its folder for later starts, in a safetensors file that
is written whole or not at all. It records names, sizes and modification times of the checkpoint's
files. If these have changed, it counts as missing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expertlane.engine.model.checkpoint_names import TensorLocation
from expertlane.engine.model.stored_tensors import (
    PLAIN_TYPES,
    VALUES_OF_INT32,
    Shards,
    StoredTensors,
)
from expertlane.engine.ops.device import STAGED_BYTES, copier_to
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE, INT8_FOLDER
from expertlane.spec.files import write_whole
from expertlane.spec.hf_config import MXFP4_BLOCK
from expertlane.spec.mixers import Shape
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import HEAD, is_matrix, tensor_names, tensor_shape

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


FILE = "model.safetensors"
_VERSION = "1"
_SCALES = ".scales"  # after the name of a matrix
_VALUES_AT_A_TIME = 4_194_304


class Int8Cache:
    """Reads the file with a checkpoint's rounded matrices.

    Raises:
        SpecError: there is no readable file, or it was made of other files or of another model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._shards = Shards(checkpoint.folder / INT8_FOLDER, "pt")
        if self._shards.metadata() != _metadata(checkpoint):
            raise SpecError(f"{checkpoint.folder / INT8_FOLDER} is of other files")
        for name, shape in _shapes(checkpoint).items():
            stored = self._shards.slice(name)
            if (stored.get_dtype(), tuple(stored.get_shape())) != (_dtype(name), shape):
                raise SpecError(f"{checkpoint.folder / INT8_FOLDER} is of another model")
        self._shards.close()

    @classmethod
    def find(cls, checkpoint: Checkpoint) -> "Int8Cache | None":
        """The checkpoint's cache; None if there is no valid one."""
        try:
            return cls(checkpoint)
        except SpecError:
            return None

    def part(
        self, name: str, rows: range | None, columns: range | None, dtype: torch.dtype
    ) -> NarrowWeight:
        """A rounded matrix, or a slice of it; the same numbers as if it were rounded now.

        Args:
            dtype: the type that it is widened to.
        """
        num_rows, num_columns = self._shards.slice(name).get_shape()
        rows = range(num_rows) if rows is None else rows
        columns = range(num_columns) if columns is None else columns
        first = columns.start % INPUTS_OF_SCALE
        groups = range(columns.start // INPUTS_OF_SCALE, -(-columns.stop // INPUTS_OF_SCALE))
        values, scales = self._slice(name, rows, columns), self._slice(name + _SCALES, rows, groups)
        return NarrowWeight(values, scales, INPUTS_OF_SCALE, first, dtype)

    def _slice(self, name: str, rows: range, columns: range) -> Tensor:
        """A copy of a slice, so that the file need not stay mapped."""
        whole = self._shards.slice(name)
        part: Tensor = whole[rows.start : rows.stop, columns.start : columns.stop].clone()
        # Whole rows are counted: a slice of their columns touches most of their pages.
        self._shards.count_read(len(rows) * whole.get_shape()[1] * part.itemsize)
        return part


def write_int8_cache(checkpoint: Checkpoint, touch: Callable[[], None]) -> None:
    """Round all matrices that are not stored in one byte, and write them.

    Args:
        touch: called after every piece, to show that work goes on.

    Raises:
        SpecError: a tensor cannot be read.
        UserError: the folder cannot be written to.
    """
    shapes = _shapes(checkpoint)
    header: dict[str, Any] = {"__metadata__": _metadata(checkpoint)}
    end = 0
    # float32 first: safetensors reads it where it is, and there must be no gap before it.
    for name in sorted(shapes, key=lambda each: not each.endswith(_SCALES)):
        rows, columns = shapes[name]
        begin, end = end, end + rows * columns * (4 if name.endswith(_SCALES) else 1)
        offsets = [begin, end]
        header[name] = {"dtype": _dtype(name), "shape": [rows, columns], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            if name.endswith(_SCALES):
                continue
            at = {
                each: 8 + len(text) + header[each]["data_offsets"][0]
                for each in (name, name + _SCALES)
            }
            for piece in _rounded(checkpoint, name, shapes[name]):
                for each, tensor in ((name, piece.values), (name + _SCALES, piece.scales)):
                    file.seek(at[each])
                    at[each] += file.write(tensor.contiguous().numpy().tobytes())
                touch()

    write_whole(checkpoint.folder / INT8_FOLDER / FILE, write)


def _rounded(checkpoint: Checkpoint, name: str, shape: Shape) -> Iterator[NarrowWeight]:
    """A matrix rounded in pieces of several rows."""
    num_rows = max(1, _VALUES_AT_A_TIME // shape[1])
    for start in range(0, shape[0], num_rows):
        rows = range(start, min(start + num_rows, shape[0]))
        weight = checkpoint.tensor(name, rows, dtype=torch.float32)
        yield NarrowWeight.rounded(weight, torch.float32)


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Shapes of the values and scales of every matrix that is rounded, by name."""
    shapes: dict[str, Shape] = {}
    for name in dict.fromkeys((*tensor_names(checkpoint.model), HEAD)):
        if is_matrix(name) and not checkpoint.is_narrow(name):
            rows, columns = shapes[name] = tensor_shape(checkpoint.model, name)
            shapes[name + _SCALES] = rows, -(-columns // INPUTS_OF_SCALE)
    return shapes


def _dtype(name: str) -> str:
    return "F32" if name.endswith(_SCALES) else "I8"


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    folder = checkpoint.folder
    stats = {str(path.relative_to(folder)): path.stat() for path in checkpoint.files()}
    files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}
    return {
        "format": f"expertlane int8 {_VERSION}",
        "inputs_of_scale": str(INPUTS_OF_SCALE),
        "files": json.dumps(files),
    }
