"""`results.json` of every kind: written whole or not at all, and read back strictly."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertlane.errors import UserError
from expertlane.results import plan, schema, serving, simulation
from expertlane.results.plan import PlanResults
from expertlane.results.schema import Results
from expertlane.results.serving import ServingResults
from expertlane.results.simulation import Simulation
from expertlane.spec.files import RESULTS_BYTES, read_json, strict_json, write_text
from expertlane.spec.ranges import shown

FILE_NAME = "results.json"

AnyResults = Results | Simulation | PlanResults | ServingResults

_KINDS: dict[str, tuple[type[AnyResults], int]] = {
    schema.KIND: (Results, schema.SCHEMA_VERSION),
    simulation.KIND: (Simulation, simulation.SCHEMA_VERSION),
    plan.KIND: (PlanResults, plan.SCHEMA_VERSION),
    serving.KIND: (ServingResults, serving.SCHEMA_VERSION),
}
# Rows of numbers stay on a line, so that files with matrices remain readable.
_NUMBERS = re.compile(r"\[\s+(-?[\d.][-+\d.eE]*(?:,\s+-?[\d.][-+\d.eE]*)*)\s+\]")


def to_json(results: AnyResults) -> str:
    """The text of `results.json`."""
    text = strict_json(asdict(results), indent=2, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def write(results: AnyResults, folder: Path) -> Path:
    """Write `results.json` into `folder`, made if need be; return its path.

    Raises:
        UserError: the folder can't be written to.
    """
    return write_text(folder / FILE_NAME, to_json(results))


def read_any(path: Path) -> AnyResults:
    """Read a `results.json` of any kind.

    Raises:
        UserError: the file is missing or damaged, of no known kind or another schema version, or
            a key is unknown, missing or of another type; one line that names the place.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, needed only here

    data = _load(path)
    as_type, _ = _KINDS[data["kind"]]
    try:
        return TypeAdapter(as_type).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = {"missing": "is missing", "unexpected_keyword_argument": "is an unknown key"}
        raise UserError(f"{path}: {place} {what.get(first['type'], first['msg'])}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read(path: Path) -> Results:
    """Read a comparison.

    Raises:
        UserError: as `read_any`, or it is of another kind.
    """
    results = read_any(path)
    if not isinstance(results, Results):
        raise UserError(f"{path} holds no comparison: its kind is {results.kind!r}")
    return results


def _load(path: Path) -> dict[str, Any]:
    """What a results file says, its kind and version checked and nothing else."""
    data = read_json(path, RESULTS_BYTES)
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UserError(f"{path} is not a results file: it has no schema_version")
    kind = data.setdefault("kind", schema.KIND)  # comparisons had none before version 5
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"{path} is of unknown kind {shown(kind)}; known: {', '.join(_KINDS)}")
    _, known = _KINDS[kind]
    if data["schema_version"] != known:
        raise UserError(
            f"{path} has schema_version {shown(data['schema_version'])} of a {kind}; this "
            f"expertlane reads {known}: repeat the command that wrote it"
        )
    return data
