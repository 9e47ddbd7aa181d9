"""A matrix of bytes, source by destination, drawn in characters."""

from collections.abc import Sequence

import numpy as np

from expertlane.report.document import Figure

_NUM_DRAWN = 16  # with cells of 4 characters it fits 80 columns
_CELL, _LABEL = 4, 3
_UNITS = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))


def matrix(payload_bytes: Sequence[Sequence[int]], ranks_per_node: int) -> str | Figure:
    """Between ranks with node borders, between nodes where ranks are many; else one sentence.

    Args:
        payload_bytes: [source][destination], global ranks.
    """
    num_ranks = len(payload_bytes)
    num_nodes = -(-num_ranks // ranks_per_node)
    if num_ranks == 1:
        return "One rank: no traffic."
    if num_ranks <= _NUM_DRAWN:
        return _drawn("rank", payload_bytes, ranks_per_node if ranks_per_node > 1 else num_ranks)
    if num_nodes > _NUM_DRAWN:
        return f"{num_nodes} nodes are too many to draw: the matrix is in results.json."
    return _drawn("node", between_nodes(payload_bytes, ranks_per_node), num_nodes)


def between_nodes(payload_bytes: Sequence[Sequence[int]], ranks_per_node: int) -> list[list[int]]:
    """[source node][destination node], from [source][destination] of ranks."""
    firsts = np.arange(0, len(payload_bytes), ranks_per_node)
    of_senders = np.add.reduceat(np.array(payload_bytes), firsts, axis=0)
    cells: list[list[int]] = np.add.reduceat(of_senders, firsts, axis=1).tolist()
    return cells


def _drawn(what: str, cells: Sequence[Sequence[int]], num_together: int) -> Figure:
    """`num_together`: places between two borders."""
    size = len(cells)
    scale, unit = _scale(max(map(max, cells)))
    lines = [_line("", [str(place) for place in range(size)], num_together)]
    for place, row in enumerate(cells):
        if place and place % num_together == 0:
            rule = _line("", ["─" * _CELL] * size, num_together, "┼")
            lines.append("─" * _LABEL + rule[_LABEL:])
        lines.append(_line(str(place), [_cell(value / scale) for value in row], num_together))
    who = f"from {what} (row) to {what} (column)"
    return Figure(f"Payload in {unit}, one repetition: {who}", tuple(lines))


def _line(label: str, cells: Sequence[str], num_together: int, border: str = "│") -> str:
    parts = [label.rjust(_LABEL)]
    for place, cell in enumerate(cells):
        if place and place % num_together == 0:
            parts.append(border)
        parts.append(cell.rjust(_CELL))
    return "".join(parts)


def _scale(largest: int) -> tuple[float, str]:
    """The smallest unit in which `largest` has at most three digits."""
    return next((each for each in _UNITS if largest / each[0] < 999.5), _UNITS[-1])


def _cell(value: float) -> str:
    """A value in at most three characters."""
    if value == 0:
        return "·"
    if value < 0.05:
        return "<.1"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
