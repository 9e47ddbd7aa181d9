"""Heatmaps of traffic between ranks, and bars of how many ranks tokens reach."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertlane.report.charts.colours import ABOVE
from expertlane.report.charts.encoding import Spec, quantity
from expertlane.report.charts.rows import along, bar, in_row, inside, rows_spec
from expertlane.report.document import Chart, Heading, Legend, Multiples, Table
from expertlane.report.matrix import between_nodes
from expertlane.report.numbers import bytes_si, counted, figures, percent
from expertlane.results.traffic import FanOut

_SIDE_PX = 190
_MOST_RANKS = 32
_TWO = 2  # ranks, whose traffic is two numbers
_NUM_SHADES = 6  # shades of amounts, relative to the largest
_SAME = 0.02  # share of the largest amount; patterns that differ by less are one
_LEAST_SHADE = 0.15
_LONG = 32  # characters, of names over a bar
_LEAST_SHARE = 0.005  # share of tokens
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
    drawn: list[tuple[list[str], _Bytes]] = []
    said: list[str] = []
    for name, payload in sent.items():
        if not any(map(any, payload)):
            continue
        if len(payload) <= _TWO:
            (_, to), (back, _) = payload
            said.append(
                f"{name}: rank 0 sends {bytes_si(to)} to rank 1, which sends {bytes_si(back)}."
            )
            continue
        of_same = next((names for names, other in drawn if _is_alike(payload, other)), None)
        if of_same is None:
            drawn.append(([name], payload))
        else:
            of_same.append(name)
    charts = tuple(_square(names, payload, ranks_per_node, sent) for names, payload in drawn)
    legend = [
        Legend(f"{percent(level / _NUM_SHADES)} of the largest", ABOVE, opacity=_shade(level))
        for level in (1, _NUM_SHADES // 2, _NUM_SHADES)
    ]
    note = (
        f"Payload bytes of {of_what}: from rank (row) to rank (column). Lines: node boundaries. "
        "Deployments with the same pattern share a matrix."
    )
    num_names, num_drawn = sum(len(names) for names, _ in drawn), len(drawn)
    title = f"Traffic matrix, {phase}"
    if num_names > 1:
        patterns = counted(num_drawn, "traffic pattern")
        title = f"{num_names} deployments have {patterns} in {phase}"
    return [*([Multiples(title, charts, note, legend)] if charts else []), *said]


def _is_alike(one: _Bytes, other: _Bytes) -> bool:
    """True if the shares of the largest amount are the same, whatever the amounts."""
    if len(one) != len(other):
        return False
    shares, its_shares = (np.array(each) / np.max(each) for each in (one, other))
    return bool(np.abs(shares - its_shares).max() <= _SAME)


def _square(
    names: Sequence[str], payload: _Bytes, ranks_per_node: int, sent: Mapping[str, _Bytes]
) -> Chart:
    what, borders, cells = "rank", range(ranks_per_node, len(payload), ranks_per_node), payload
    if len(payload) > max(_MOST_RANKS, ranks_per_node):  # more than one node
        what, borders, cells = "node", range(0), between_nodes(payload, ranks_per_node)
    amounts = np.array(cells, dtype=np.float64)
    source, to = np.unravel_index(amounts.argmax(), amounts.shape)
    pairs = amounts[~np.eye(len(cells), dtype=bool)]
    share = float((pairs > 0).mean())
    most = f"most, {bytes_si(amounts.max())}, from {what} {source} to {to}"
    totals = (f"{name} {bytes_si(np.sum(sent[name]))}" for name in names)
    return Chart(
        ", ".join(names),
        f"{percent(share)} of the pairs of {what}s send; {most}. Total: {', '.join(totals)}.",
        _square_spec(amounts, what, borders),
        Table(
            f"from {what} (row) to {what} (column)",
            tuple(map(Heading, ["from", *(f"to {place}" for place in range(len(cells)))])),
            tuple((str(place), *map(bytes_si, row)) for place, row in enumerate(cells)),
        ),
        note=f"{percent(share)} of the pairs send; {most}.",
    )


def _square_spec(amounts: npt.NDArray[np.float64], what: str, borders: Sequence[int]) -> Spec:
    """Squares as runs of equal shade in each row."""
    size = len(amounts)
    levels = np.ceil(_NUM_SHADES * amounts / amounts.max()).astype(int)
    values = [
        {"top": row - 0.5, "bottom": row + 0.5, "left": left - 0.5, "right": right - 0.5}
        | {"shade": _shade(level)}
        for row, of_row in enumerate(levels)
        for left, right, level in _runs(of_row.tolist())
        if level
    ]
    labels = list(range(0, size, max(1, size // 4)))
    axis = {"values": labels, "grid": False, "ticks": False, "format": "d"}

    def place(field: str, title: str, **more: object) -> Spec:
        return quantity(field, title, axis, domain=[-0.5, size - 0.5], nice=False, **more)

    squares: Spec = {
        "mark": {"type": "rect", "color": ABOVE},
        "encoding": {
            "x": place("left", f"to {what}"),
            "x2": {"field": "right"},
            "y": place("top", f"from {what}", reverse=True),
            "y2": {"field": "bottom"},
            "fillOpacity": quantity("shade", None) | {"scale": None, "legend": None},
        },
    }
    rules: list[Spec] = [
        {
            "data": {"values": [{"at": border - 0.5} for border in borders]},
            "mark": {"type": "rule", "color": "--ink", "strokeWidth": 1},
            "encoding": {"x": place("at", f"to {what}")}
            if side == "x"
            else {"y": place("at", f"from {what}", reverse=True)},
        }
        for side in ("x", "y")
        if borders
    ]
    return {"data": {"values": values}, "height": _SIDE_PX, "layer": [squares, *rules]}


def _shade(level: int) -> float:
    return round(_LEAST_SHADE + (1 - _LEAST_SHADE) * level / _NUM_SHADES, 2)


def _runs(levels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal levels: begin, end, level."""
    begin = 0
    for place in range(1, len(levels) + 1):
        if place == len(levels) or levels[place] != levels[begin]:
            yield begin, place, levels[begin]
            begin = place


def fan_out_chart(phase: str, fan_outs: Mapping[str, FanOut]) -> Chart | str | None:
    """Ranks that a token reaches: a bar a deployment, those with the same shares together.

    A sentence where all tokens of each deployment reach equally many; None without counts.
    """
    alike: dict[tuple[float, ...], list[str]] = {}
    for name, each in fan_outs.items():
        tokens = each.tokens_by_ranks_reached
        if any(tokens):
            alike.setdefault(tuple(num / sum(tokens) for num in tokens), []).append(name)
    if not alike:
        return None
    shares = {_together(names): each for each, names in alike.items()}
    means = {
        name: figures(sum(place * share for place, share in enumerate(each)))
        for name, each in shares.items()
    }
    in_mean = "; ".join(f"{name} {mean}" for name, mean in means.items())
    if all(max(each) == 1.0 for each in shares.values()):
        of_all = means[name] if len(means) == 1 else f"as many ranks as the others: {in_mean}"
        return f"Every {phase} token reaches {of_all}{' ranks' if len(means) == 1 else ''}."
    reached = [
        place
        for place in range(max(map(len, shares.values())))
        if any(place < len(each) and each[place] > _LEAST_SHARE for each in shares.values())
    ]
    legend = [
        Legend(f"{place} {'rank' if place == 1 else 'ranks'}", ABOVE, opacity=_step(at, reached))
        for at, place in enumerate(reached)
    ]
    widest = max(shares, key=lambda name: float(means[name]))
    return Chart(
        f"A {phase} token of {widest} reaches {means[widest]} ranks on average",
        f"Shares of {phase} tokens by how many ranks they reach. On average: {in_mean}.",
        _fan_out_spec(shares, means, reached),
        Table(
            "Shares of tokens by ranks reached",
            (Heading("deployment", False), *map(Heading, ["mean", *map(str, reached)])),
            tuple(
                (name, means[name], *(percent(_at(each, place)) for place in reached))
                for name, each in shares.items()
            ),
        ),
        legend=legend,
        note="A token counts once per layer; its own rank counts if it holds one of its experts.",
    )


def _together(names: Sequence[str]) -> str:
    """All names, or of many their numbers."""
    joined = ", ".join(names)
    is_short = len(joined) <= _LONG or not all(name.startswith("#") for name in names)
    return joined if is_short else ", ".join(name.partition(" ")[0] for name in names)


def _at(shares: Sequence[float], place: int) -> float:
    return shares[place] if place < len(shares) else 0.0


def _step(at: int, reached: Sequence[int]) -> float:
    """Shade of a step, from light to full, by its order."""
    return round(0.2 + 0.6 * at / max(1, len(reached) - 1), 2)


def _fan_out_spec(
    shares: Mapping[str, Sequence[float]], means: Mapping[str, str], reached: Sequence[int]
) -> Spec:
    values: list[Spec] = []
    for name, each in shares.items():
        begin = 0.0
        for at, place in enumerate(reached):
            share = _at(each, place)
            said = {} if at else {"said": f"{means[name]} on average"}
            values.append(
                {"row": name, "begin": begin, "end": begin + share, "middle": begin + share / 2}
                | {"share": share, "shown": percent(share), "shade": _step(at, reached)}
                | said
            )
            begin += share
    parts: Spec = {
        "mark": bar(stroke="--card", strokeWidth=1, color=ABOVE),
        "encoding": in_row()
        | {"x": along("begin", "share of tokens", 1.0), "x2": {"field": "end"}}
        | {"fillOpacity": quantity("shade", None) | {"scale": None, "legend": None}},
    }
    words = inside("shown", "middle", "share", 1.0, {"value": "--ink"})
    return rows_spec(values, [parts, words], len(shares))
