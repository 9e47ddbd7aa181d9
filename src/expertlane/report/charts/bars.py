"""Plots in rows: throughput of deployments, steps by cause, from one step to another, latencies.

Name and value stand over a bar, not beside it, so that a row is legible on a phone as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from expertlane.report.charts.colours import ADDED, OF_CAUSE, OTHERS, PROPOSAL, RIVAL, SAVED, on
from expertlane.report.charts.svg import (
    NARROW,
    NARROW_PX,
    Spec,
    by_name,
    cells,
    colour,
    layer,
    quantity,
    span,
    tooltip,
    tooltip_of,
)
from expertlane.report.compared import StepDifference
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import figures, low_high, milliseconds, percent, signed
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord

ROW_PX, BAR_PX = 32, 12
_LINE_PX = 14  # of words
_DOWN_PX = 5  # from the middle of a row to that of its bar
_LEAST_PX = 30  # of a bar with words in it
_CHARACTER_PX, _GAP_PX = 7.0, 8  # of the words on the right, and before them
_NARROWER = 0.85  # the font that names are measured in, against the widest of readers


def rows_spec(values: Sequence[Spec], layers: Sequence[Spec], num_rows: int) -> Spec:
    """Bars in rows.

    Args:
        values: each with `row`, its name; the first value of a row has the words on the right as
            `said`.
        layers: marks, each with `y` as `in_row` gives it.
    """
    firsts = [each for each in values if "said" in each]
    said_px = _GAP_PX + _CHARACTER_PX * max(len(each["said"]) for each in firsts)
    named_px = _CHARACTER_PX * max(len(each["row"]) for each in firsts)
    room = f"{_NARROWER} * (width - (said_down ? 0 : {said_px}))"
    # On a phone names that are too long for one line with what is said have that below them.
    down_px = _LINE_PX if named_px + said_px > NARROW_PX else 0

    def words(field: str, x: object, **looks: object) -> Spec:
        mark = {"type": "text", "baseline": "top", "fontSize": 12, "color": "--ink", **looks}
        place = {"y": _row(bandPosition=0.0), "x": {"value": x}, "text": {"field": field}}
        return layer(mark, place, where="isValid(datum.said)")

    return {
        "data": {"values": list(values)},
        "params": [{"name": "said_down", "value": 0}],
        "height": ROW_PX * num_rows,
        NARROW: {
            "params": [{"name": "said_down", "value": down_px}],
            "height": (ROW_PX + down_px) * num_rows,
        },
        "layer": [
            *layers,
            words("row", 0, align="left", yOffset=1, limit={"expr": room}),
            words("said", "width", align="right", yOffset={"expr": "1 + said_down"}),
        ],
    }


def _row(**more: object) -> Spec:
    scale = {"paddingInner": 0, "paddingOuter": 0}
    return {"field": "row", "type": "nominal", "sort": None, "axis": None, "scale": scale, **more}


def in_row() -> Spec:
    """Encoding of a value's row."""
    return {"y": _row()}


def down(px: float) -> Spec:
    """Offset below the middle of a row, larger where the words before a bar have two lines."""
    return {"expr": f"{px} + said_down / 2"}


def mark(kind: str, **looks: object) -> Spec:
    """A mark at the middle of a row's bar: `bar`, `rule`, `point` or `text`."""
    height = {"height": BAR_PX} if kind == "bar" else {}
    return {"type": kind, "yOffset": down(_DOWN_PX)} | height | looks


def along(field: str, title: str | None, most: float, least: float = 0.0) -> Spec:
    """A value on the axis that all rows share, without labels, as values are written out."""
    axis = {"labels": False, "grid": False, "domain": False, "ticks": False, "titlePadding": 2}
    return quantity(field, title, axis, domain=[least, most], nice=False)


def stacked(rows: Mapping[str, tuple[str, Sequence[Spec]]], looks: Spec, words: Spec) -> Spec:
    """Parts end to end, each with its words where there is room for them.

    Args:
        rows: by name, what is said of a bar, and its parts, each with its `size`, and `shown`, its
            words.
        looks: encodings of each part's looks.
        words: encoding of the words' colour.
    """
    values: list[Spec] = []
    for name, (said, parts) in rows.items():
        ends = accumulate((part["size"] for part in parts), initial=0.0)
        for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
            place = {"row": name, "begin": begin, "end": end, "middle": begin + part["size"] / 2}
            values.append(part | place | ({"said": said} if part is parts[0] else {}))
    most = max(value["end"] for value in values)
    ends_of = {"x": along("begin", None, most), "x2": {"field": "end"}}
    # Words' colour has a scale of its own: layers share that of `color`.
    at = {"x": along("middle", None, most), "fill": words, "text": {"field": "shown"}}
    has_room = f"datum.size * width / {most} > {_LEAST_PX}"
    layers = [
        layer(
            mark("bar", stroke="--card", strokeWidth=1),
            *(in_row(), ends_of, looks),
            where="datum.size > 0",
        ),
        layer(mark("text", fontSize=10.5), in_row(), at, where=has_room),
    ]
    return rows_spec(values, layers, len(rows))


_LEAST_S = 1e-9  # less is a rounding's rest
_SEEN = 0.0005  # share of a bar's length; less is left out
_LEAST_ROWS = 3  # two values are a sentence's
FASTER, SLOWER = "faster", "slower"
_ROLES = [Legend(FASTER, PROPOSAL), Legend(SLOWER, RIVAL), Legend("other", OTHERS)]


@dataclass(frozen=True)
class Bar:
    """The bar of one deployment.

    Attributes:
        role: `faster` or `slower` for those that a verdict names.
    """

    name: str
    of: Estimate
    role: str = "other"

    @property
    def said(self) -> str:
        """Its value and range in words."""
        return figures(self.of) + (f" ({low_high(self.of)})" if self.of.low is not None else "")


def throughput_chart(
    title: str,
    unit: str,
    bars: Sequence[Bar],
    *,
    between: str,
    is_ranked: bool = False,
    least: int = _LEAST_ROWS,
) -> Chart | None:
    """One bar a deployment, the fastest first.

    Args:
        between: meaning of a bar's range, for example `slowest and fastest run`.
        is_ranked: keep the bars in their given order.
        least: number of bars of the smallest chart; None of fewer.
    """
    if len(bars) < least:
        return None
    if not is_ranked:
        bars = sorted(bars, key=lambda each: -each.of.value)
    columns: dict[str, Column[Bar]] = {
        "row": text("deployment", lambda each: each.name),
        "shown": number(unit, lambda each: each.of, figures),
        "between": number(between, lambda each: each.of, low_high),
    }
    values = [
        cells(columns, each) | vars(each.of) | {"said": each.said, "role": each.role}
        for each in bars
    ]
    most = max(each.of.high or each.of.value for each in bars)
    value = {"x": along("value", unit, most), "color": colour("role", _ROLES)}
    layers = [layer(mark("bar", cornerRadiusEnd=2), in_row(), value)]
    has_ranges = any(each.of.low is not None for each in bars)
    if has_ranges:
        ends = {"x": along("low", unit, most), "x2": {"field": "high"}}
        line = mark("rule", strokeWidth=2, color="--ink")
        layers.append(layer(line, in_row(), ends, where="isValid(datum.low)"))
    first, last = bars[0], bars[-1]
    return Chart(
        title,
        f"Bars of {unit} of {len(bars)} deployments, from {first.name}, "
        f"{figures(first.of)}, to {last.name}, {figures(last.of)}.",
        rows_spec(values, layers, len(bars)),
        Table.of(title, columns.values(), bars),
        note=f"The line in a bar, and in brackets: {between}." if has_ranges else "",
    )


def causes_chart(
    steps: Mapping[str, StepsRecord], what: str, *, note: str, as_shares: bool = False
) -> Chart | None:
    """A stacked bar a deployment, its causes in the order of the steps' breakdown.

    None where it would show only two numbers.

    Args:
        what: the thing drawn, for example `decode step`.
        as_shares: draw bars equally long, for steps of which one dwarfs the other.
    """
    seconds = {
        name: {cause: s if s > _LEAST_S else 0.0 for cause, s in step.breakdown_s.items()}
        for name, step in steps.items()
    }
    longest_s = max(sum(each.values()) for each in seconds.values())
    causes = [
        cause
        for cause in dict.fromkeys(cause for each in seconds.values() for cause in each)
        if any(each.get(cause, 0.0) > _SEEN * longest_s for each in seconds.values())
    ]
    if len(seconds) * len(causes) < _LEAST_ROWS:
        return None
    rows: dict[str, tuple[str, list[Spec]]] = {}
    for name, each in seconds.items():
        whole_s = sum(each.values())
        parts = []
        for cause in causes:
            ms = 1e3 * each.get(cause, 0.0)
            share = ms / 1e3 / whole_s
            shown = {"cause": cause, "ms": ms, "shown": figures(ms), "share": percent(share)}
            parts.append(shown | {"size": share if as_shares else ms})
        rows[name] = f"{milliseconds(whole_s)} ms", parts
    legend = [Legend(cause, OF_CAUSE[cause]) for cause in causes]
    looks = {
        "color": colour("cause", legend),
        "tooltip": tooltip(row="deployment", cause="cause", shown="ms", share="share"),
    }
    words = colour("cause", [replace(each, colour=on(each.colour)) for each in legend])
    in_all: Column[Mapping[str, float]] = number(
        "total", lambda each: sum(each.values()), milliseconds
    )
    largest = ((name, *_top(each)) for name, each in seconds.items())
    return Chart(
        _most_costly(seconds, what),
        f"Stacked bars, one per deployment: milliseconds of a {what} by cause. "
        + " ".join(f"{name}: largest is {cause}, {percent(s)}." for name, cause, s in largest),
        stacked(rows, looks, words),
        Table.across(f"ms of a {what}", [*map(_due_to, causes), in_all], list(seconds.items())),
        legend=legend,
        note=note,
    )


def _due_to(cause: str) -> Column[Mapping[str, float]]:
    return number(cause, lambda each: each.get(cause, 0.0), milliseconds)


def _most_costly(seconds: Mapping[str, Mapping[str, float]], what: str) -> str:
    """The largest cause of the slowest step, and its part of the fastest one."""
    slow, fast = (by(seconds, key=lambda name: sum(seconds[name].values())) for by in (max, min))
    cause, share = _top(seconds[slow])
    said = f"Largest part of a {what}: {cause}, {percent(share)}"
    if slow == fast:
        return f"{said} of {slow}'s" if len(seconds) > 1 else said
    its_share = seconds[fast].get(cause, 0.0) / (sum(seconds[fast].values()) or 1.0)
    return f"{said} of the longest ({slow}), {percent(its_share)} of the shortest ({fast})"


def _top(seconds: Mapping[str, float]) -> tuple[str, float]:
    cause = max(seconds, key=lambda each: seconds[each])
    return cause, seconds[cause] / (sum(seconds.values()) or 1.0)


_LINES_ROOM = 1.18  # of the longest bar, so that lines down to the next cross no value
_EVEN = 0.01  # share of the longer step; less is no difference


def waterfall_chart(
    title: str, from_name: str, to_name: str, difference: StepDifference, *, note: str = ""
) -> Chart:
    """The longer step, each cause that shortens or lengthens it, and the other step.

    Args:
        from_name, to_name: names of the slower and the faster deployment of `difference`.
    """
    slower_ms, faster_ms = difference.slower_ms, difference.faster_ms
    at_ms = slower_ms
    bars = [(from_name, 0.0, slower_ms, slower_ms, from_name, f"{figures(slower_ms)} ms")]
    for cause, ms in difference.causes:
        kind = "saves" if ms < 0 else "adds"
        bars.append((cause, at_ms, at_ms + ms, ms, kind, signed(ms)))
        at_ms += ms
    bars.append((to_name, 0.0, faster_ms, faster_ms, to_name, f"{figures(faster_ms)} ms"))
    keys = ("row", "begin", "end", "ms", "kind", "said")
    rows: list[Spec] = [dict(zip(keys, each, strict=True)) for each in bars]
    for row, following in pairwise(rows):
        row["next"] = following["row"]
    reached = [each[key] for key in ("begin", "end") for each in rows]
    most, least = _LINES_ROOM * max(reached), min(0.0, *reached)
    legend = [Legend("saves", SAVED), Legend("adds", ADDED)]
    looks = [*legend, Legend(from_name, RIVAL), Legend(to_name, PROPOSAL)]
    ends = {"x": along("begin", None, most, least), "x2": {"field": "end"}}
    to_next = {"x": along("end", None, most, least), "y2": {"field": "next"}}
    line = {"type": "rule", "strokeWidth": 1, "color": OTHERS, "yOffset": down(BAR_PX)}
    layers = [
        layer(line, in_row(), to_next, where="isValid(datum.next)"),
        layer(mark("bar"), in_row(), ends, {"color": colour("kind", looks)}),
    ]
    largest = max(rows[1:-1], key=lambda each: abs(each["ms"]), default=None)
    columns: tuple[Column[Spec], ...] = (
        text("from, by, to", lambda each: each["row"]),
        number("ms", lambda each: each["ms"], figures),
    )
    return Chart(
        title,
        f"From {from_name}, {figures(slower_ms)} ms per step, to {to_name}, "
        f"{figures(faster_ms)} ms, one bar per cause."
        + (f" Most: {largest['row']}, {largest['said']} ms." if largest else ""),
        rows_spec(rows, layers, len(rows)),
        Table.of(title, columns, rows),
        legend=[each for each in legend if any(row["kind"] == each.label for row in rows)],
        note=note,
    )


def step_title(from_name: str, to_name: str, difference: StepDifference) -> str:
    """The difference and its main causes, in a line."""
    saved_ms = difference.slower_ms - difference.faster_ms
    if abs(saved_ms) < _EVEN * difference.slower_ms or not difference.causes:
        return f"A step of {to_name} takes as long as one of {from_name}"
    than = f"{figures(abs(saved_ms))} ms {'shorter' if saved_ms > 0 else 'longer'}"
    said = f"A step of {to_name} is {than} than one of {from_name}"
    named = [(cause, ms) for cause, ms in difference.causes if ms * saved_ms < 0]
    if not named:
        return said
    cause, ms = max(named, key=lambda each: abs(each[1]))
    return f"{said}, first of all by {cause} ({signed(ms)} ms)"


_LIMIT = "limit"
_STATISTICS = (
    Legend("median", PROPOSAL, "diamond"),
    Legend("mean", PROPOSAL, "triangle-up"),
    Legend("p95", RIVAL, "circle"),
    Legend("p99", OTHERS, "square"),
    Legend(_LIMIT, "--ink", "cross"),
)
_ROOM = 1.15  # factor beyond the least and the largest value, on a logarithmic axis
_TICKS = (1, 2, 5)


@dataclass(frozen=True)
class Spread:
    """One latency under one load.

    Attributes:
        ms: milliseconds by statistic: `median`, `mean`, `p95` or `p99`; words name the first.
        limits_ms: limits of its objectives.
    """

    name: str
    ms: Mapping[str, float]
    limits_ms: Sequence[float] = ()

    @property
    def said(self) -> str:
        """Its first and its last statistic in words."""
        (_, first), *_, (last_name, last) = self.ms.items()
        more = f", {last_name} {figures(last)}" if len(self.ms) > 1 else ""
        return f"{figures(first)} ms{more}"

    @property
    def marks(self) -> list[tuple[str, float]]:
        """Statistics, then limits, each with its value."""
        return [*self.ms.items(), *((_LIMIT, each) for each in self.limits_ms)]


_Mark = tuple[Spread, str, float]


def spread_chart(title: str, spreads: Sequence[Spread], *, note: str = "") -> Chart:
    """Statistics of latencies, a row for each latency, with limits among them on one axis."""
    marks = [(each, *of_row) for each in spreads for of_row in each.marks]
    used = {what for _, what, _ in marks}
    looks = [look for look in _STATISTICS if look.label in used]
    columns: dict[str, Column[_Mark]] = {
        "row": text("latency", lambda mark: mark[0].name),
        "what": text("statistic", lambda mark: mark[1]),
        "shown": number("ms", lambda mark: mark[2], figures),
    }
    values: list[Spec] = []
    for each in spreads:
        for what, ms in reversed(each.marks):  # the first one last, so that it is on top
            value = cells(columns, (each, what, ms)) | {"ms": ms}
            if what == next(iter(each.ms)):
                value |= {"said": each.said, "least": min(each.ms.values())}
                value |= {"most": max(each.ms.values())}
            values.append(value)
    ends = [ms for _, _, ms in marks]
    least, most = min(ends) / _ROOM, max(ends) * _ROOM
    places = (tick * 10.0**power for power in range(-6, 9) for tick in _TICKS)
    ticks = [each for each in places if least <= each <= most]

    def at(field: str) -> Spec:
        axis = {"values": ticks, "format": "~r", "domain": False, "ticks": False}
        return quantity(field, "ms", axis, type="log", domain=[least, most], nice=False)

    shape = by_name("what", {each.label: each.shape for each in looks})
    seen = {"color": colour("what", looks), "shape": shape, "tooltip": tooltip_of(columns)}
    line = mark("rule", strokeWidth=2, color="--line")
    layers = [
        layer(line, in_row(), span(at, "least", "most"), where="isValid(datum.said)"),
        layer(mark("point", filled=True, opacity=1, size=90), in_row(), {"x": at("ms")}, seen),
    ]
    return Chart(
        title,
        f"Milliseconds of {len(spreads)} latencies on a logarithmic axis. "
        + " ".join(f"{each.name}: {each.said}." for each in spreads),
        rows_spec(values, layers, len(spreads)),
        Table.of(title, columns.values(), marks),
        legend=looks,
        note=note,
    )
