"""Read tensors and plain data from a `torch.save` file, without torch and without unpickling.

Such a file is a zip archive: `data.pkl`, a pickle program that builds the saved value, and one
member with the raw numbers of each storage (torch/serialization.py). The opcodes of the program are
interpreted here, one by one. Only opcodes that build plain data, and tensors on a storage, are
known; any other is an error. No name in the file is imported or called.
"""

import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.files import CONFIG_BYTES, TRACE_BYTES, check_regular

DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    KeyError,
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


class _Mark:
    """Pickle's mark on the stack, below the operands of an opcode."""


class _Name:
    """A global name in the program; pickle would import it, here it is only compared."""

    def __init__(self, text: str) -> None:
        self.text = text


_MARK: Final = _Mark()
_TENSOR, _TABLE = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"


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
            return _Machine(archive).run()
    except _Refused as error:
        raise UserError(f"{path} {error}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is not a torch.save file, or is damaged") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _Refused(Exception):
    """The file has something that is not read here; the text follows the file's name."""


class _Machine:
    """Interprets the opcodes of `data.pkl` that build plain data and tensors."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._sizes = {each.filename: each.file_size for each in archive.infolist()}
        if (total := sum(self._sizes.values())) > TRACE_BYTES:
            raise _Refused(f"has {total:,} bytes when unpacked; at most {TRACE_BYTES:,} are read")
        self._folder = next(
            name.removesuffix("data.pkl") for name in self._sizes if name.endswith("/data.pkl")
        )
        order = f"{self._folder}byteorder"
        if order in self._sizes and archive.read(order) != b"little":
            raise _Refused("has numbers of a big-endian machine")
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], npt.NDArray[Any]] = {}

    def run(self) -> Any:
        """Interpret the program; return the value that it builds."""
        name = f"{self._folder}data.pkl"
        if self._sizes[name] > _PROGRAM_BYTES:
            raise _Refused(f"has a data.pkl of more than {_PROGRAM_BYTES:,} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on escapes in arguments of opcodes not known here
            for operation, argument, _ in pickletools.genops(self._archive.read(name)):
                if operation.name == "STOP":
                    return self._stack.pop()
                do = _OPERATIONS.get(operation.name)
                if do is None:
                    raise _Refused(f"holds more than numbers and text ({operation.name})")
                do(self, argument)
        raise ValueError("no end")

    def push(self, value: Any) -> None:
        """Push a value."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Pop a value."""
        return self._stack.pop()

    def since_mark(self) -> list[Any]:
        """Pop all values above the last mark, and the mark."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise ValueError("no mark")

    def keep(self, number: int | None) -> None:
        """Store the top of the stack in the memo; under the next number for None."""
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]

    def recall(self, number: int) -> None:
        """Push a value of the memo."""
        self._stack.append(self._memo[number])

    def append(self, values: list[Any]) -> None:
        """Append to the list on the stack."""
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError("no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Add keys and values to the dict on the stack."""
        target = self._stack[-1]
        if type(target) is not dict:
            raise ValueError("no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise _Refused("has a key that is neither text nor a whole number")
            target[key] = value

    def reduce(self) -> None:
        """Call one of two known functions: build a tensor, or an empty OrderedDict."""
        arguments, name = self.pop(), self.pop()
        text = name.text if type(name) is _Name else "a value"
        if type(arguments) is tuple and text == _TENSOR:
            self.push(self._tensor(*arguments[:4]))
        elif arguments == () and text == _TABLE:
            self.push({})
        else:
            raise _Refused(f"holds more than numbers and text ({text.replace(' ', '.')[:60]})")

    def storage(self) -> None:
        """Replace a storage's description on the stack by its numbers."""
        kind, name, key, _, number = self.pop()
        if kind != "storage" or type(name) is not _Name or type(key) is not str:
            raise ValueError("no storage")
        dtype = _DTYPES.get(name.text.rpartition(" ")[2])
        if dtype is None or not name.text.startswith("torch "):
            raise _Refused(f"holds a tensor of {name.text.replace(' ', '.')[:60]}")
        member = f"{self._folder}data/{key}"
        if number * dtype.itemsize != self._sizes[member]:
            raise ValueError("another size than it says")
        if (key, dtype.str) not in self._storages:
            raw = self._archive.read(member)
            self._storages[key, dtype.str] = np.frombuffer(raw, dtype)
        self.push(self._storages[key, dtype.str])

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any) -> npt.NDArray[Any]:
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


def _value(machine: _Machine, value: Any) -> None:
    machine.push(value)


def _pushing(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _joined(name: Any, module: Any) -> str:
    if type(name) is not str or type(module) is not str:
        raise ValueError("no name")
    return f"{module} {name}"


def _tuple_of(number: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(number)]
        machine.push(tuple(reversed(values)))

    return make


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _pushing(lambda: _MARK),
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_TUPLE": _pushing(tuple),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _value),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _value),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.keep),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": lambda machine, text: machine.push(_Name(text)),
    "STACK_GLOBAL": lambda machine, _: machine.push(_Name(_joined(machine.pop(), machine.pop()))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.reduce(),
}
