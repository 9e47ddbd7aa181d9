"""Tensors and plain data of a `torch.save` file, read without torch.

Such a file is a zip archive: `data.pkl`, a pickle program that builds the saved value, and one
member with the raw numbers of each storage (torch/serialization.py). The program is run only if all
its opcodes build plain data, or tensors on a storage; no name in it is imported.
"""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.files import CONFIG_BYTES, TRACE_BYTES, check_regular

DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
)
_PROGRAM_BYTES = 16 * CONFIG_BYTES
_MOST_DIMS = 8

_DTYPES: dict[str, np.dtype[Any]] = {  # by the names of torch's storages
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "ShortStorage": np.dtype("<i2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "BoolStorage": np.dtype("?"),
}
_OPCODES = re.compile(  # names of those that are run
    "PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|EMPTY_(DICT|LIST|TUPLE)|BININT[12]?|LONG1|BINFLOAT"
    "|(SHORT_)?BINUNICODE|(LONG_)?BINPUT|MEMOIZE|(LONG_)?BINGET|(STACK_)?GLOBAL|TUPLE[123]?"
    "|APPENDS?|SETITEMS?|BINPERSID|REDUCE"
)


def is_torch_file(path: Path) -> bool:
    """True if a file is a zip archive as `torch.save` writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, *DAMAGED):
        return False


def read_torch_file(path: Path) -> Any:
    """The saved value: dicts, lists, tuples, numbers, strings, and tensors as read-only arrays.

    Raises:
        UserError: the file is missing, damaged or too large, or has any other type.
    """
    check_regular(path, TRACE_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Program(archive).load()
    except _ContentError as error:
        raise UserError(f"{path} {error}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is not a torch.save file, or is damaged") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _ContentError(Exception):
    """The file has something that is not read here; the text follows the file's name."""


class _Program(pickle.Unpickler):
    """The pickle program of `data.pkl`, which builds plain data and tensors alone."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._sizes = {each.filename: each.file_size for each in archive.infolist()}
        if (total := sum(self._sizes.values())) > TRACE_BYTES:
            raise _ContentError(
                f"has {total:,} bytes when unpacked; at most {TRACE_BYTES:,} are read"
            )
        self._folder = next(
            name.removesuffix("data.pkl") for name in self._sizes if name.endswith("/data.pkl")
        )
        order = f"{self._folder}byteorder"
        if order in self._sizes and archive.read(order) != b"little":
            raise _ContentError("has numbers of a big-endian machine")
        self._storages: dict[tuple[str, str], npt.NDArray[Any]] = {}
        name = f"{self._folder}data.pkl"
        if self._sizes[name] > _PROGRAM_BYTES:
            raise _ContentError(f"has a data.pkl of more than {_PROGRAM_BYTES:,} bytes")
        program = archive.read(name)
        _check_opcodes(program)
        super().__init__(io.BytesIO(program))

    def find_class(self, module: str, name: str) -> Any:
        """The function or number type that stands for one of the few names known here."""
        if module == "torch" and name.endswith("Storage"):
            if name not in _DTYPES:
                raise _ContentError(f"holds a tensor of torch.{name[:60]}")
            return _DTYPES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise _ContentError(f"holds more than numbers and text ({f'{module}.{name}'[:60]})")
        return known[module, name]

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        """The numbers of a storage, by its description in the program."""
        kind, dtype, key, _, number = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise ValueError("no storage")
        member = f"{self._folder}data/{key}"
        if number * dtype.itemsize != self._sizes[member]:
            raise ValueError("another size than it says")
        if (key, dtype.str) not in self._storages:
            raw = self._archive.read(member)
            self._storages[key, dtype.str] = np.frombuffer(raw, dtype)
        return self._storages[key, dtype.str]


def _check_opcodes(program: bytes) -> None:
    """Refuse a program that does more than build plain data, or takes much memory for its memo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on escapes in arguments of opcodes not known here
        for operation, argument, _ in pickletools.genops(program):
            if not _OPCODES.fullmatch(operation.name):
                raise _ContentError(f"holds more than numbers and text ({operation.name})")
            if operation.name == "LONG_BINPUT" and int(argument or 0) > len(program):
                raise ValueError("a place in the memo beyond all values")


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> npt.NDArray[Any]:
    numbers = [offset, *sizes, *strides]
    if any(type(each) is not int or each < 0 for each in numbers) or len(sizes) > _MOST_DIMS:
        raise ValueError("no sizes")
    if len(sizes) != len(strides) or not isinstance(storage, np.ndarray):
        raise ValueError("no tensor")
    if prod(sizes) == 0:
        return np.zeros(sizes, storage.dtype)
    last = offset + sum((size - 1) * by for size, by in zip(sizes, strides, strict=True))
    if last >= len(storage) or prod(sizes) > len(storage):
        raise ValueError("a tensor beyond its storage")
    step = storage.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], sizes, [by * step for by in strides], writeable=False
    )
