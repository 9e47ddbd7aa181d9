"""Bar charts: throughput of deployments, and steps by cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from expertlane.report.charts.colours import OF_CAUSE, OTHERS, PROPOSAL, RIVAL, on
from expertlane.report.charts.encoding import Spec, cells, colour, tooltip
from expertlane.report.charts.rows import along, bar, in_row, inside, rows_spec, rule
from expertlane.report.document import Chart, Column, Legend, Table, number, text
from expertlane.report.numbers import figures, low_high, milliseconds, percent
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord

_LEAST_S = 1e-9  # less is a rounding's rest
_SEEN = 0.0005  # share of a bar's length; less is left out
_LEAST_ROWS = 3  # two values are a sentence's
_DIGIT_PX = 7


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


FASTER, SLOWER = "faster", "slower"
_COLOUR_OF = {FASTER: PROPOSAL, SLOWER: RIVAL, "other": OTHERS}


def throughput_chart(
    title: str, unit: str, bars: Sequence[Bar], *, between: str, is_ranked: bool = False
) -> Chart | None:
    """One bar a deployment, the fastest first; None of less than three.

    Args:
        between: meaning of a bar's range, for example `slowest and fastest run`.
        is_ranked: keep the bars in their given order.
    """
    if len(bars) < _LEAST_ROWS:
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
    looks = [Legend(role, shade) for role, shade in _COLOUR_OF.items()]
    has_ranges = any(each.of.low is not None for each in bars)
    layers: list[Spec] = [
        {
            "mark": bar(cornerRadiusEnd=2),
            "encoding": in_row()
            | {"x": along("value", unit, most), "color": colour("role", looks)},
        }
    ]
    if has_ranges:
        ends = {"x": along("low", unit, most), "x2": {"field": "high"}}
        layers.append(
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": rule(strokeWidth=2, color="--ink"),
                "encoding": in_row() | ends,
            }
        )
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
    legend = [Legend(cause, OF_CAUSE[cause]) for cause in causes]
    in_all: Column[Mapping[str, float]] = number(
        "total", lambda each: sum(each.values()), milliseconds
    )
    return Chart(
        _most_costly(seconds, what),
        f"Stacked bars, one per deployment: milliseconds of a {what} by cause. "
        + " ".join(_largest(name, each) for name, each in seconds.items()),
        stacked(seconds, causes, legend, as_shares),
        Table.across(f"ms of a {what}", [*map(_due_to, causes), in_all], list(seconds.items())),
        legend=legend,
        note=note,
    )


def stacked(
    seconds: Mapping[str, Mapping[str, float]],
    causes: Sequence[str],
    legend: Sequence[Legend],
    as_shares: bool,
) -> Spec:
    """Parts end to end, each with its milliseconds where there is room for them.

    Args:
        seconds: seconds of each part, by the name of a bar.
        legend: the parts, in the order of `causes`.
        as_shares: whether bars are equally long.
    """
    values: list[Spec] = []
    for name, each in seconds.items():
        begin, whole_s = 0.0, sum(each.values())
        for cause in causes:
            ms = 1e3 * each.get(cause, 0.0)
            part = {"row": name, "cause": cause, "ms": ms, "shown": figures(ms)}
            size = ms / 1e3 / whole_s if as_shares else ms
            place = {"size": size, "begin": begin, "end": begin + size, "middle": begin + size / 2}
            said = {"said": f"{milliseconds(whole_s)} ms"} if cause == causes[0] else {}
            values.append(part | place | said | {"share": percent(ms / 1e3 / whole_s)})
            begin += size
    most = max(value["end"] for value in values)
    ends = {"x": along("begin", None, most), "x2": {"field": "end"}}
    parts: Spec = {
        "transform": [{"filter": "datum.ms > 0"}],
        "mark": bar(stroke="--card", strokeWidth=1),
        "encoding": in_row()
        | ends
        | {
            "color": colour("cause", legend),
            "tooltip": tooltip(row="deployment", cause="cause", shown="ms", share="share"),
        },
    }
    words = colour("cause", [replace(each, colour=on(each.colour)) for each in legend])
    said = inside("shown", "middle", "size", most, words)
    return rows_spec(values, [parts, said], len(seconds))


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


def _largest(name: str, seconds: Mapping[str, float]) -> str:
    cause, share = _top(seconds)
    return f"{name}: largest is {cause}, {percent(share)}."
