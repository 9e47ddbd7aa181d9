"""A checkpoint's matrices rounded to int8, kept in its folder for later starts.

A safetensors file, written whole or not at all. It records names, sizes and modification times of
the checkpoint's files. If these have changed, it counts as missing.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.stored_tensors import Shards
from expertlane.engine.ops.narrow import NarrowWeight
from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE, INT8_FOLDER
from expertlane.spec.files import write_whole
from expertlane.spec.model import HEAD, Shape, is_matrix, tensor_names, tensor_shape

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
