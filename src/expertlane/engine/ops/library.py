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
    """A function of a compiled library, with the types of its arguments and result set.

    Args:
        arguments: a letter for each argument's type: p (pointer), n (int64), i (int32), f (float).
        result: the letter of the result's type; empty for void.
    """
    function = getattr(library, name)
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = _TYPES[result] if result else None
    return function
