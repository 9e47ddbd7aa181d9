"""Squares: the load of experts in every layer, and bytes between ranks."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from expertlane.report.charts.colours import ABOVE, BELOW
from expertlane.report.charts.svg import Spec, by_name, layer, nominal, quantity, span
from expertlane.report.document import (
    Chart,
    Column,
    Heading,
    Legend,
    Multiples,
    Table,
    number,
)
from expertlane.report.numbers import bytes_si, counted, percent, times, whole

_SAME = 0.02  # in units of an even share, or of the most bytes; what differs by less is one
_SHADED: Spec = quantity("shade", None) | {"scale": None, "legend": None}
_Floats = npt.NDArray[np.float64]
T = TypeVar("T")


def _distinct(given: Mapping[str, T], scaled: Callable[[T], _Floats]) -> list[tuple[list[str], T]]:
    """Each distinct one once, whatever its scale, with the names of all that are like it."""
    found: list[tuple[list[str], T]] = []
    for name, each in given.items():
        for names, other in found:
            one, another = scaled(each), scaled(other)
            if one.shape == another.shape and np.all(np.abs(one - another) <= _SAME):
                names.append(name)
                break
        else:
            found.append(([name], each))
    return found


_EVEN = 0.05  # of an even share; less is none worth a map
_MOST_CELLS, _LEAST_COLUMNS = 768, 8  # of a map; of more experts their order is drawn
_MOST_IN_TABLE = 1024  # cells; of more the table has what matters
_ROW_PX, _LEAST_ROW_PX, _MOST_PX = 20, 6, 420
_DIGITS_PX, _SHORT_PX = 26, 16  # of a cell with its value in it, to two digits or one
_SHADE, _FULL = 0.75, 2.0  # the strongest shade, from twice or half an even share on
_SWATCHES = ("¼", 0.25), ("½", 0.5), ("1", 1.0), ("2", 2.0), ("4", 4.0)
_LABELS = 16  # labels of an axis, at most
_Loads = Sequence[Sequence[int]]
_Layer = tuple[int, Sequence[int]]


def alike(loads: Mapping[str, _Loads]) -> list[tuple[list[str], _Loads]]:
    """Each distinct load once, whatever its number of tokens, with the names of all that had it."""

    def over_mean(load: _Loads) -> _Floats:
        tokens = np.array(load, dtype=np.float64)
        ratio: _Floats = tokens / np.maximum(tokens.mean(-1, keepdims=True), 1e-9)
        return ratio

    return _distinct(loads, over_mean)


def load_chart(names: Sequence[str], num_tokens: _Loads) -> Chart | str | None:
    """Layers down, experts across; 1 is an expert's even share of its layer.

    A sentence where the load was even, None where no expert has a token.

    Args:
        names: names of the deployments that had this load.
        num_tokens: [num_layers][num_experts]; token-expert pairs; layers without any are left out.
    """
    layers = [(layer, list(tokens)) for layer, tokens in enumerate(num_tokens) if any(tokens)]
    if not layers:
        return None
    of = ", ".join(names)
    over_mean = {layer: np.array(tokens) / np.mean(tokens) for layer, tokens in layers}
    fullest = max(over_mean, key=lambda layer: over_mean[layer].max())
    expert, most = int(over_mean[fullest].argmax()), float(over_mean[fullest].max())
    if most <= 1 + _EVEN:
        return f"Expert load is balanced: none of {of} has more than {times(most)} the mean load."
    finding = f"Expert {expert} of layer {fullest} gets {times(most)} the mean load"
    if len(over_mean[fullest]) * len(layers) <= 2:
        return f"{finding}, in {of}."
    mean = float(np.mean([each.max() for each in over_mean.values()]))
    num_columns = max(_LEAST_COLUMNS, _MOST_CELLS // len(layers))
    is_ordered = len(over_mean[fullest]) > num_columns
    if is_ordered:
        over_mean = {layer: _ordered(each, num_columns) for layer, each in over_mean.items()}
    return Chart(
        f"{finding}, the most loaded of an average layer {times(mean)}",
        f"A square for each expert of {counted(len(layers), 'layer')} of {of}, with its "
        f"load over its layer's mean. {finding}.",
        _load_spec(over_mean, is_ordered),
        _load_table(layers),
        legend=[
            Legend(f"{label}×", BELOW if load < 1 else ABOVE, opacity=_load_shade(load))
            for label, load in _SWATCHES
        ],
        note=f"{of}. Token-expert pairs over the mean of the layer's experts; 1 is even."
        + (" Experts of each layer side by side, the most loaded first." if is_ordered else ""),
    )


def _ordered(over_mean: _Floats, num: int) -> _Floats:
    """The fullest first, averaged over neighbours; [num]."""
    descending = np.sort(over_mean)[::-1]
    return np.array([part.mean() for part in np.array_split(descending, num)])


def _load_shade(load: float) -> float:
    """Strength of a load's colour: none at an even load, the same at half and at twice of it."""
    away = abs(np.log2(max(load, 2.0**-_FULL)))
    return round(_SHADE * min(1.0, float(away) / _FULL), 2)


def _load_spec(over_mean: Mapping[int, _Floats], is_ordered: bool) -> Spec:
    num_columns = len(next(iter(over_mean.values())))
    values = [
        {
            "layer": layer,
            "expert": expert,
            "load": round(float(load), 4),
            "side": "below" if load < 1 else "above",
            "shade": _load_shade(load),
            "said": f"{load:.2f}",
            "short": f"{load:.1f}",
        }
        for layer, loads in over_mean.items()
        for expert, load in enumerate(loads)
    ]
    row_px = max(_LEAST_ROW_PX, min(_ROW_PX, _MOST_PX // len(over_mean)))
    title = "experts, the most loaded first" if is_ordered else "expert"
    at = {
        "x": _axis("expert", title, [] if is_ordered else range(num_columns)),
        "y": _axis("layer", "layer", list(over_mean)),
    }
    sides = by_name("side", {"below": BELOW, "above": ABOVE})
    shades = {"color": {"type": "nominal"} | sides, "fillOpacity": _SHADED}
    layers = [layer({"type": "rect"}, at, shades)]
    if row_px == _ROW_PX:
        room, words = f"width / {num_columns}", {"type": "text", "fontSize": 10, "color": "--ink"}
        of_width = {
            "said": f"{room} >= {_DIGITS_PX}",
            "short": f"{room} >= {_SHORT_PX} && {room} < {_DIGITS_PX}",
        }
        layers += [
            layer(words, at, {"text": {"field": name}}, where=test)
            for name, test in of_width.items()
        ]
    return {"data": {"values": values}, "height": row_px * len(over_mean), "layer": layers}


def _axis(field: str, title: str, labels: Sequence[int]) -> Spec:
    """An axis with as many of the labels as have room."""
    shown = list(labels)[:: -(-len(labels) // _LABELS) or 1]
    axis = {"labelAngle": 0, "values": shown, "ticks": False, "domain": False}
    scale = {"paddingInner": 0.04, "paddingOuter": 0}
    return nominal(field, title) | {"axis": axis, "sort": "ascending", "scale": scale}


def _load_table(layers: Sequence[_Layer]) -> Table:
    num_experts = len(layers[0][1])
    if len(layers) * num_experts > _MOST_IN_TABLE:
        fullest: tuple[Column[_Layer], ...] = (
            number("layer", lambda each: each[0]),
            number("expert", lambda each: max(range(num_experts), key=each[1].__getitem__)),
            number("share", lambda each: max(each[1]) / sum(each[1]), percent),
            number("over the mean", lambda each: max(each[1]) * num_experts / sum(each[1]), times),
        )
        return Table.of("The most loaded expert of each layer", fullest, layers)
    columns = ["layer", *(f"expert {expert}" for expert in range(num_experts))]
    rows = tuple((str(layer), *map(whole, tokens)) for layer, tokens in layers)
    return Table("Token-expert pairs", tuple(map(Heading, columns)), rows)


_SIDE_PX = 190
_MOST_RANKS = 32
_TWO = 2  # ranks, whose traffic is two numbers
_NUM_SHADES = 6  # shades of amounts, relative to the largest
_LEAST_SHADE = 0.15
_Bytes = Sequence[Sequence[int]]


def traffic_charts(
    phase: str, sent: Mapping[str, _Bytes], ranks_per_node: int, of_what: str
) -> list[Multiples | str]:
    """Small squares, each distinct pattern once: sources down, destinations across.

    Empty where nothing is sent; a sentence where there are two ranks.

    Args:
        sent: by deployment, [source][destination] bytes; of more than 32 ranks nodes are drawn.
        of_what: the steps they were sent in, for example `all steps`.
    """
    sent = {name: each for name, each in sent.items() if any(map(any, each))}
    two = {name: each for name, each in sent.items() if len(each) <= _TWO}
    squares = {name: each for name, each in sent.items() if name not in two}
    said = [
        f"{name}: rank 0 sends {bytes_si(to)} to rank 1, which sends {bytes_si(back)}."
        for name, ((_, to), (back, _)) in two.items()
    ]
    if not squares:
        return [*said]
    drawn = _distinct(squares, lambda each: np.array(each) / np.max(each))
    legend = [
        Legend(f"{percent(level / _NUM_SHADES)} of the largest", ABOVE, opacity=_shade(level))
        for level in (1, _NUM_SHADES // 2, _NUM_SHADES)
    ]
    title = f"Traffic matrix, {phase}"
    if len(squares) > 1:
        patterns = counted(len(drawn), "traffic pattern")
        title = f"{len(squares)} deployments have {patterns} in {phase}"
    charts = tuple(_square(names, payload, ranks_per_node, sent) for names, payload in drawn)
    note = (
        f"Payload bytes of {of_what}: from rank (row) to rank (column). Lines: node boundaries. "
        "Deployments with the same pattern share a matrix."
    )
    return [Multiples(title, charts, note, legend), *said]


def _square(
    names: Sequence[str], payload: _Bytes, ranks_per_node: int, sent: Mapping[str, _Bytes]
) -> Chart:
    what, borders, cells = "rank", range(ranks_per_node, len(payload), ranks_per_node), payload
    if len(payload) > max(_MOST_RANKS, ranks_per_node):  # more than one node
        what, borders, cells = "node", range(0), _between_nodes(payload, ranks_per_node)
    amounts = np.array(cells, dtype=np.float64)
    source, to = np.unravel_index(amounts.argmax(), amounts.shape)
    share = percent(float((amounts[~np.eye(len(cells), dtype=bool)] > 0).mean()))
    most = f"most, {bytes_si(amounts.max())}, from {what} {source} to {to}"
    totals = (f"{name} {bytes_si(np.sum(sent[name]))}" for name in names)
    return Chart(
        ", ".join(names),
        f"{share} of the pairs of {what}s send; {most}. Total: {', '.join(totals)}.",
        _square_spec(amounts, what, borders),
        Table(
            f"from {what} (row) to {what} (column)",
            tuple(map(Heading, ["from", *(f"to {place}" for place in range(len(cells)))])),
            tuple((str(place), *map(bytes_si, row)) for place, row in enumerate(cells)),
        ),
        note=f"{share} of the pairs send; {most}.",
    )


def _square_spec(amounts: _Floats, what: str, borders: Sequence[int]) -> Spec:
    """Squares as runs of equal shade in each row."""
    size = len(amounts)
    values = []
    for row, levels in enumerate(np.ceil(_NUM_SHADES * amounts / amounts.max()).astype(int)):
        right = -0.5
        for level, run in groupby(levels.tolist()):
            left, right = right, right + len(list(run))
            if level:
                place = {"top": row - 0.5, "bottom": row + 0.5, "left": left, "right": right}
                values.append(place | {"shade": _shade(level)})
    labels = list(range(0, size, max(1, size // 4)))
    axis = {"values": labels, "grid": False, "ticks": False, "format": "d"}
    all_of_it: Spec = {"domain": [-0.5, size - 0.5], "nice": False}

    def x(field: str) -> Spec:
        return quantity(field, f"to {what}", axis, **all_of_it)

    def y(field: str) -> Spec:
        return quantity(field, f"from {what}", axis, reverse=True, **all_of_it)

    places = span(x, "left", "right") | span(y, "top", "bottom", "y")
    layers = [layer({"type": "rect", "color": ABOVE}, places, {"fillOpacity": _SHADED})]
    if borders:
        at, line = [{"at": border - 0.5} for border in borders], {"type": "rule", "color": "--ink"}
        layers += [layer(line, {"x": x("at")}, data=at), layer(line, {"y": y("at")}, data=at)]
    return {"data": {"values": values}, "height": _SIDE_PX, "layer": layers}


def _shade(level: int) -> float:
    return round(_LEAST_SHADE + (1 - _LEAST_SHADE) * level / _NUM_SHADES, 2)


def _between_nodes(payload_bytes: _Bytes, ranks_per_node: int) -> list[list[int]]:
    """[source node][destination node], from [source][destination] of ranks."""
    firsts = np.arange(0, len(payload_bytes), ranks_per_node)
    of_senders = np.add.reduceat(np.array(payload_bytes), firsts, axis=0)
    cells: list[list[int]] = np.add.reduceat(of_senders, firsts, axis=1).tolist()
    return cells
