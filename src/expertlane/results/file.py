"""`results.json` of every kind: written whole or not at all, and read back strictly."""

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from expertlane.errors import UserError, naming
from expertlane.results.checks import check, check_numbers
from expertlane.results.results import SCHEMA_VERSION, Kind, Results
from expertlane.spec.files import (
    RESULTS_BYTES,
    build,
    is_folder,
    read_json,
    strict_json,
    write_text,
)
from expertlane.spec.ranges import shown

FILE_NAME = "results.json"

# Rows of numbers stay on a line, so that files with matrices remain readable.
_NUMBERS = re.compile(r"\[\s+(-?[\d.][-+\d.eE]*(?:,\s+-?[\d.][-+\d.eE]*)*)\s+\]")


def to_json(results: Results) -> str:
    """The text of `results.json`."""
    plain = msgspec.to_builtins(results, enc_hook=_number)
    text = strict_json(plain, ensure_ascii=False)
    text = msgspec.json.format(text, indent=2)  # json.dumps with an indent is pure Python
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _number(value: Any) -> Any:
    """A NumPy number as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value)} in results")


def write(results: Results, folder: Path) -> Path:
    """Write `results.json` into `folder`, made if need be; return its path.

    Raises:
        UserError: the folder can't be written to.
    """
    return write_text(folder / FILE_NAME, to_json(results))


def read(path: Path, kind: Kind | None = None) -> Results:
    """Read a `results.json`, or that of a folder.

    Args:
        kind: the only kind accepted; None accepts any.

    Raises:
        UserError: the file is missing or damaged, of no known or another kind or schema version,
            or a key is unknown, missing or of another type; one line that names the place.
    """
    path = path / FILE_NAME if is_folder(path) else path
    data = _load(path)
    with naming(path):
        check_numbers(data)
        results = build(Results, data)
        check(results)
    if kind not in (None, results.kind):
        raise UserError(f"{path} is of a {results.kind}, not of a {kind}")
    return results


def _load(path: Path) -> dict[str, Any]:
    """The table of a results file, only its kind and version checked."""
    data = read_json(path, RESULTS_BYTES)
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UserError(f"{path} is not a results file: it has no schema_version")
    kind, kinds = data.get("kind", "comparison"), get_args(Kind)
    if kind not in kinds:
        raise UserError(f"{path} is of unknown kind {shown(kind)}; known: {', '.join(kinds)}")
    if data["schema_version"] != SCHEMA_VERSION:
        command = data.get("command")
        again = f", {shown(command)}" if isinstance(command, str) else ""
        raise UserError(
            f"{path} has schema_version {shown(data['schema_version'])} of a {kind}; this "
            f"expertlane reads {SCHEMA_VERSION}: repeat the command that wrote it{again}"
        )
    return data
