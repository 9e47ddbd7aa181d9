"""The safetensors files of a checkpoint: one, or many with an index.

Files are memory-mapped. Pages of a mapped file count as memory of whoever reads them, so the
mapping is dropped whenever much of it has been read.
"""

import json
import mmap
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from expertlane.errors import SpecError
from expertlane.spec.files import INDEX_BYTES, check_regular, read_json_object

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
MAX_MAPPED_BYTES = 64 * 1024**2


class Shards:
    """The stored tensors of a folder.

    Args:
        framework: library of the arrays that slices are; with numpy nothing here needs torch.

    Raises:
        SpecError: there are none, or the index or a file cannot be read.
    """

    def __init__(self, folder: Path, framework: Literal["pt", "numpy"]) -> None:
        self._folder = folder
        self._framework = framework
        self._open_files: dict[str, Any] = {}
        self._mapped_bytes = 0
        self._file_of_tensor = self._read_index()

    def __contains__(self, stored_name: str) -> bool:
        return stored_name in self._file_of_tensor

    def names_in_files(self) -> Iterable[str]:
        """Names of all stored tensors, also of those that the index lacks."""
        for file in sorted(set(self._file_of_tensor.values())):
            yield from self._file(file).keys()

    def slice(self, stored_name: str) -> Any:
        """A stored tensor, to be sliced: only what is sliced is read.

        Raises:
            SpecError: it is missing, or its file cannot be read.
        """
        file = self._file_of_tensor.get(stored_name)
        if file is None:
            raise SpecError(f"{self._folder}: tensor {stored_name} is missing")
        try:
            return self._file(file).get_slice(stored_name)
        except SafetensorError:
            raise SpecError(f"{self._folder / file}: tensor {stored_name} is missing") from None

    def bytes_of(self, stored_name: str) -> memoryview:
        """The bytes of a stored tensor, memory-mapped."""
        path = self._folder / self._file_of_tensor[stored_name]
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(header_bytes))[stored_name]["data_offsets"]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(mapped)[8 + header_bytes :][begin:end]

    def count_read(self, num_bytes: int) -> None:
        """Count bytes that were read from mapped files."""
        self._mapped_bytes += num_bytes

    def close(self) -> None:
        """Unmap all files; they are opened again when needed."""
        self._open_files.clear()
        self._mapped_bytes = 0

    def _read_index(self) -> dict[str, str]:
        """The file of every stored tensor."""
        path = self._folder / _INDEX
        if (self._folder / _FILE).exists():  # transformers looks for it first
            return dict.fromkeys(self._file(_FILE).keys(), _FILE)
        if not path.exists():
            raise SpecError(f"{self._folder}: there is neither {_FILE} nor {_INDEX}")
        files = read_json_object(path, INDEX_BYTES, lenient=True).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise SpecError(f"{path} cannot be read: it must hold an object 'weight_map'")
        for file in set(files.values()):
            if not _stays_inside(file):
                raise SpecError(
                    f"{path} names {file!r}; shards must lie in the checkpoint's folder"
                )
        return dict(files)

    def _file(self, name: str) -> Any:
        """An open file; others are unmapped first where much of them was read."""
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self.close()
        if name not in self._open_files:
            path = self._folder / name
            if not path.exists():
                raise SpecError(f"{path} is missing; {_INDEX} names it")
            check_regular(path)
            try:
                self._open_files[name] = safe_open(path, self._framework)
            except (OSError, SafetensorError) as error:
                raise SpecError(f"{path} cannot be read: {error}") from None
        return self._open_files[name]


def _stays_inside(file: str) -> bool:
    """Judged by the name alone: links are followed, since the hub's cache consists of them."""
    path = PurePosixPath(file)
    return bool(file) and "\0" not in file and not path.is_absolute() and ".." not in path.parts
