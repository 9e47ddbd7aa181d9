"""How fast a projection's deployments are, under which conditions, and what memory allows."""

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, figures, percent
from expertlane.report.projected_rows import (
    BEYOND,
    at_context,
    bounds,
    conditions_in_words,
    decode_step,
    numbers,
    tpot,
    tps,
)
from expertlane.results.projection import ProjectedDeployment, Projection, StepProjection

_EVEN = 0.05  # less is no difference


def speed(projection: Projection, top_k: int) -> Section:
    """TPOT and TPS at every context, and prefill."""
    rows = projection.usual(top_k)
    parts: list[str | Table] = [
        _tpot(projection, rows),
        _tps(projection, rows),
        _bounds(projection, rows),
    ]
    longest = projection.contexts[-1]
    if any(not decode_step(projection, row, longest).fits for row in rows):
        parts.append(
            f"{BEYOND} {projection.num_sequences:,} sequences of so many tokens do not fit into "
            "memory: as if they did. Beside it, as many as fit (see memory)."
        )
    return Section(f"Projected: speed ({conditions_in_words(rows[0].conditions)})", tuple(parts))


def _fitting(projection: Projection, row: ProjectedDeployment) -> StepProjection | None:
    """At the longest context the step of what fits, where that is not all."""
    found = (
        step
        for step in row.decode
        if step.context == projection.contexts[-1] and step.num_tokens < projection.num_sequences
    )
    return next(found, None)


def _is_short(projection: Projection, rows: tuple[ProjectedDeployment, ...]) -> bool:
    return any(_fitting(projection, row) for row in rows)


def _tpot(projection: Projection, rows: tuple[ProjectedDeployment, ...]) -> Table:
    place = numbers(projection)
    contexts = projection.contexts
    is_short = _is_short(projection, rows)
    cells = []
    for row in rows:
        steps = [decode_step(projection, row, context) for context in contexts]
        fit = _fitting(projection, row)
        rest = [tpot(fit) if fit else NONE] if is_short else []
        prefill = figures(row.prefill.tps.value) if row.prefill else NONE
        cells.append((str(place[row.name]), row.name, prefill, *map(tpot, steps), *rest))
    return Table(
        "Prefill TPS, and TPOT in ms by context",
        (
            text("#"),
            text("deployment"),
            number("prefill TPS"),
            *(number(f"TPOT at {context:,}") for context in contexts),
            *([number(f"at {contexts[-1]:,}, as fits")] if is_short else []),
        ),
        tuple(cells),
    )


def _tps(projection: Projection, rows: tuple[ProjectedDeployment, ...]) -> Table:
    place = numbers(projection)
    contexts = projection.contexts
    is_short = _is_short(projection, rows)
    first = at_context(projection, rows[0]).tps.value
    cells = []
    for row in rows:
        steps = [decode_step(projection, row, context) for context in contexts]
        fit = _fitting(projection, row)
        rest = [tps(fit) if fit else NONE] if is_short else []
        factor = figures(at_context(projection, row).tps.value / first)
        cells.append((str(place[row.name]), row.name, *map(tps, steps), *rest, factor))
    return Table(
        "Decode TPS by context",
        (
            text("#"),
            text("deployment"),
            *(number(f"TPS at {context:,}") for context in contexts),
            *([number(f"at {contexts[-1]:,}, as fits")] if is_short else []),
            number(f"× first at {projection.context:,}"),
        ),
        tuple(cells),
    )


def _bounds(projection: Projection, rows: tuple[ProjectedDeployment, ...]) -> Table:
    place = numbers(projection)
    contexts = projection.contexts
    return Table(
        "Low to high: prefill TPS in thousands, and TPOT in ms by context",
        (
            text("#"),
            number("prefill, 1000 TPS"),
            *(number(f"TPOT at {context:,}") for context in contexts),
        ),
        tuple(
            (
                str(place[row.name]),
                bounds(row.prefill.tps, 1e-3) if row.prefill else NONE,
                *(
                    bounds(decode_step(projection, row, context).step_s, 1e3)
                    for context in contexts
                ),
            )
            for row in rows
        ),
    )


def conditions(projection: Projection) -> Section:
    """Balanced and skewed, in graphs and eager: the step that is spoken of, and prefill."""
    parts: list[str | Table] = [
        table
        for is_prefill in (False, True)
        for top_k in projection.top_ks
        for table in _by_condition(projection, top_k, is_prefill=is_prefill)
    ]
    parts += _graph_against_eager(projection)
    parts.append(
        f"Skewed: a power law of popularity, alpha {projection.skew:g}. Layouts with ep=1 cut "
        "every expert over all ranks of a stage: no routing makes one of them late."
    )
    return Section("Projected: routing and execution", tuple(parts))


def _graph_against_eager(projection: Projection) -> list[str]:
    """By how much steps differ, where both are projected."""
    by_case = {
        (row.name, row.top_k, row.routing, row.execution): row for row in projection.deployments
    }
    differences = [
        abs(eager.step_s.value / graph.step_s.value - 1)
        for (name, top_k, routing, execution), row in by_case.items()
        if execution == "graph"
        and (other := by_case.get((name, top_k, routing, "eager"))) is not None
        for graph, eager in zip(row.decode, other.decode, strict=True)
    ]
    if not differences:
        return []
    return [
        f"Graphs or not changes a decode step by {percent(max(differences))} at most: launches of "
        "fused kernels run ahead of a device that is this busy."
        if max(differences) < _EVEN
        else f"Without graphs a decode step takes up to {percent(max(differences))} longer."
    ]


def _by_condition(projection: Projection, top_k: int, *, is_prefill: bool) -> list[Table]:
    """Likely values, and their bounds."""
    all_conditions = [each for each in projection.conditions if each[0] == top_k]
    by_name = {(row.name, row.conditions): row for row in projection.deployments}
    likely, low_to_high = [], []
    for name, place in numbers(projection).items():
        rows = [by_name[name, each] for each in all_conditions]
        if is_prefill:
            steps = [row.prefill for row in rows]
            values = [figures(step.tps.value) if step else NONE for step in steps]
            spans = [bounds(step.tps, 1e-3) if step else NONE for step in steps]
        else:
            decodes = [at_context(projection, row) for row in rows]
            values = list(map(tpot, decodes))
            spans = [bounds(step.step_s, 1e3) for step in decodes]
        likely.append((str(place), name, *values))
        low_to_high.append((str(place), *spans))
    what = f"TPOT in ms at {projection.context:,} tokens of context"
    of_bounds = "low to high"
    if is_prefill:
        what, of_bounds = "Prefill TPS", "low to high in thousands"
    headings = [number(f"{execution}, {routing}") for _, execution, routing in all_conditions]
    return [
        Table(f"{what}, top-{top_k}", (text("#"), text("deployment"), *headings), tuple(likely)),
        Table(f"{what}, top-{top_k}, {of_bounds}", (text("#"), *headings), tuple(low_to_high)),
    ]


def memory(projection: Projection) -> Section:
    """What a GPU holds, and how many sequences of full length there is room for."""
    rows = projection.usual(projection.top_ks[0])
    place = numbers(projection)
    wanted = projection.num_sequences
    device = rows[0].memory.device_bytes
    short = [row for row in rows if row.memory.num_resident < wanted]
    cells = tuple(
        (
            str(place[row.name]),
            row.name,
            bytes_si(row.memory.weight_bytes),
            bytes_si(row.memory.activation_bytes),
            bytes_si(row.memory.sequence_bytes * wanted / _num_caches(row)),
            f"{min(row.memory.num_resident, wanted):,}",
        )
        for row in rows
    )
    if not short:
        sentence = f"All {wanted:,} sequences fit at full length everywhere."
    elif len(short) == len(rows):
        sentence = f"No deployment holds all {wanted:,} sequences at full length."
    else:
        sentence = f"{len(short)} of {len(rows)} do not hold all {wanted:,} sequences."
    return Section(
        "Projected: memory of the fullest GPU",
        (
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("weights"),
                    number("activations"),
                    number("keys and values of all"),
                    number("sequences that fit"),
                ),
                cells,
            ),
            f"{sentence} A GPU has {bytes_si(projection.device.memory_bytes)}, of which "
            f"{bytes_si(device)} may be taken. Sequences at their full length, prompt and output.",
        ),
    )


def _num_caches(row: ProjectedDeployment) -> int:
    """Data-parallel ranks, each with sequences of its own."""
    return row.layout.dp_size * row.layout.replicas
