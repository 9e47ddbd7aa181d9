"""Waterfall from one step to another, cause by cause."""

from itertools import pairwise

from expertlane.report.charts.colours import ADDED, OTHERS, PROPOSAL, RIVAL, SAVED
from expertlane.report.charts.encoding import Spec, colour
from expertlane.report.charts.rows import BAR_PX, along, bar, down, in_row, rows_spec
from expertlane.report.difference import StepDifference
from expertlane.report.document import Chart, Legend, Table, number, text
from expertlane.report.numbers import figures, signed

_ROOM = 1.18  # of the longest bar, so that lines down to the next cross no value
_EVEN = 0.01  # share of the longer step; less is no difference


def waterfall_chart(
    title: str, from_name: str, to_name: str, difference: StepDifference, *, note: str = ""
) -> Chart:
    """The longer step, each cause that shortens or lengthens it, and the other step.

    Args:
        from_name, to_name: names of the slower and the faster deployment of `difference`.
    """
    rows = _rows(from_name, to_name, difference)
    reached = [value["end"] for value in rows] + [value["begin"] for value in rows]
    legend = [Legend("saves", SAVED), Legend("adds", ADDED)]
    looks = [*legend, Legend(from_name, RIVAL), Legend(to_name, PROPOSAL)]
    most, least = _ROOM * max(reached), min(0.0, *reached)
    ends = {"x": along("begin", None, most, least), "x2": {"field": "end"}}
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.next)"}],
            "mark": {"type": "rule", "strokeWidth": 1, "color": OTHERS, "yOffset": down(BAR_PX)},
            "encoding": {
                "x": along("end", None, most, least),
                "y": in_row()["y"],
                "y2": {"field": "next"},
            },
        },
        {
            "mark": bar(),
            "encoding": in_row() | ends | {"color": colour("kind", looks)},
        },
    ]
    causes = [each for each in rows if each["row"] not in (from_name, to_name)]
    largest = max(causes, key=lambda each: abs(each["ms"]), default=None)
    return Chart(
        title,
        f"From {from_name}, {figures(difference.slower_ms)} ms per step, to {to_name}, "
        f"{figures(difference.faster_ms)} ms, one bar per cause."
        + (f" Most: {largest['row']}, {largest['said']} ms." if largest else ""),
        rows_spec(rows, layers, len(rows)),
        Table.of(
            title,
            (
                text("from, by, to", lambda each: each["row"]),
                number("ms", lambda each: each["ms"], figures),
            ),
            rows,
        ),
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


def _rows(from_name: str, to_name: str, difference: StepDifference) -> list[Spec]:
    """Each bar with its begin and end, and the row that its end leads to."""
    whole = {"begin": 0.0, "kind": from_name, "said": f"{figures(difference.slower_ms)} ms"}
    rows: list[Spec] = [
        {"row": from_name, "end": difference.slower_ms, "ms": difference.slower_ms} | whole
    ]
    at_ms = difference.slower_ms
    for cause, ms in difference.causes:
        rows.append(
            {
                "row": cause,
                "begin": at_ms,
                "end": at_ms + ms,
                "ms": ms,
                "kind": "saves" if ms < 0 else "adds",
                "said": signed(ms),
            }
        )
        at_ms += ms
    ms = difference.faster_ms
    rows.append(
        {"row": to_name, "begin": 0.0, "end": ms, "ms": ms, "kind": to_name}
        | {"said": f"{figures(ms)} ms"}
    )
    for row, following in pairwise(rows):
        row["next"] = following["row"]
    return rows
