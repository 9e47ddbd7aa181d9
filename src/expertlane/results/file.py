"""`results.json`: written whole or not at all, and read back strictly."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from expertlane.errors import UserError
from expertlane.results.schema import SCHEMA_VERSION, Results

FILE_NAME = "results.json"

T = TypeVar("T")


def to_json(results: Results) -> str:
    """The text of `results.json`."""
    return record_json(results)


def record_json(record: Any) -> str:
    """The text of a file that holds a dataclass of results."""
    return json.dumps(asdict(record), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write(results: Results, folder: Path) -> Path:
    """Write `results.json` into `folder`, made if need be; return its path.

    Raises:
        UserError: the folder can't be written to.
    """
    return write_text(folder / FILE_NAME, to_json(results))


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, under a temporary name first; return its path.

    Raises:
        UserError: its folder can't be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def read(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        UserError: the file is missing or damaged, of another schema version, or a key is
            unknown, missing or of another type; one line that names the place.
    """
    return validated(Results, load(path, SCHEMA_VERSION), path)


def load(path: Path, schema_version: int, kind: str | None = None) -> dict[str, Any]:
    """What a results file says, not checked any further.

    Args:
        kind: what the file must say under that key; None for files that have none.

    Raises:
        UserError: the file is missing or damaged, or of another kind or schema version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UserError(f"{path} is not a results file: it has no schema_version")
    if kind is not None and data.get("kind") != kind:
        raise UserError(f"{path} is not a {kind}: its kind is {data.get('kind')!r}")
    if data["schema_version"] != schema_version:
        raise UserError(
            f"{path} has schema_version {data['schema_version']!r}; "
            f"this expertlane reads {schema_version}"
        )
    return data


def validated(as_type: type[T], data: dict[str, Any], path: Path) -> T:
    """What a file says as typed values.

    Raises:
        UserError: a key is unknown, missing or of another type; one line that names the place.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, needed only here

    try:
        return TypeAdapter(as_type).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = {"missing": "is missing", "unexpected_keyword_argument": "is an unknown key"}
        raise UserError(f"{path}: {place} {what.get(first['type'], first['msg'])}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
