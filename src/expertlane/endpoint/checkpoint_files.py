"""The tensors of a checkpoint by their stored names, in float32; nothing of the engine reads here.

Safetensors files are read by their own library, never unpickled. What is stored in float8, int8 or
MXFP4 is widened exactly: by plain expressions here, and by transformers for MXFP4.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertlane.errors import SpecError
from expertlane.spec.files import INDEX_BYTES, check_regular, read_json_object
from expertlane.spec.hf_config import NarrowScheme, is_mxfp4, narrow_scheme

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PLAIN = ("F32", "BF16", "F16", "F64")
_BESIDE = ("input_scale", "input_zero_point", "weight_zero_point")
_PIECE_BYTES = 32 * 1024**2  # read at a time, beside the tensor that is filled


class CheckpointFiles:
    """The safetensors files of a checkpoint's folder.

    Args:
        config: what `config.json` holds; it tells how matrices are quantised.

    Attributes:
        names: stored tensors; a quantised one has the name that it would have in full.

    Raises:
        SpecError: there are none, they are pickled, one can't be read, or the quantisation is none
            that can be widened.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._open_files: dict[str, Any] = {}
        self._file_of = _files_of_tensors(folder)
        self._scheme = narrow_scheme(config)
        self._is_mxfp4 = is_mxfp4(config)
        self.names = frozenset(self._whole_names())

    def is_narrow(self, name: str) -> bool:
        """Whether a tensor is stored in one byte or less a value."""
        return self._scale_of(name) is not None or f"{name}_blocks" in self._file_of

    def read(self, name: str) -> Tensor:
        """A whole tensor in float32, in memory of its own.

        Raises:
            SpecError: it is missing, can't be read, or is of a type that has no scales.
        """
        if f"{name}_blocks" in self._file_of:
            return self._read_mxfp4(name)
        scale = self._scale_of(name)
        if scale is not None:
            return self._read_narrow(name, scale)
        part = self._slice(name)
        if part.get_dtype() not in _PLAIN:
            raise SpecError(
                f"{self._folder}: tensor {name} is {part.get_dtype()}; it must be one of "
                f"{', '.join(_PLAIN)}, or quantised as config.json says"
            )
        shape = part.get_shape()
        out = torch.empty(shape)
        if not shape:
            return out.copy_(self._tensor(name))
        row = max(1, 4 * out[:1].numel())
        step = max(1, _PIECE_BYTES // row)
        for start in range(0, shape[0], step):
            end = min(start + step, shape[0])
            out[start:end] = part[start:end]
        return out

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows [len(rows), …] of a tensor that isn't quantised, in float32.

        Raises:
            SpecError: as in `read`.
        """
        if self.is_narrow(name):
            return self.read(name)[torch.tensor(rows)]
        part = self._slice(name)
        out = torch.empty([len(rows), *part.get_shape()[1:]])
        for place, row in enumerate(rows):
            out[place] = part[row]
        return out

    def close(self) -> None:
        """Close all files; they are opened again when needed."""
        self._open_files.clear()

    def _open(self, name: str) -> Any:
        if name not in self._open_files:
            path = self._folder / name
            check_regular(path)
            self._open_files[name] = _opened(path)
        return self._open_files[name]

    def _slice(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise SpecError(f"{self._folder}: tensor {name} is missing")
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise SpecError(f"{self._folder / file}: tensor {name} is missing") from None

    def _tensor(self, name: str) -> Tensor:
        self._slice(name)
        whole: Tensor = self._open(self._file_of[name]).get_tensor(name)
        return whole

    def _whole_names(self) -> Iterator[str]:
        for name in self._file_of:
            if self._is_mxfp4 and name.endswith("_blocks"):
                yield name.removesuffix("_blocks")
            elif self._scheme is not None and self._scheme.is_packed and name.endswith("_packed"):
                yield name.removesuffix("_packed")
            elif not self._is_beside(name):
                yield name

    def _is_beside(self, name: str) -> bool:
        """Whether a tensor belongs to another one: its scales, its shape."""
        if self._is_mxfp4 and name.endswith("_scales"):
            return f"{name.removesuffix('_scales')}_blocks" in self._file_of
        if self._scheme is None:
            return False
        values = name.removesuffix(self._scheme.scale)
        if values != name and (values in self._file_of or f"{values}_packed" in self._file_of):
            return True
        return name.endswith(_BESIDE) or (self._scheme.is_packed and name.endswith("_shape"))

    def _scale_of(self, name: str) -> str | None:
        """The name of a matrix's scales; None if it has none."""
        if self._scheme is None:
            return None
        scale = f"{name}{self._scheme.scale}"
        return scale if scale in self._file_of else None

    def _read_narrow(self, name: str, scale: str) -> Tensor:
        """Values times scales, each shared by a block of rows and columns."""
        assert self._scheme is not None
        values = self._unpacked(name) if self._scheme.is_packed else self._tensor(name)
        wide, scales = values.to(torch.float32), self._tensor(scale).float()
        if scales.numel() == 1:
            return wide.mul_(scales.reshape(()))
        return wide.mul_(_spread(scales, wide.shape, self._scheme))

    def _unpacked(self, name: str) -> Tensor:
        """int8 values of packed ones: four in an int32, first in the lowest bits, each plus 128."""
        words = self._tensor(f"{name}_packed").contiguous()
        values = (words.view(torch.uint8) ^ 0x80).view(torch.int8)
        shape = f"{name}_shape"
        columns = int(self._tensor(shape)[-1]) if shape in self._file_of else values.shape[-1]
        return values[:, :columns]

    def _read_mxfp4(self, name: str) -> Tensor:
        """[num_experts, in_features, out_features], as GPT-OSS keeps its experts."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = self._slice(f"{name}_blocks"), self._slice(f"{name}_scales")
        num_experts, rows, groups, half = blocks.get_shape()
        out = torch.empty(num_experts, groups * half * 2, rows)
        for expert in range(num_experts):  # widened, they take much memory
            part = slice(expert, expert + 1)
            out[part] = convert_moe_packed_tensors(blocks[part], scales[part], dtype=torch.float32)
        return out


def _spread(scales: Tensor, shape: Sequence[int], scheme: NarrowScheme) -> Tensor:
    """Scales [blocks of rows, blocks of columns] for each value of a matrix."""
    rows, columns = shape
    by_row = scales.view(len(scales), -1)
    by_row = by_row.repeat_interleave(scheme.rows or rows, dim=0)[:rows]
    return by_row.repeat_interleave(scheme.columns or columns, dim=1)[:, :columns]


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """The file name of every stored tensor."""
    single, index = folder / _FILE, folder / _INDEX
    if single.exists():  # transformers looks for it first
        check_regular(single)
        return dict.fromkeys(_opened(single).keys(), _FILE)
    if not index.exists():
        pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
        if pickled:
            raise SpecError(
                f"{folder}: weights are in {pickled[0]}, which is pickled and may run code; such "
                "files are not read; give a checkpoint in safetensors"
            )
        raise SpecError(f"{folder}: there is neither {_FILE} nor {_INDEX}")
    files = read_json_object(index, INDEX_BYTES, lenient=True).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
        raise SpecError(f"{index} cannot be read: it must hold an object 'weight_map'")
    for file in set(files.values()):
        path = PurePosixPath(file)
        if not file.endswith(".safetensors") or path.is_absolute() or ".." in path.parts:
            raise SpecError(
                f"{index} names {file!r}; shards must be .safetensors files in the folder"
            )
    return dict(files)


def _opened(path: Path) -> Any:
    try:
        # Read, not mapped: pages of a mapped file would count as memory of this process.
        return safe_open(path, "pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
