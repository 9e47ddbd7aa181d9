"""Files that are written whole or not at all."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from expertlane.errors import SpecError, UserError


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
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; return its path.

    Raises:
        UserError: its folder can't be written to.
    """
    write_whole(path, lambda file: file.write(text.encode()))
    return path


_MIB = 2**20
CONFIG_BYTES = 16 * _MIB  # config.json, experiment, profile and placement files
INDEX_BYTES = 256 * _MIB  # index of a checkpoint's shards, tokenizer
RESULTS_BYTES = 1024 * _MIB  # results.json
PROMPTS_BYTES = 256 * _MIB
TRACE_BYTES = 1024 * _MIB  # of a routing trace, decompressed too


def check_regular(path: Path, most_bytes: int | None = None) -> int:
    """The size in bytes of a regular file, without opening it: opening a FIFO would hang.

    Raises:
        SpecError: it is missing, not a regular file (links are followed), or larger than
            `most_bytes`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL byte in the name
        raise SpecError(f"cannot read {str(path)!r}: {error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise SpecError(f"cannot read {path}: it is a folder; give a file")
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"cannot read {path}: it is not a regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise SpecError(
            f"{path}: {status.st_size:,} bytes; at most {most_bytes:,} are read of such a file"
        )
    return status.st_size


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The contents of a regular file.

    Raises:
        SpecError: as `check_regular`, or it cannot be read.
    """
    check_regular(path, most_bytes)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > most_bytes:  # it grew, or its size is unknown, as in /proc
        raise SpecError(f"{path}: more than {most_bytes:,} bytes are not read of such a file")
    return data


def read_stream(path: Path, most_bytes: int) -> str:
    """The text of a file or a pipe in UTF-8, to its end: `/dev/stdin` and `<(…)` too.

    It waits for the writer of a pipe, as `cat` does.

    Raises:
        SpecError: it cannot be read, is too long, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL byte in the name
        raise SpecError(f"cannot read {str(path)!r}: {error}") from None
    if len(data) > most_bytes:
        raise SpecError(f"{path}: more than {most_bytes:,} bytes are not read of such a file")
    return _decoded(path, data)


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        SpecError: as `read_bytes`, or it is not UTF-8.
    """
    return _decoded(path, read_bytes(path, most_bytes))


def _decoded(path: Path, data: bytes) -> str:
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
