"""Why projected steps take as long as they do, how near the floor that is, and how sure."""

from collections.abc import Sequence

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, figures, milliseconds, percent
from expertlane.report.projected_rows import (
    at_context,
    baselines,
    conditions_in_words,
    decode_step,
    numbers,
    proposals,
)
from expertlane.results.projection import ProjectedDeployment, Projection

_MOST_COLUMNS = 8
_LEAST_SHARE = 5e-4  # of the step; a cause below it everywhere has no row


def why(projection: Projection) -> Section:
    """The step that is spoken of, by cause."""
    parts: list[str | Table] = []
    for top_k in projection.top_ks:
        rows = projection.usual(top_k)
        for some in (baselines(rows), proposals(rows)):
            parts += [
                _table(projection, some[first : first + _MOST_COLUMNS])
                for first in range(0, len(some), _MOST_COLUMNS)
            ]
    parts.append(
        "Mean over ranks; the last row is a step in which every sequence goes one token on. Reads "
        "are of operations that memory bandwidth bounds. A transfer counts where it is waited for."
    )
    return Section(
        f"Projected: where a decode step's time goes, {projection.context:,} tokens of context",
        tuple(parts),
    )


def _table(projection: Projection, rows: Sequence[ProjectedDeployment]) -> Table:
    place = numbers(projection)
    steps = [at_context(projection, row) for row in rows]
    shares = {cause: [step.shares.get(cause, 0.0) for step in steps] for cause in steps[0].shares}
    cells = [
        (cause, *(percent(share) if share else NONE for share in of_cause))
        for cause, of_cause in shares.items()
        if max(of_cause) > _LEAST_SHARE
    ]
    cells.append(("ms in all", *(milliseconds(step.step_s.value) for step in steps)))
    return Table(
        conditions_in_words(rows[0].conditions),
        (text(""), *(number(f"#{place[row.name]}") for row in rows)),
        tuple(cells),
    )


def rests_on(projection: Projection) -> Section:
    """The floor, utilisation, and what the numbers rest on."""
    device = projection.device
    return Section(
        "Projected: against the floor, and what it rests on",
        (
            *(_floors(projection, projection.usual(top_k)) for top_k in projection.top_ks),
            "Floor: weights, keys and values of the busiest GPU over "
            f"{figures(device.memory_bytes_per_s / 1e12)} TB/s, or FLOPs over "
            f"{figures(device.flops_per_s / 1e12)} TFLOP/s, whichever takes longer; no kernel is "
            "faster. Bound: time priced by a datasheet's limit or an assumption, not by a law that "
            "was fitted for its type. Extrapolated: time outside the sizes that were fitted.",
        ),
    )


def _floors(projection: Projection, rows: tuple[ProjectedDeployment, ...]) -> Table:
    place = numbers(projection)
    first, last = projection.context, projection.contexts[-1]
    cells = []
    for row in rows:
        step, late = at_context(projection, row), decode_step(projection, row, last)
        cells.append(
            (
                str(place[row.name]),
                milliseconds(step.floor_s),
                figures(step.step_s.value / step.floor_s),
                milliseconds(late.floor_s),
                percent(step.read_utilisation),
                percent(step.flops_utilisation),
                percent(row.prefill.flops_utilisation) if row.prefill else NONE,
                percent(step.basis_shares.get("bound", 0)),
                percent(step.extrapolated_share),
            )
        )
    return Table(
        conditions_in_words(rows[0].conditions),
        (
            text("#"),
            number(f"floor ms at {first:,}"),
            number("step over floor"),
            number(f"floor ms at {last:,}"),
            number("memory used"),
            number("FLOPs used"),
            number("FLOPs used, prefill"),
            number("bound"),
            number("extrapolated"),
        ),
        tuple(cells),
    )
