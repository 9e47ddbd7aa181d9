"""`results.json` of every kind: written whole or not at all, and read back strictly.

Types and ranges of single fields are checked where the fields are declared. Here are the rules for
several fields or records together, and for `question`, a table of what was asked for; keys of it
that no report uses are not checked.

For other programs there is one flat table: a row for each deployment and phase or load. Columns are
named after the fields of the records, with their units: `tokens_per_s`, `ttft_s_p95`,
`weight_bytes`. A projected number has its bounds beside it, under `_low` and `_high`.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec
import numpy as np

from expertlane.errors import UserError, naming
from expertlane.printable import printable
from expertlane.results.estimate import Estimate
from expertlane.results.record import BEST, EXPERIMENT, PARETO, DeploymentRecord, ServerRecord
from expertlane.results.results import SCHEMA_VERSION, Kind, Results
from expertlane.spec.experiment import ProjectionSetup
from expertlane.spec.files import (
    RESULTS_BYTES,
    build,
    is_folder,
    read_json,
    strict_json,
    write_text,
    write_whole,
)
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict, Valid, shown, take_fields
from expertlane.spec.workload import SLO, LengthRange, Workload

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
    _drop_removed(data)
    return data


def _drop_removed(data: dict[str, Any]) -> None:
    """Drop fields that earlier versions of expertlane wrote."""
    if isinstance(data.get("question"), dict):
        data["question"].pop("traffic", None)
    deployments = data.get("deployments")
    for each in deployments if isinstance(deployments, list) else ():
        if isinstance(each, dict):
            each.pop("copies", None)
        for key, names in _REMOVED.items() if isinstance(each, dict) else ():
            tables = each.get(key)
            for table in tables if isinstance(tables, list) else [tables]:
                for name in names if isinstance(table, dict) else ():
                    table.pop(name, None)


_REMOVED = {
    "options": ("copies", "cache_int8"),
    "steps": ("unknown_kernels",),
    "server": ("balance", "routing"),
}


def _is_length(text: str) -> bool:
    return LengthRange.parse("prompt_len", text) is not None


_Length = Annotated[str, Valid(_is_length, "a length, such as '32', or two, '4:8'")]
_Positive = Annotated[float, Valid(lambda number: number > 0, "above 0")]
_Count = Annotated[int, Valid(lambda number: number >= 0, "0 or more")]
_Urls = Annotated[tuple[str, ...], Valid(lambda urls: 0 < len(urls) <= 2, "a list of one or two")]


class _Part(Strict):
    """A table that may have other keys too."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore", "strict": True}


@dataclass(frozen=True)
class _Model(_Part):
    name: str
    num_experts_per_tok: int | None = None
    max_position_embeddings: int | None = None


@dataclass(frozen=True)
class _Experiment(_Part):
    name: str
    model: _Model
    workload: Workload
    seed: int | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class _Lengths(_Part):
    prompt_len: _Length
    output_len: _Length
    requests: str | None
    seed: int | None = None
    rate: _Positive | None = None
    prefix_len: _Count = 0
    num_prefixes: _Count = 1


@dataclass(frozen=True)
class _Serving(_Part):
    max_num_seqs: int


@dataclass(frozen=True, kw_only=True)
class _Question(Strict):
    price: float | None = None

    def __post_init__(self) -> None:
        take_fields(self)


@dataclass(frozen=True, kw_only=True)
class _OfComparison(_Question):
    experiment: _Experiment
    skew: float | None = None
    projection: ProjectionSetup | None = None
    load: _Lengths | None = None
    max_tpot_s: _Positive | None = None
    max_ttft_s: _Positive | None = None
    slos: tuple[SLO, ...] = ()
    servers: _Count | None = None
    workload: _Lengths | None = None


@dataclass(frozen=True, kw_only=True)
class _OfPlan(_Question):
    model: _Model
    workload: Workload
    load: _Lengths | None = None
    projection: ProjectionSetup | None = None
    max_tpot_s: _Positive | None = None
    max_ttft_s: _Positive | None = None
    slos: tuple[SLO, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _OfSimulation(_Question):
    model: _Model
    workload: _Lengths
    serving: _Serving


@dataclass(frozen=True, kw_only=True)
class _OfBench(_Question):
    model: str
    workload: _Lengths
    ranks_per_node: int


@dataclass(frozen=True, kw_only=True)
class _OfServers(_Question):
    model: str
    workload: _Lengths
    urls: _Urls
    endpoint: str
    rounds: int


@dataclass(frozen=True, kw_only=True)
class _OfRunning(_Question):
    model: str
    workload: _Lengths
    servers: _Count


@dataclass(frozen=True, kw_only=True)
class _OfVerify(_Question):
    model: str
    url: str
    reference: str
    seed: _Count
    num_prompts: _Count
    budget_s: float


@dataclass(frozen=True, kw_only=True)
class _OfDrill(_Question):
    model: str
    workload: _Lengths
    url: str
    fault: str
    batch: _Count | None = None
    rate: _Positive | None = None


_KINDS: dict[str, type[_Question]] = {
    "comparison": _OfComparison,
    "plan": _OfPlan,
    "simulation": _OfSimulation,
    "bench": _OfBench,
    "verify": _OfVerify,
    "drill": _OfDrill,
}


# Beyond, ratios and products of a few numbers would not be finite.
_LEAST, _MOST = 1e-60, 1e30


def check_numbers(data: Any) -> None:
    """Refuse numbers of a file that are too large or too small to calculate with.

    Raises:
        UserError: there is one; one line names its place.
    """
    waiting = [("", data)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}", each) for key, each in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{place}.{number}", each) for number, each in enumerate(value)]
        elif isinstance(value, int | float) and value and not _LEAST <= abs(value) <= _MOST:
            raise UserError(
                f"{place[1:]} is {shown(value)}; numbers must be 0, or from {_LEAST:g} to "
                f"{_MOST:g} in size"
            )


def check(results: Results) -> None:
    """Refuse results that lack what the reports of their kind rely on.

    Raises:
        UserError: something is missing; one line names the place.
    """
    question = results.question
    kind = _OfServers if "urls" in question else _KINDS[results.kind]
    if kind is _OfComparison and results.is_of_servers and "experiment" not in question:
        kind = _OfRunning
    build(kind, question, "question")
    _check_roles(results)
    _check_servers(results)
    for place, record in enumerate(results.deployments):
        with naming(f"deployments.{place}"):
            _check_record(results, record)
    _check_projections(results)


def _check_roles(results: Results) -> None:
    needed = {"comparison": EXPERIMENT, "plan": BEST}.get(results.kind)
    own = [each for each in results.deployments if each.source != "reported"]
    if needed is not None and not any(needed in each.roles for each in own):
        raise UserError(f"deployments: none has the role {needed!r}")
    if results.kind == "plan" and not results.plans:
        raise UserError("plans is empty; a plan has one or more")


def _check_servers(results: Results) -> None:
    if results.kind != "comparison" or not results.is_of_servers:
        return
    measured = results.select("measured")
    if lacking := [each.name for each in measured if each.server is None]:
        raise UserError(f"server of {lacking[0]} is missing; others have one")
    if not any(each.serving for each in measured):
        raise UserError("deployments: no server was measured")
    if "workload" not in results.question:
        raise UserError("question.workload is missing; servers were measured under one")


def _check_record(results: Results, record: DeploymentRecord) -> None:
    """Refuse a record without the fields that records of its kind and roles have."""
    is_compared = results.kind == "comparison"
    is_shown = EXPERIMENT in record.roles and record.source != "reported"
    is_chosen = results.kind == "simulation" or (results.kind == "plan" and BEST in record.roles)
    server = record.server
    is_verified = results.kind == "verify"
    is_outside = is_verified or "urls" in results.question or server is not None
    needed = {
        "layout": not is_outside,
        "options": not is_outside,
        "serving": not (is_compared or is_verified)
        or PARETO in record.roles
        or _was_measured(server),
        "steps": (is_shown and server is None) or is_chosen,
        "verified": is_verified,
        "pools": is_chosen or (is_shown and record.source == "projected"),
        "drill": results.kind == "drill",
    }
    for name, is_needed in needed.items():
        if is_needed and not getattr(record, name):
            raise UserError(f"{name} is missing or empty; {record.name} needs it")
    if record.source != "projected":
        return
    for place, step in enumerate(record.steps):
        if not step.breakdown_s:
            raise UserError(f"steps.{place}.breakdown_s is empty; it must have seconds by cause")
    for place, load in enumerate(() if results.kind == "simulation" else record.serving):
        tpot = None if load.tpot_s is None else load.tpot_s.mean
        if tpot is None or min(*tpot.bounds, *load.output_tps.bounds) <= 0:
            raise UserError(f"serving.{place}: output_tps and tpot_s.mean must be above 0")


def _was_measured(server: ServerRecord | None) -> bool:
    return server is not None and not server.failure


def _check_projections(results: Results) -> None:
    """Refuse a comparison whose deployments were not all projected under the same conditions."""
    groups = [results.select("projected", EXPERIMENT, each) for each in results.conditions]
    for records in groups:
        if [each.name for each in records] != [each.name for each in groups[0]]:
            raise UserError("deployments must be the same under all conditions, in the same order")
        decodes = records[0].steps_of(Phase.DECODE)
        at_context = (step.num_seqs for step in decodes if step.context == results.context)
        num_seqs = next(at_context, None)
        if num_seqs is None or results.context is None:
            raise UserError(f"context is {results.context}; {records[0].name} has no step there")
        for record, step in product(records, decodes):
            if record.decode_of(step.context or 0, num_seqs) is None:
                raise UserError(
                    f"deployments: {record.name} has no decode step of {num_seqs:,} sequences at "
                    f"context {step.context}"
                )


Format = Literal["csv", "parquet"]
Cell = str | int | float | bool | None
Row = dict[str, Cell]

_PARTS = ("steps", "serving")  # of a record; each of their items is a row
_LEFT_OUT = {"timeline", "traffic", "bottleneck", "dispatch_table", "by_rank", "gauges"}
_NAMES = {  # where the field's own lacks a unit, or says too little in a table
    "rate": "arrivals_per_s",
    "goodput": "good_requests_per_s",
    "context": "context_tokens",
    "name": "deployment",
}
_UNNAMED = {"options", "conditions"}  # their parts say enough
_FORMULA = ("=", "+", "-", "@")


def rows_of(results: Results) -> list[Row]:
    """The table, with every column in every row; those that nothing has are left out.

    Values are text, numbers, booleans or None. Lists, such as the times of each rank, are left
    out: they are in `results.json`.
    """
    found = [row for record in results.deployments for row in _rows(results, record)]
    return aligned(found)


def aligned(rows: Sequence[Row]) -> list[Row]:
    """The rows with the same columns in the same order, without the empty ones."""
    columns = dict.fromkeys(
        name for row in rows for name, value in row.items() if value is not None
    )
    return [{name: row.get(name) for name in columns} for row in rows]


def _rows(results: Results, record: DeploymentRecord) -> Iterator[Row]:
    cluster = None if results.cluster is None else results.cluster.name
    head: Row = {"kind": results.kind, "created": results.created}
    head |= {"model": results.model_name, "cluster": cluster, "roles": "; ".join(record.roles)}
    for name in _names(record):
        head |= flat(name, getattr(record, name))
    parts = [(part, item) for part in _PARTS for item in getattr(record, part)]
    for part, item in parts or [("deployment", None)]:
        row = head | {"row": part}
        for name in () if item is None else _names(item):
            row |= flat(name, getattr(item, name))
        yield row


def _names(record: Any) -> list[str]:
    return [field.name for field in fields(record) if field.name not in _PARTS]


def flat(name: str, value: Any) -> Row:
    """The cells of one field: several where it has parts, none where it is a list."""
    column = _NAMES.get(name, name)
    if column == "tps" or column.endswith("_tps"):
        column = f"{column.removesuffix('tps')}tokens_per_s"
    match value:
        case _ if name in _LEFT_OUT:
            return {}
        case Enum():
            return {column: str(value)}
        case None | str() | bool() | int() | float():
            return {column: value}
        case Estimate():
            bounds = {f"{column}_low": value.low, f"{column}_high": value.high}
            return {column: value.value, **bounds}
        case Mapping():
            return _joined(f"{column}_", value.items())
        case _ if hasattr(value, "world_size"):
            return {column: str(value)}  # a layout, as options take it
        case _ if is_dataclass(value):
            parts = ((each.name, getattr(value, each.name)) for each in fields(value))
            return _joined("" if name in _UNNAMED else f"{column}_", parts)
    return {}


def _joined(prefix: str, parts: Iterable[tuple[Any, Any]]) -> Row:
    found: Row = {}
    for name, value in parts:
        for inner, cell in flat(str(name), value).items():
            found[prefix + re.sub(r"\W", "_", inner)] = cell
    return found


def check_format(wanted: Format | None) -> None:
    """Check, before anything runs, that a table can be written so.

    Raises:
        UserError: a library is missing.
    """
    if wanted == "parquet":
        _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet needs pyarrow, which is not installed: pip install 'expertlane[parquet]', or "
            "export csv"
        ) from None
    return pyarrow


def write_table(rows: Sequence[Row], path: Path, wanted: Format) -> Path:
    """Write rows with the same columns as `path` with the format's suffix; return the path.

    In csv, text that a spreadsheet would take for a formula gets an apostrophe in front.

    Raises:
        UserError: the folder can't be written to, or a library is missing.
    """
    path = path.with_suffix(f".{wanted}")
    if wanted == "csv":
        return write_text(path, csv_text(rows))
    pyarrow = _pyarrow()
    table = pyarrow.Table.from_pylist(list(rows))
    write_whole(path, lambda file: pyarrow.parquet.write_table(table, file))
    return path


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV (RFC 4180, but lines end with a line feed), None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writerow({name: _harmless(name) for name in writer.fieldnames})
    for row in rows:
        writer.writerow({name: _harmless(cell) for name, cell in row.items()})
    return text.getvalue()


def _harmless(cell: Cell) -> Cell:
    """Text that a spreadsheet shows and does not calculate; unsafe characters are escaped."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_pandas(rows: Sequence[Row]) -> Any:
    """The rows as a `pandas.DataFrame`.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError(
            "to_pandas needs pandas, which is not installed: pip install 'expertlane[pandas]'"
        ) from None
    return pandas.DataFrame(list(rows))
