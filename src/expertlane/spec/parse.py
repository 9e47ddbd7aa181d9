"""Reading JSON and TOML files that a user names; malformed ones are refused with one line."""

import json
import tomllib
from collections import Counter
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from expertlane.errors import SpecError
from expertlane.spec.files import read_text
from expertlane.spec.ranges import shown

_MAX_DIGITS = 40  # of a whole number; Python itself takes no more than 4,300
_MAX_DEPTH = 100  # of nested lists and tables


class _InvalidError(ValueError):
    """Well-formed, but not accepted."""


def read_json(path: Path, most_bytes: int, *, lenient: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        lenient: read it as other programs do: the last one of two equal keys counts, and NaN and
            Infinity are numbers.

    Raises:
        SpecError: it is missing, not a regular file, too large, not UTF-8, malformed, nested too
            deeply, or has a number of too many digits.
    """
    text = read_text(path, most_bytes)
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=None if lenient else _finite,
            parse_constant=None if lenient else _refuse_constant,
            object_pairs_hook=None if lenient else _unique,
        )
        _check_depth(value)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except _InvalidError as error:
        raise SpecError(f"{path}: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: {_TOO_DEEP}") from None
    return value


def read_json_object(path: Path, most_bytes: int, *, lenient: bool = False) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object.

    Raises:
        SpecError: as `read_json`, or it holds something else.
    """
    value = read_json(path, most_bytes, lenient=lenient)
    if not isinstance(value, dict):
        raise SpecError(f"{path} must hold a JSON object")
    return value


def read_toml(path: Path, most_bytes: int) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        SpecError: it is missing, not a regular file, too large, not UTF-8, malformed, nested too
            deeply, or has a number of too many digits.
    """
    text = read_text(path, most_bytes)
    try:
        table = tomllib.loads(text)
        _check_depth(table)
    except _InvalidError as error:
        raise SpecError(f"{path}: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: {_TOO_DEEP}") from None
    except ValueError as error:  # also a number of too many digits
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
        what = str(error).replace("at end of document", end)
        raise SpecError(f"{path}: malformed TOML: {what}") from None
    return table


_TOO_DEEP = f"nested too deeply; valid: {_MAX_DEPTH} levels at most"


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _InvalidError(f"a number has {len(digits):,} digits; valid: at most {_MAX_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise _InvalidError(f"the number {text[:40]} is too large")
    return number


def _refuse_constant(word: str) -> NoReturn:
    raise _InvalidError(f"{word} is not valid JSON; numbers must be finite")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        num_times = Counter(key for key, _ in pairs)
        raise _InvalidError(
            f"the key {shown(max(num_times, key=num_times.__getitem__))} is given twice"
        )
    return table


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _InvalidError(_TOO_DEEP)
