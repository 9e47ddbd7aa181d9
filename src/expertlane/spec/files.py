"""Files: written whole or not at all; read up to a size, malformed ones refused with one line.

`build` makes dataclasses of their tables; an unknown, missing or wrong key gets one line too.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from itertools import count
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar

from expertlane.errors import SpecError, UserError, did_you_mean, naming
from expertlane.printable import printable
from expertlane.spec.ranges import REFUSED, SHOWN_LENGTH, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file under a temporary name beside `path`, then rename it.

    A link stays, and the file that it leads to is replaced.

    Raises:
        UserError: its folder can't be written to, or `path` is a device, a pipe or a folder: a
            rename would put a file in its place.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: links that lead in a circle. ValueError: a NUL byte in the name.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; return its path.

    Raises:
        UserError: its folder can't be written to.
    """
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def user_cache() -> Path:
    """The folder for results of long computations; not created yet.

    XDG_CACHE_HOME counts where it is absolute, as the XDG specification has it.

    Raises:
        RuntimeError: this user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "expertlane"


_MIB = 2**20
CONFIG_BYTES = 16 * _MIB  # config.json, experiment, profile and placement files
INDEX_BYTES = 256 * _MIB  # index of a checkpoint's shards, tokenizer
RESULTS_BYTES = 1024 * _MIB  # results.json
PROMPTS_BYTES = 256 * _MIB
TRACE_BYTES = 1024 * _MIB  # of a routing trace, decompressed too


def as_path(name: str, value: object) -> Path:
    """A path that was given as an argument.

    Raises:
        SpecError: it is none; the text names the argument.
    """
    if isinstance(value, str) or (
        isinstance(value, os.PathLike) and isinstance(value.__fspath__(), str)
    ):
        return Path(value)
    raise SpecError(f"{name} is {shown(value)}; it must be a path")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL byte in the name
        raise SpecError(f"cannot read {str(path)!r}: {error}") from None


def is_folder(path: Path) -> bool:
    """True if a path is a folder; links are followed.

    Raises:
        SpecError: the name is too long.
    """
    with _reading(path):
        return path.is_dir()


def check_regular(path: Path, most_bytes: int | None = None) -> int:
    """The size in bytes of a regular file, without opening it: opening a FIFO would hang.

    Raises:
        SpecError: it is missing, not a regular file (links are followed), or larger than
            `most_bytes`.
    """
    with _reading(path):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise SpecError(f"cannot read {path}: it is a folder; give a file")
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"cannot read {path}: it is not a regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise SpecError(
            f"{path}: {status.st_size:,} bytes; at most {most_bytes:,} are read of such a file"
        )
    return status.st_size


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        SpecError: as `check_regular`, or it cannot be read, or is not UTF-8.
    """
    check_regular(path, most_bytes)
    return _read(path, most_bytes, os.O_NONBLOCK)


def read_lines(path: Path, most_line_bytes: int) -> Iterator[tuple[int, str]]:
    """The lines of a regular file in UTF-8 with their numbers from 1, blank ones left out.

    Raises:
        SpecError: as `check_regular`, or it cannot be read, a line is too long or not UTF-8.
    """
    check_regular(path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    with _reading(path), open(os.open(path, flags), "rb") as file:
        for number in count(1):
            line = file.readline(most_line_bytes + 1)
            if not line:
                return
            if len(line) > most_line_bytes:
                raise SpecError(f"{path}: line {number} is longer than {most_line_bytes:,} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise SpecError(f"{path}: line {number} is not UTF-8") from None
            if text:
                yield number, text


def read_stream(path: Path, most_bytes: int) -> str:
    """The text of a file or a pipe in UTF-8, to its end: `/dev/stdin` and `<(…)` too.

    It waits for the writer of a pipe, as `cat` does.

    Raises:
        SpecError: it cannot be read, is too long, or is not UTF-8.
    """
    return _read(path, most_bytes)


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        SpecError: as `check_regular`, or it cannot be read.
    """
    check_regular(path, most_bytes)
    return _read_bytes(path, most_bytes, os.O_NONBLOCK)


def _read_bytes(path: Path, most_bytes: int, flags: int = 0) -> bytes:
    with _reading(path), open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:  # it grew, or its size is unknown, as in /proc
        raise SpecError(f"{path}: more than {most_bytes:,} bytes are not read of such a file")
    return data


def _read(path: Path, most_bytes: int, flags: int = 0) -> str:
    data = _read_bytes(path, most_bytes, flags)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start} is not UTF-8") from None


def strict_json(value: Any, **layout: Any) -> str:
    """A value as JSON text.

    Args:
        layout: options of `json.dumps`, such as `indent` and `separators`.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON cannot express.
    """
    return json.dumps(value, allow_nan=False, **layout)


_MAX_DIGITS = 40  # of a whole number; Python itself takes no more than 4,300
_MAX_DEPTH = 100  # of nested lists and tables


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
        with _parsing(path):
            return parse_json(text, lenient=lenient)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None


def parse_json(text: str, *, lenient: bool = False) -> Any:
    """The value of a JSON text; `lenient` as for `read_json`.

    Raises:
        SpecError: it is nested too deeply, or has a number of too many digits.
        json.JSONDecodeError: it is malformed.
    """
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=None if lenient else _finite,
            parse_constant=None if lenient else _refuse_constant,
            object_pairs_hook=None if lenient else _unique,
        )
    except RecursionError:
        raise SpecError(_TOO_DEEP) from None
    _check_depth(value)
    return value


def read_json_object(path: Path, most_bytes: int, *, lenient: bool = False) -> dict[str, Any]:
    """The object in a JSON file; `lenient` as for `read_json`.

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
    import tomllib  # not for the help of commands

    text = read_text(path, most_bytes)
    try:
        with _parsing(path):
            table = tomllib.loads(text)
            _check_depth(table)
    except ValueError as error:  # also a number of too many digits
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
        what = str(error).replace("at end of document", end)
        raise SpecError(f"{path}: malformed TOML: {what}") from None
    return table


_TOO_DEEP = f"nested too deeply; valid: {_MAX_DEPTH} levels at most"


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Name the file where what it holds is well-formed, but not accepted."""
    with naming(path):
        try:
            yield
        except RecursionError:
            raise SpecError(_TOO_DEEP) from None


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise SpecError(f"a number has {len(digits):,} digits; valid: at most {_MAX_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise SpecError(f"the number {text[:40]} is too large")
    return number


def _refuse_constant(word: str) -> NoReturn:
    raise SpecError(f"{word} is not valid JSON; numbers must be finite")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        num_times = Counter(key for key, _ in pairs)
        raise SpecError(
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
    raise SpecError(_TOO_DEEP)


def fill_closed() -> set[int]:
    """Open /dev/null in place of each closed one of the first three descriptors.

    Else the next file opened would get its number, and with it what is printed, here or by a child
    process.

    Returns:
        The descriptors that were closed.
    """
    closed = set()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.add(descriptor)
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    return closed


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
    words = wanted.split("'")[1::2]  # of enumerations
    if isinstance(value, str) and (hint := did_you_mean(value, words)):
        wanted += f" ({hint})"
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
    import difflib

    valid = list(valid)
    matches = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; the nearest is {matches[0]!r}" if matches else f"; valid: {', '.join(valid)}"


def shown_json(value: Any) -> str:
    """A value of a file on one line, shortened if long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"
