"""Spread of latencies: a row for each, with its statistics on one axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertlane.report.charts.colours import OTHERS, PROPOSAL, RIVAL
from expertlane.report.charts.encoding import Spec, by_name, cells, colour, quantity, tooltip_of
from expertlane.report.charts.rows import in_row, point, rows_spec, rule
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import figures

_LIMIT = "limit"
_LOOKS = (
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
    """Statistics of latencies, with limits among them."""
    marks = [(each, *mark) for each in spreads for mark in each.marks]
    used = {what for _, what, _ in marks}
    looks = [look for look in _LOOKS if look.label in used]
    columns: dict[str, Column[_Mark]] = {
        "row": text("latency", lambda mark: mark[0].name),
        "what": text("statistic", lambda mark: mark[1]),
        "shown": number("ms", lambda mark: mark[2], figures),
    }
    return Chart(
        title,
        f"Milliseconds of {len(spreads)} latencies on a logarithmic axis. "
        + " ".join(f"{each.name}: {each.said}." for each in spreads),
        _spec(spreads, marks, columns, looks),
        Table.of(title, columns.values(), marks),
        legend=looks,
        note=note,
    )


def _spec(
    spreads: Sequence[Spread],
    marks: Sequence[_Mark],
    columns: dict[str, Column[_Mark]],
    looks: Sequence[Legend],
) -> Spec:
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

    def along(field: str) -> Spec:
        axis = {"values": _ticks(least, most), "format": "~r", "domain": False, "ticks": False}
        scale = {"type": "log", "domain": [least, most], "nice": False}
        return quantity(field, "ms", axis, **scale)

    shape = by_name("what", {each.label: each.shape for each in looks})
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.said)"}],
            "mark": rule(strokeWidth=2, color="--line"),
            "encoding": in_row() | {"x": along("least"), "x2": {"field": "most"}},
        },
        {
            "mark": point(size=90),
            "encoding": in_row()
            | {"x": along("ms"), "color": colour("what", looks), "shape": shape}
            | {"tooltip": tooltip_of(columns)},
        },
    ]
    return rows_spec(values, layers, len(spreads))


def _ticks(least: float, most: float) -> list[float]:
    """Ticks at one, two or five times a power of ten."""
    places = (tick * 10.0**power for power in range(-6, 9) for tick in _TICKS)
    return [each for each in places if least <= each <= most]
