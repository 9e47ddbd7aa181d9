"""Reading slices of a Hugging Face checkpoint; only the asked slices are touched."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expertlane.errors import SpecError
from expertlane.model.checkpoint_names import Stored, is_left_unread, stored_places
from expertlane.model.dequantize import MXFP4_BLOCK, dequantize_fp8, dequantize_mxfp4
from expertlane.model.shards import MAX_MAPPED_BYTES, Shards
from expertlane.model.tensors import EMBEDDING, HEAD, Shape, cut_dim, tensor_names, tensor_shape
from expertlane.model.weight_source import WeightSource
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import (
    family_of,
    num_extra_layers,
    read_config,
    weight_block_size,
)
from expertlane.spec.model import ModelConfig

_PLAIN = ("F32", "BF16", "F16")
_FP8 = "F8_E4M3"
_MAX_COPIED_BYTES = MAX_MAPPED_BYTES // 4  # at a time

Index = tuple[int | slice, ...]


class Checkpoint:
    """A folder with a `config.json` and safetensors.

    Args:
        model: what is to be read; by default what `config.json` describes.

    Attributes:
        folder: where it is.
        model: as given or described.

    Raises:
        SpecError: no checkpoint is there, or it is of a kind that cannot be read.
    """

    def __init__(self, folder: Path, model: ModelConfig | None = None) -> None:
        self.folder = folder
        config = read_config(folder)
        self.model = model or from_hf(config, folder.resolve().name)
        self._family = family_of(config)
        self._block_size = weight_block_size(config)
        self._num_extra_layers = num_extra_layers(config)
        self._shards = Shards(folder)

    def tensor(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A logical tensor, or a slice of it, in memory of its own.

        Args:
            name: one of `model.tensors`.
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
            return self._read_mxfp4(stored, shape, parts, dtype)
        if self._stored_type(stored.name) == _FP8:
            return self._read_fp8(stored, shape, parts, dtype)
        if self._stored_type(stored.name) not in _PLAIN:
            raise self._refused_type(stored.name)
        out = torch.empty([len(part) for part in parts], dtype=dtype)
        into = out.t() if stored.transposed else out
        self._copy(stored.name, _index(stored, parts, shape[0]), into)
        return out

    def check(self) -> list[str]:
        """Look for all tensors of the model and at their shapes, by the files' headers alone.

        Returns:
            The stored tensors that the model has no use for, sorted. An output head beside an
            embedding that it is tied to is none of them, nor is what transformers leaves unread
            without a word.

        Raises:
            SpecError: one is missing or has a wrong shape.
        """
        used: set[str] = set()
        for name in tensor_names(self.model):
            used.update(self._stored_names(self._locate(name)[0]))
        if self._has_both_tied():
            used.add(stored_places(self._family, HEAD)[0].name)
        first = self.model.num_hidden_layers
        extra_layers = range(first, first + self._num_extra_layers)
        unused = {
            name
            for name in self._shards.names_in_files()
            if name not in used and not is_left_unread(name, extra_layers)
        }
        self._shards.close()
        return sorted(unused)

    def has_head_of_its_own(self) -> bool:
        """Whether `config.json` ties the head to the embedding, but there is another head.

        Raises:
            SpecError: the head has another shape than the embedding, or cannot be read.
        """
        if not self._has_both_tied():
            return False
        untied = Checkpoint(self.folder, self.model.with_overrides(tie_word_embeddings=False))
        num_rows = max(1, _MAX_COPIED_BYTES // (4 * self.model.hidden_size))
        for start in range(0, self.model.vocab_size, num_rows):
            rows = range(start, min(start + num_rows, self.model.vocab_size))
            embedding, head = (untied.tensor(name, rows) for name in (EMBEDDING, HEAD))
            if not torch.equal(embedding, head):
                return True
        return False

    def _has_both_tied(self) -> bool:
        places = (stored_places(self._family, name)[0] for name in (EMBEDDING, HEAD))
        return self.model.tie_word_embeddings and all(each.name in self._shards for each in places)

    def _stored_names(self, stored: Stored) -> list[str]:
        """A tensor's own name, or those of its quantised form."""
        if self._is_mxfp4(stored):
            return [f"{stored.name}_blocks", f"{stored.name}_scales"]
        scale = f"{stored.name}_scale_inv"
        has_scale = scale in self._shards and self._stored_type(stored.name) == _FP8
        return [stored.name, scale] if has_scale else [stored.name]

    def _stored_type(self, stored_name: str) -> str:
        return str(self._shards.slice(stored_name).get_dtype())

    def _refused_type(self, stored_name: str) -> SpecError:
        return SpecError(
            f"{self.folder}: tensor {stored_name} is {self._stored_type(stored_name)}; it must be "
            f"{', '.join(_PLAIN)}, or quantised as config.json says"
        )

    def _is_mxfp4(self, stored: Stored) -> bool:
        return f"{stored.name}_blocks" in self._shards

    def _locate(self, name: str) -> tuple[Stored, Shape]:
        """Where a logical tensor is, and its logical shape; its stored shape has been checked."""
        places = stored_places(self._family, name)
        if name in (EMBEDDING, HEAD) and self.model.tie_word_embeddings:
            name = EMBEDDING  # one of them is enough
            places = stored_places(self._family, EMBEDDING) + stored_places(self._family, HEAD)
        shape = tensor_shape(self.model, name)
        for stored in places:
            if stored.name in self._shards or self._is_mxfp4(stored):
                break
        else:
            raise SpecError(f"{self.folder}: tensor {places[0].name} is missing")
        expected = list(shape)
        if stored.half is not None:
            expected[0] *= 2
        leading = [] if stored.expert is None else [self.model.num_experts]
        if self._is_mxfp4(stored):
            expected[1:] = [expected[1] // MXFP4_BLOCK]
            self._check_shape(f"{stored.name}_scales", leading + expected)
            self._check_shape(f"{stored.name}_blocks", [*leading, *expected, MXFP4_BLOCK // 2])
        else:
            self._check_shape(
                stored.name, leading + (expected[::-1] if stored.transposed else expected)
            )
        return stored, shape

    def _check_shape(self, stored_name: str, expected: list[int]) -> None:
        found = list(self._shards.slice(stored_name).get_shape())
        if found != expected:
            raise SpecError(
                f"{self.folder}: tensor {stored_name} has shape {found}; config.json asks for "
                f"{expected}"
            )

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

    def _read_fp8(
        self, stored: Stored, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> Tensor:
        block_size, scale_name = self._block_size, f"{stored.name}_scale_inv"
        if block_size is None or len(parts) != 2 or stored.expert is not None:
            raise self._refused_type(stored.name)
        self._check_shape(scale_name, [-(-n // b) for n, b in zip(shape, block_size, strict=True)])
        weight = torch.empty([len(part) for part in parts], dtype=torch.float8_e4m3fn)
        self._copy(stored.name, _index(stored, parts, shape[0]), weight)
        blocks = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(parts, block_size, strict=True)
        ]
        scales = torch.empty([len(block) for block in blocks])
        self._copy(scale_name, tuple(slice(block.start, block.stop) for block in blocks), scales)
        return dequantize_fp8(weight, scales, block_size, (parts[0].start, parts[1].start), dtype)

    def _read_mxfp4(
        self, stored: Stored, shape: Shape, parts: list[range], dtype: torch.dtype
    ) -> Tensor:
        rows, columns = parts
        inside = range(columns.start // MXFP4_BLOCK, -(-columns.stop // MXFP4_BLOCK))
        index = _index(replace(stored, transposed=False), [rows, inside], shape[0])
        blocks = torch.empty(len(rows), len(inside), MXFP4_BLOCK // 2, dtype=torch.uint8)
        scales = torch.empty(len(rows), len(inside), dtype=torch.uint8)
        self._copy(f"{stored.name}_blocks", (*index, slice(None)), blocks)
        self._copy(f"{stored.name}_scales", index, scales)
        values = dequantize_mxfp4(blocks, scales, dtype)
        first = columns.start - inside.start * MXFP4_BLOCK
        return values[:, first : first + len(columns)].contiguous()


def _index(stored: Stored, parts: list[range], num_rows: int) -> Index:
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


class CheckpointWeights(WeightSource):
    """A rank's slices of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        touch: Callable[[], None],
    ) -> None:
        super().__init__(dtype, device, touch)
        self._checkpoint = checkpoint

    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        by_columns = cut_dim(name) == 1
        return self._checkpoint.tensor(
            name,
            rows=None if by_columns else part,
            columns=part if by_columns else None,
            dtype=dtype,
        )
