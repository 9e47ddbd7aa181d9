"""How the experts of every layer were loaded, who sent how much to whom, how far tokens spread."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from expertlane.report.charts.colours import SERIES
from expertlane.report.charts.encoding import Spec, colour, nominal, quantity, tooltip
from expertlane.report.document import Chart, Column, Heading, Legend, Table, number
from expertlane.report.matrix import between_nodes
from expertlane.report.numbers import bytes_si, counted, figures, percent, times, whole
from expertlane.results.traffic import FanOut

_CELL_PX, _LEAST_CELL_PX = 18, 3
_LEAST_PX, _ROW_PX, _MOST_PX = 120, 24, 420
_FAN_OUT_PX = 200
_MOST_IN_TABLE = 1024  # cells; of more the table has what matters
_MOST_RANKS = 32
_EVEN_IS_HALF = 2.0  # least end of the scale, so that an even load looks like one
_Layer = tuple[int, Sequence[int]]
_SCALE = "cividis"  # Nuñez, Anderton and Renslow (2018): even for all kinds of colour vision


def load_chart(title: str, num_tokens: Sequence[Sequence[int]]) -> Chart | None:
    """Layers down, experts across; 1 is an expert's even share of its layer.

    None where no expert has a token.

    Args:
        num_tokens: [num_layers][num_experts]; token-expert pairs; layers without any are left out.
    """
    layers = [(layer, list(tokens)) for layer, tokens in enumerate(num_tokens) if any(tokens)]
    if not layers:
        return None
    values: list[Spec] = [
        {
            "layer": layer,
            "expert": expert,
            "load": num * len(tokens) / sum(tokens),
            "pairs": f"{num:,}",
            "shown": f"{times(num * len(tokens) / sum(tokens))} the mean",
        }
        for layer, tokens in layers
        for expert, num in enumerate(tokens)
    ]
    hottest = max(values, key=lambda value: value["load"])
    step = max(_LEAST_CELL_PX, min(_CELL_PX, _MOST_PX // max(1, len(layers))))
    return Chart(
        title,
        f"A square for each expert of {counted(len(layers), 'layer')}, brighter means more "
        f"tokens. The most loaded is expert {hottest['expert']} of layer {hottest['layer']}: "
        f"{hottest['shown']}.",
        {
            "data": {"values": values},
            "height": step * len(layers),
            "mark": {"type": "rect"},
            "encoding": {
                "x": _thinned("expert", len(layers[0][1])),
                "y": _thinned("layer", len(layers)),
                "color": quantity(
                    "load",
                    "times the mean",
                    scheme=_SCALE,
                    domain=[0, max(_EVEN_IS_HALF, hottest["load"])],
                ),
                "tooltip": tooltip(layer="layer", expert="expert", pairs="pairs", shown="load"),
            },
        },
        _load_table(title, layers),
        note="Token-expert pairs over the mean of the layer's experts; 1 is even.",
    )


def _thinned(field: str, num: int) -> Spec:
    """Labels not closer than there is room for."""
    every = max(1, num // 16)
    axis = {"labelAngle": 0, "values": list(range(0, num, every)), "ticks": False}
    scale = {"paddingInner": 0.04, "paddingOuter": 0}
    return nominal(field, field) | {"axis": axis, "sort": "ascending", "scale": scale}


def _load_table(title: str, layers: Sequence[_Layer]) -> Table:
    num_experts = len(layers[0][1])
    if len(layers) * num_experts > _MOST_IN_TABLE:
        fullest: tuple[Column[_Layer], ...] = (
            number("layer", lambda each: each[0]),
            number("expert", lambda each: max(range(num_experts), key=each[1].__getitem__)),
            number("share", lambda each: max(each[1]) / sum(each[1]), percent),
            number("over the mean", lambda each: max(each[1]) * num_experts / sum(each[1]), times),
        )
        return Table.of(f"{title}: the most loaded expert of each layer", fullest, layers)
    columns = ["layer", *(f"expert {expert}" for expert in range(num_experts))]
    rows = tuple((str(layer), *map(whole, tokens)) for layer, tokens in layers)
    return Table(f"{title}: token-expert pairs", tuple(map(Heading, columns)), rows)


def traffic_chart(
    title: str, sent_bytes: Sequence[Sequence[int]], ranks_per_node: int
) -> Chart | None:
    """Sources down, destinations across, a line between nodes; None where nothing is sent.

    Args:
        sent_bytes: [source][destination]; of more than 32 ranks nodes are drawn.
    """
    what, together = "rank", ranks_per_node
    cells: Sequence[Sequence[int]] = sent_bytes
    if len(sent_bytes) > _MOST_RANKS:
        cells = between_nodes(sent_bytes, ranks_per_node)
        what, together = "node", len(cells)
    if not any(map(any, cells)):
        return None
    size = len(cells)
    borders = [place - 0.5 for place in range(together, size, together)]
    source, to = divmod(int(np.argmax(cells)), size)
    return Chart(
        title,
        f"A square for each pair of {what}s, brighter means more bytes. The most go from {what} "
        f"{source} to {to}: {bytes_si(cells[source][to])}.",
        _traffic_spec(cells, what, borders),
        Table(
            f"{title}: from {what} (row) to {what} (column)",
            tuple(map(Heading, ["from", *(f"to {place}" for place in range(size))])),
            tuple((str(place), *map(bytes_si, row)) for place, row in enumerate(cells)),
        ),
        note="Payload bytes." + (" Lines: node boundaries." if borders else ""),
    )


def _traffic_spec(cells: Sequence[Sequence[int]], what: str, borders: Sequence[float]) -> Spec:
    """Squares around whole numbers, so that a border is half way between two."""
    size = len(cells)
    values = [
        {
            "source": source,
            "destination": to,
            "left": to - 0.5,
            "right": to + 0.5,
            "top": source - 0.5,
            "bottom": source + 0.5,
            "bytes": num,
            "shown": bytes_si(num),
        }
        for source, row in enumerate(cells)
        for to, num in enumerate(row)
    ]
    domain = [-0.5, size - 0.5]
    labels = list(range(0, size, max(1, size // 16)))
    axis = {"values": labels, "grid": False, "ticks": False, "format": "d"}
    colouring = quantity("bytes", "bytes", scheme=_SCALE, domainMin=0)
    squares: Spec = {
        "mark": {"type": "rect", "stroke": "--card", "strokeWidth": 0.5},
        "encoding": {
            "x": quantity("left", f"to {what}", axis, domain=domain, nice=False),
            "x2": {"field": "right"},
            "y": quantity("top", f"from {what}", axis, domain=domain, nice=False, reverse=True),
            "y2": {"field": "bottom"},
            "color": colouring | {"legend": {"format": "~s"}},
            "tooltip": tooltip(source=f"from {what}", destination=f"to {what}", shown="payload"),
        },
    }
    rules: list[Spec] = [
        {
            "data": {"values": [{"at": border} for border in borders]},
            "mark": {"type": "rule", "color": "--vermillion", "strokeWidth": 2},
            "encoding": {side: quantity("at", title, domain=domain, nice=False)},
        }
        for side, title in (("x", f"to {what}"), ("y", f"from {what}"))
        if borders
    ]
    height = min(_MOST_PX, max(_LEAST_PX, _ROW_PX * size))
    return {"data": {"values": values}, "height": height, "layer": [squares, *rules]}


def fan_out_chart(title: str, fan_outs: Mapping[str, FanOut]) -> Chart | None:
    """A histogram a deployment, side by side; None where nothing was counted."""
    counts = {
        name: tokens
        for name, each in fan_outs.items()
        if any(tokens := each.tokens_by_ranks_reached)
    }
    if not counts:
        return None
    means = {name: figures(fan_outs[name].ranks_per_token) for name in counts}
    most = max(place for tokens in counts.values() for place, num in enumerate(tokens) if num)
    reached = range(1, most + 1)
    by_place = {
        name: [tokens[place] / sum(tokens) if place < len(tokens) else 0.0 for place in reached]
        for name, tokens in counts.items()
    }
    legend = list(map(Legend, counts, cycle(SERIES)))
    return Chart(
        title,
        "Share of tokens by the number of ranks they reach. Mean: "
        + "; ".join(f"{name} {mean}" for name, mean in means.items())
        + ".",
        _fan_out_spec(by_place, reached, legend),
        Table(
            title,
            (Heading("deployment", False), *map(Heading, ["mean", *map(str, reached)])),
            tuple((name, means[name], *map(percent, each)) for name, each in by_place.items()),
        ),
        legend=legend,
        note="A token counts once per layer; its own rank counts if it holds one of its experts.",
    )


def _fan_out_spec(
    by_place: Mapping[str, Sequence[float]], reached: range, legend: Sequence[Legend]
) -> Spec:
    values = [
        {"deployment": name, "ranks": place, "share": share, "shown": percent(share)}
        for name, each in by_place.items()
        for place, share in zip(reached, each, strict=True)
    ]
    ranks = nominal("ranks", "ranks reached per token") | {"axis": {"labelAngle": 0}}
    return {
        "data": {"values": values},
        "height": _FAN_OUT_PX,
        "mark": {"type": "bar"},
        "encoding": {
            "x": ranks,
            "xOffset": nominal("deployment"),
            "y": quantity("share", "share of tokens", {"format": "%"}),
            "color": colour("deployment", legend),
            "tooltip": tooltip(deployment="deployment", ranks="ranks", shown="tokens"),
        },
    }
