"""Rows that cannot be right: spikes, where more work took much less time."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tables import Array, Columns

_OVER = 1.25  # times the median of the next larger sizes
_NUM_NEXT = 3


def without_spikes(columns: Columns, along: Sequence[str]) -> tuple[Columns, int]:
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
