"""Reads tables of files into dataclasses; an unknown, missing or wrong key gets one line."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from expertlane.errors import SpecError
from expertlane.printable import printable
from expertlane.spec.ranges import REFUSED, SHOWN_LENGTH

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_WANTED = {  # by the beginnings of pydantic's names of errors
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "tuple": "a list",
    "dataclass": "a table of known keys (in JSON, an object)",
}


def build(kind: type[T], table: dict[str, Any], where: str = "") -> T:
    """The dataclass `kind` of a table in a file; the types of its fields say what is valid.

    Args:
        where: begins the text of an error.

    Raises:
        SpecError: a key is unknown or missing, a value is of another type, or the dataclass
            refuses it.
    """
    from pydantic import ValidationError  # slow to import, needed only here

    check_keys(table, field_names(kind), where or "the file")
    prefix = f"{where}: " if where else ""
    try:
        # Through JSON, since a strict dataclass takes no dict from Python. A date becomes a list,
        # which no field takes.
        as_json = json.dumps(table, default=lambda value: [str(value)])
        found: T = _adapter(kind).validate_json(as_json)  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        problems = error.errors()
    by_type = {problem["type"]: problem for problem in reversed(problems)}
    first = by_type.get("unexpected_keyword_argument") or by_type.get("missing") or problems[0]
    place, value = _find(table, first["loc"])
    alike = [each for each in problems if _find(table, each["loc"])[0] == place]
    match first["type"]:
        case "unexpected_keyword_argument":
            raise SpecError(f"{prefix}{place} is an unknown key")
        case "missing":
            missing = [f"{place}.{each['loc'][-1]}".removeprefix(".") for each in alike]
            verb = "is" if len(missing) == 1 else "are"
            raise SpecError(f"{prefix}{', '.join(missing)} {verb} missing")
        case "json_invalid":
            raise SpecError(f"{prefix}it holds a string that is no Unicode text")
        case refused if refused == REFUSED:
            # The table's own class names itself.
            raise SpecError(f"{prefix}{place}: {first['msg']}" if place else first["msg"])
    wanted = " or ".join(dict.fromkeys(map(_wanted, alike)))  # several where types are a union
    raise SpecError(f"{prefix}{place} is {shown_json(value)}; it must be {wanted}")


@cache
def _adapter(kind: type) -> "TypeAdapter[Any]":
    """Reads JSON into the dataclass; making one takes milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _find(value: Any, keys: Iterable[int | str]) -> tuple[str, Any]:
    """The place that keys lead to, and its value; a type that was tried is no key."""
    place = ""
    for key in keys:
        is_item = isinstance(value, list) and isinstance(key, int)
        if is_item or (isinstance(value, dict) and key in value):
            place, value = f"{place}.{printable(str(key))}", value[key]
    return place.removeprefix("."), value


def _wanted(problem: Mapping[str, Any]) -> str:
    expected = problem.get("ctx", {}).get("expected")  # of an enumeration
    if expected is not None:
        return str(expected)
    text = str(problem["msg"]).removeprefix("Input should be ")
    return _WANTED.get(problem["type"].partition("_")[0], text)


def field_names(kind: Any) -> list[str]:
    """Names of a dataclass's fields."""
    return [field.name for field in fields(kind)]


def check_keys(table: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse a key that is none of the valid ones.

    Raises:
        SpecError: there is one.
    """
    valid = list(valid)
    for key in table:
        if key not in valid:
            raise SpecError(f"unknown key {key!r} in {where}{nearest(key, valid)}")


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of a message: the valid word most like `word`, or all where none is like it."""
    valid = list(valid)
    matches = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; the nearest is {matches[0]!r}" if matches else f"; valid: {', '.join(valid)}"


def shown_json(value: Any) -> str:
    """A value of a file on one line, shortened if long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"
