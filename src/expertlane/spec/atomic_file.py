"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from expertlane.errors import UserError


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
