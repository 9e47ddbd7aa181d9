"""Measured transfers as the links see them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cleaning import without_spikes
from tables import Array, Columns, Part, Table, read


@dataclass(frozen=True)
class Loads:
    """Measured transfers of one law, as the links see them; [N] each.

    Attributes:
        nic_bytes, near_bytes: of a rank, in its busier direction; between nodes and inside one.
        shape: rows of equal numbers are left out of a fit together: those of one size.
    """

    ranks: Array
    nodes: Array
    nic_bytes: Array
    near_bytes: Array
    seconds: Array
    shape: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Source:
    """Rows of one table that differ in size (and number of experts) alone.

    Attributes:
        size: the column that says how much is sent.
        added_us: a column of microseconds that belong to the time too.
        added: a table of other times, of rows of the same sizes, that do.
        ranks, nodes: of the group.
        bytes_of: from `size` to bytes between nodes and inside one.
        shape_unit: what sizes are multiplied by to be those of other sources of the law.
    """

    table: Table
    size: str
    ranks: int
    nodes: int
    bytes_of: Callable[[Array], tuple[Array, Array]]
    added_us: str | None = None
    added: Table | None = None
    shape_unit: int = 1


def read_loads(sources: Sequence[Source], part: Part) -> tuple[Loads, int]:
    """All rows of a law that are for `part`, without spikes where they are to be fitted.

    Returns:
        The loads, and how many rows were dropped as spikes.
    """
    found, num_spikes = [], 0
    for source in sources:
        columns = read(source.table, part)
        seconds = columns["seconds"]
        if source.added_us is not None:
            seconds = seconds + columns[source.added_us] * 1e-6
        if source.added is not None:
            others = read(source.added, part)
            of_size = dict(zip(others[source.size], others["seconds"], strict=True))
            seconds = seconds + [of_size[size] for size in columns[source.size]]
        columns = {
            "size": columns[source.size],
            "num_experts": columns.get("num_experts", np.zeros_like(seconds)),
            "seconds": seconds,
        }
        if part is Part.FITTED:
            columns, dropped = without_spikes(columns, "size")
            num_spikes += dropped
        found.append(_loads(source, columns))
    fields = Loads.__dataclass_fields__
    joined = {name: np.concatenate([getattr(each, name) for each in found]) for name in fields}
    return Loads(**joined), num_spikes


def _loads(source: Source, columns: Columns) -> Loads:
    size = columns["size"]
    nic_bytes, near_bytes = source.bytes_of(size)
    return Loads(
        ranks=np.full_like(size, source.ranks),
        nodes=np.full_like(size, source.nodes),
        nic_bytes=nic_bytes,
        near_bytes=near_bytes,
        seconds=columns["seconds"],
        shape=(size * source.shape_unit).astype(np.int64),
    )
