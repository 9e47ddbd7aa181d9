"""Heatmap of the experts' load in every layer."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertlane.report.charts.colours import ABOVE, BELOW
from expertlane.report.charts.encoding import Spec, by_name, nominal, quantity
from expertlane.report.document import Chart, Column, Heading, Legend, Table, number
from expertlane.report.numbers import counted, percent, times, whole

_SAME = 0.02  # in units of an even share; loads that differ by less are one
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
    found: list[tuple[list[str], _Loads]] = []
    for name, load in loads.items():
        same = (names for names, other in found if _is_alike(load, other))
        if names := next(same, None):
            names.append(name)
        else:
            found.append(([name], load))
    return found


def _is_alike(load: _Loads, other: _Loads) -> bool:
    one, another = map(_over_mean, (load, other))
    return one.shape == another.shape and bool(np.all(np.abs(one - another) <= _SAME))


def _over_mean(load: _Loads) -> npt.NDArray[np.float64]:
    tokens = np.array(load, dtype=np.float64)
    ratio: npt.NDArray[np.float64] = tokens / np.maximum(tokens.mean(-1, keepdims=True), 1e-9)
    return ratio


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
    over_mean = {layer: np.array(tokens) / np.mean(tokens) for layer, tokens in layers}
    fullest = max(layers, key=lambda each: over_mean[each[0]].max())[0]
    expert, most = int(over_mean[fullest].argmax()), float(over_mean[fullest].max())
    if most <= 1 + _EVEN:
        return (
            f"Expert load is balanced: none of {_of(names)} has more than {times(most)} the mean "
            "load."
        )
    finding = f"Expert {expert} of layer {fullest} gets {times(most)} the mean load"
    if len(over_mean[fullest]) * len(layers) <= 2:
        return f"{finding}, in {_of(names)}."
    mean = float(np.mean([each.max() for each in over_mean.values()]))
    num_columns = max(_LEAST_COLUMNS, _MOST_CELLS // len(layers))
    is_ordered = len(over_mean[fullest]) > num_columns
    if is_ordered:
        over_mean = {layer: _ordered(each, num_columns) for layer, each in over_mean.items()}
    return Chart(
        f"{finding}, the most loaded of an average layer {times(mean)}",
        f"A square for each expert of {counted(len(layers), 'layer')} of {_of(names)}, with its "
        f"load over its layer's mean. {finding}.",
        _spec(over_mean, is_ordered),
        _load_table(layers),
        legend=[
            Legend(f"{label}×", BELOW if load < 1 else ABOVE, opacity=_shade(load))
            for label, load in _SWATCHES
        ],
        note=f"{_of(names)}. Token-expert pairs over the mean of the layer's experts; 1 is even."
        + (" Experts of each layer side by side, the most loaded first." if is_ordered else ""),
    )


def _of(names: Sequence[str]) -> str:
    return ", ".join(names)


def _ordered(over_mean: npt.NDArray[np.float64], num: int) -> npt.NDArray[np.float64]:
    """The fullest first, averaged over neighbours; [num]."""
    descending = np.sort(over_mean)[::-1]
    return np.array([part.mean() for part in np.array_split(descending, num)])


def _shade(load: float) -> float:
    """Strength of a load's colour: none at an even load, the same at half and at twice of it."""
    away = abs(np.log2(max(load, 2.0**-_FULL)))
    return round(_SHADE * min(1.0, float(away) / _FULL), 2)


def _spec(over_mean: Mapping[int, npt.NDArray[np.float64]], is_ordered: bool) -> Spec:
    num_columns = len(next(iter(over_mean.values())))
    values = [
        {
            "layer": layer,
            "expert": expert,
            "load": round(float(load), 4),
            "side": "below" if load < 1 else "above",
            "shade": _shade(load),
            "said": f"{load:.2f}",
            "short": f"{load:.1f}",
        }
        for layer, loads in over_mean.items()
        for expert, load in enumerate(loads)
    ]
    row_px = max(_LEAST_ROW_PX, min(_ROW_PX, _MOST_PX // len(over_mean)))
    title = "experts, the most loaded first" if is_ordered else "expert"
    at = {
        "x": _axis("expert", title, range(num_columns), has_labels=not is_ordered),
        "y": _axis("layer", "layer", list(over_mean)),
    }
    shade = quantity("shade", None) | {"scale": None, "legend": None}
    sides = by_name("side", {"below": BELOW, "above": ABOVE})
    squares: Spec = {
        "mark": {"type": "rect"},
        "encoding": at | {"color": {"type": "nominal"} | sides, "fillOpacity": shade},
    }
    room = f"width / {num_columns}"
    said: list[Spec] = [
        {
            "transform": [{"filter": test}],
            "mark": {"type": "text", "fontSize": 10, "color": "--ink"},
            "encoding": at | {"text": {"field": field}},
        }
        for field, test in (
            ("said", f"{room} >= {_DIGITS_PX}"),
            ("short", f"{room} >= {_SHORT_PX} && {room} < {_DIGITS_PX}"),
        )
    ]
    layers = [squares, *(said if row_px == _ROW_PX else [])]
    return {"data": {"values": values}, "height": row_px * len(over_mean), "layer": layers}


def _axis(field: str, title: str, places: Sequence[int], has_labels: bool = True) -> Spec:
    """An axis whose labels have enough room."""
    shown = list(places)[:: -(-len(places) // _LABELS)] if has_labels else []
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
