"""The measured tables of aiconfigurator-core: found, read, and divided before anyone sees them.

Rows are for fitting or for judging, never both. The largest tenth of every table (by what its
reader calls size) and routing that is not balanced are for judging alone: `read` drops them unless
it is asked for them by name.

Rows that cannot be right are spikes, where more work took much less time.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

VERSION = "0.12.0"
SOURCE = f"aiconfigurator-core {VERSION}"
_FOLDER = Path("systems/data")
_BALANCED = ("balanced", "uniform")  # as tables call it
_LARGEST = 0.9  # the quantile of size from where on rows are for judging

Array = npt.NDArray[np.float64]
Columns = dict[str, Array]


class Part(Enum):
    """Which rows of a table."""

    FITTED = "fitted"
    LARGEST = "largest tenth"
    SKEWED = "skewed routing"


class MissingTablesError(Exception):
    """What must be installed; one line."""


@dataclass(frozen=True)
class Table:
    """Some rows of one Parquet file.

    Attributes:
        path: below the folder of all cards.
        where: by column, the value, or the values, of the rows that are meant.
        size: of every row; FLOPs or bytes, whatever orders rows by how much they do.
        unit_s: seconds of one unit of `latency`.
        latency: name of the column with times.
        without: columns that follow from others.
        at_least: times, in its unit, below which a row has nothing in it.
    """

    path: str
    where: Mapping[str, object]
    size: Callable[[Columns], Array]
    unit_s: float = 1e-3
    latency: str = "latency"
    without: tuple[str, ...] = ()
    at_least: float = 0.0


def read(table: Table, part: Part) -> Columns:
    """The columns with numbers of one part of a table, and `seconds`; each [N].

    Skewed rows have a column more, `alpha`, their power law's.

    Raises:
        MissingTablesError: pyarrow or the package is not installed.
    """
    columns = _read_file(table, part)
    seconds = columns.pop(table.latency) * table.unit_s
    if part is not Part.SKEWED and len(seconds):
        size = table.size(columns)
        is_largest = size > np.quantile(size, _LARGEST)
        keep = is_largest if part is Part.LARGEST else ~is_largest
        columns = {name: values[keep] for name, values in columns.items()}
        seconds = seconds[keep]
    return {**columns, "seconds": seconds}


def _read_file(table: Table, part: Part) -> Columns:
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise MissingTablesError(_how_to_install("pyarrow")) from None
    path = _root() / table.path
    schema = parquet.read_schema(path)
    filters = [
        (column, "in", value) if isinstance(value, tuple) else (column, "=", value)
        for column, value in table.where.items()
    ]
    if table.at_least:
        filters.append((table.latency, ">", table.at_least))
    if "distribution" in schema.names:
        filters.append(("distribution", "not in" if part is Part.SKEWED else "in", _BALANCED))
    numbers = [
        field.name
        for field in schema
        if (types.is_integer(field.type) or types.is_floating(field.type))
        and field.name not in table.without
    ]
    is_skewed = part is Part.SKEWED
    names = [*numbers, "distribution"] if is_skewed else numbers
    data = parquet.read_table(path, columns=names, filters=filters or None)
    columns = {name: data.column(name).to_numpy().astype(np.float64) for name in numbers}
    if is_skewed:
        laws = data.column("distribution").to_pylist()
        columns["alpha"] = np.array([float(law.removeprefix("power_law_")) for law in laws])
    return columns


def _root() -> Path:
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        raise MissingTablesError(_how_to_install("aiconfigurator-core"))
    return Path(next(iter(found.submodule_search_locations))) / _FOLDER


def _how_to_install(what: str) -> str:
    return f"{what} is not installed; pip install 'expertlane[calibration]' brings it"


_OVER = 1.25  # times the median of the next larger sizes
_NUM_NEXT = 3


def without_spikes(columns: Columns, *along: str) -> tuple[Columns, int]:
    """Drop rows that took over 25 % longer than the median of the next three larger sizes.

    Args:
        along: columns along each of which, all others being equal, time must not fall; or, with
            a minus before the name, must not rise.

    Returns:
        The rows kept, and how many were dropped.
    """
    seconds = columns["seconds"]
    is_spike = np.zeros(len(seconds), dtype=bool)
    for signed in along:
        name = signed.removeprefix("-")
        size = -columns[name] if signed != name else columns[name]
        group = group_numbers(columns, without=(name, "seconds"))
        is_spike |= _spikes(group, size, seconds)
    kept = {name: values[~is_spike] for name, values in columns.items()}
    return kept, int(is_spike.sum())


def group_numbers(columns: Columns, *, without: Sequence[str]) -> npt.NDArray[np.int64]:
    """[N]; rows with equal numbers agree in all columns but those."""
    keys = np.stack([values for name, values in columns.items() if name not in without], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    return group.reshape(-1)


def _spikes(group: npt.NDArray[np.int64], size: Array, seconds: Array) -> npt.NDArray[np.bool_]:
    order = np.lexsort((size, group))
    seconds, group = seconds[order], group[order]
    following = np.full((_NUM_NEXT, len(order)), np.nan)
    for step in range(1, _NUM_NEXT + 1):
        is_same = group[:-step] == group[step:]
        following[step - 1, :-step][is_same] = seconds[step:][is_same]
    has_next = ~np.isnan(following[0])
    is_spike = np.zeros(len(order), dtype=bool)
    is_spike[order[has_next]] = seconds[has_next] > _OVER * np.nanmedian(
        following[:, has_next], axis=0
    )
    return is_spike
