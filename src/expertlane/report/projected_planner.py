"""The best layouts that a planner finds, against an experiment's own."""

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import figures, milliseconds, times
from expertlane.report.projected_rows import at_context, bounds
from expertlane.results.projection import Planned, Projection


def planner(projection: Projection) -> Section:
    """For the decode step that is spoken of, and for the whole workload."""
    heading = "Projected: the best layout a planner finds"
    if not projection.planned:
        return Section(heading, ("Not looked for: the cluster is larger than plan takes.",))
    parts: list[str | Table] = [
        _decode_sentence(projection, planned) for planned in projection.planned
    ]
    for planned in projection.planned:
        if planned.served:
            parts.append(_served_sentence(planned))
            parts.append(_served_table(planned))
    parts.append(
        "The whole workload: all its prompts and outputs, sequences in as fast as memory and time "
        "allow; output tokens a second, others' prompts included in TPOT."
    )
    return Section(heading, tuple(parts))


def _decode_sentence(projection: Projection, planned: Planned) -> str:
    head = (
        f"Top-{planned.top_k}, decode at {projection.context:,}: of {planned.num_candidates:,} "
        f"deployments ({planned.num_too_large:,} too large)"
    )
    best = planned.decode
    if best is None:
        return f"{head} none holds all {projection.num_sequences:,} sequences."
    step = at_context(projection, best)
    rows = projection.usual(planned.top_k)
    against = "; ".join(
        f"{times(step.tps.value / at_context(projection, row).tps.value)} {row.name}"
        for row in rows
    )
    return (
        f"{head} the fastest is {best.name}: {figures(step.tps.value)} TPS "
        f"({bounds(step.tps)}), TPOT {milliseconds(step.step_s.value)} ms "
        f"({bounds(step.step_s, 1e3)}). Against the experiment's own: {against}."
    )


def _served_sentence(planned: Planned) -> str:
    best, *own = planned.served
    head = f"Top-{planned.top_k}, the whole workload: the best is {best.name}"
    if not own:
        return f"{head}; none of the experiment's own fits."
    first, fastest = own[0], max(own, key=lambda each: each.tps.value)
    return (
        f"{head}, with {times(best.tps.value / first.tps.value)} the output of {first.name} and "
        f"{times(best.tps.value / fastest.tps.value)} that of {fastest.name}, the experiment's "
        "best."
    )


def _served_table(planned: Planned) -> Table:
    return Table(
        f"The whole workload, top-{planned.top_k}",
        (
            text("deployment"),
            number("at once"),
            number("output TPS"),
            number("low–high"),
            number("TPOT ms"),
            number("low–high"),
        ),
        tuple(
            (
                each.name,
                f"{each.num_seqs:,}",
                figures(each.tps.value),
                bounds(each.tps),
                milliseconds(each.tpot_s.value),
                bounds(each.tpot_s, 1e3),
            )
            for each in planned.served
        ),
    )
