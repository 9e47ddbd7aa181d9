"""Functions of a compiled library, with their types."""

import ctypes
from typing import Any

_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}


def function_of(library: ctypes.CDLL, name: str, arguments: str, result: str = "") -> Any:
    """A function of a library.

    Args:
        arguments: a letter for the type of each: a pointer, a whole number of 64 or of 32 bits, or
            a float32: p, n, i, f.
        result: the letter of its own; none where it gives nothing.
    """
    function = getattr(library, name)
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = _TYPES[result] if result else None
    return function
