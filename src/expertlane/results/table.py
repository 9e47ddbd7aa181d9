"""Results as one flat table for other programs: a row for each deployment and phase or load.

Columns are named after the fields of the records, with their units: `tokens_per_s`, `ttft_s_p95`,
`weight_bytes`. A projected number has its bounds beside it, under `_low` and `_high`.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from expertlane.errors import UserError
from expertlane.printable import printable
from expertlane.results.estimate import Estimate
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results
from expertlane.spec.files import write_text, write_whole

Format = Literal["csv", "parquet"]
Cell = str | int | float | bool | None
Row = dict[str, Cell]

_PARTS = ("steps", "serving")  # of a record; each of their items is a row
_LEFT_OUT = {"timeline", "traffic", "bottleneck", "dispatch_table"}
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
