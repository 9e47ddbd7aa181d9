"""The top of a projection: its few most important numbers, and what to make of them."""

from collections.abc import Sequence

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import figures, milliseconds, percent, times
from expertlane.report.projected_rows import (
    at_context,
    baselines,
    bounds,
    conditions_in_words,
    fastest,
    proposals,
)
from expertlane.results.projection import ProjectedDeployment, Projection, StepProjection


def verdict(projection: Projection, reported: tuple[str, ...]) -> Section:
    """Baseline, best baseline, best proposal and the planner's best at one context.

    Args:
        reported: what to say of a paper's own numbers.
    """
    tables = tuple(_table(projection, top_k) for top_k in projection.top_ks)
    nothing = (
        (f"Nothing was measured here: {projection.not_measured}.",)
        if projection.not_measured
        else ()
    )
    return Section(
        f"Projected: verdict ({projection.cluster}, nothing here was measured)",
        (
            f"Decode steps of {projection.num_sequences:,} sequences at {projection.context:,} "
            f"tokens of context, {projection.types}; likely values with their bounds:",
            *tables,
            *(_sentence(projection, top_k) for top_k in projection.top_ks),
            *reported,
            _firmness(projection),
            *nothing,
        ),
        leads=True,
    )


def _cast(projection: Projection, top_k: int) -> list[tuple[str, ProjectedDeployment]]:
    """Who plays which part."""
    rows = projection.usual(top_k)
    best = fastest(projection, baselines(rows))
    cast = [("baseline", rows[0])]
    if best is rows[0]:
        cast = [("baseline, also the best", best)]
    else:
        cast.append(("best baseline", best))
    if proposals(rows):
        cast.append(("best proposal", fastest(projection, proposals(rows))))
    planned = next((each for each in projection.planned if each.top_k == top_k), None)
    if planned is not None and planned.decode is not None:
        cast.append(("planner's best", planned.decode))
    return cast


def _table(projection: Projection, top_k: int) -> Table:
    cast = _cast(projection, top_k)
    own = projection.usual(top_k)
    first = at_context(projection, own[0]).tps.value
    best = at_context(projection, fastest(projection, baselines(own))).tps.value
    rows = []
    for part, row in cast:
        step = at_context(projection, row)
        rows.append(
            (
                f"{part}: {row.name}",
                figures(step.tps.value),
                bounds(step.tps, 1e-3),
                milliseconds(step.step_s.value),
                bounds(step.step_s, 1e3),
                figures(step.tps.value / first),
                figures(step.tps.value / best),
            )
        )
    return Table(
        conditions_in_words(cast[0][1].conditions),
        (
            text("deployment"),
            number("decode TPS"),
            number("low–high, 1000 TPS"),
            number("TPOT ms"),
            number("low–high"),
            number("× first"),
            number("× best base"),
        ),
        tuple(rows),
    )


def headline(projection: Projection, top_k: int) -> str:
    """What the proposal gains in decoding, in a sentence."""
    rows = projection.usual(top_k)
    if not proposals(rows):
        return f"Top-{top_k}: no deployment is a proposal; all are baselines."
    first, best = rows[0], fastest(projection, baselines(rows))
    proposal = fastest(projection, proposals(rows))
    against_first = _span(_factors(projection, proposal, first))
    against_best = _span(_factors(projection, proposal, best))
    also = "" if best is first else f", and {against_best} that of {best.name}"
    contexts = projection.contexts
    between = f"at {contexts[0]:,} tokens of context"
    if len(contexts) > 1:
        between = f"from {contexts[0]:,} to {contexts[-1]:,} tokens of context"
    fast, slow = at_context(projection, proposal).tps, at_context(projection, best).tps
    close = ""
    if fast.low < slow.high and slow.low < fast.high:
        close = f" From {best.name} it is within the bounds: too close to tell."
    return (
        f"Top-{top_k}: {proposal.name} has {against_first} the decode TPS of the first "
        f"baseline, {first.name}{also}, {between}.{close}"
    )


def _sentence(projection: Projection, top_k: int) -> str:
    """What the proposal gains: at every context, in prefill, and under skewed routing."""
    rows = projection.usual(top_k)
    if not proposals(rows):
        return headline(projection, top_k)
    proposal = fastest(projection, proposals(rows))
    return (
        f"{headline(projection, top_k)}{_why(projection, proposal, rows[0])}"
        f"{_prefill(rows)}{_skewed(projection, top_k)}"
    )


def _why(projection: Projection, row: ProjectedDeployment, other: ProjectedDeployment) -> str:
    """The cause that costs the slower of two most more."""
    fast, slow = at_context(projection, row), at_context(projection, other)
    if fast.step_s.value > slow.step_s.value:
        row, other, fast, slow = other, row, slow, fast
    excess_s = {cause: _seconds(slow, cause) - _seconds(fast, cause) for cause in slow.shares}
    main = max(excess_s, key=lambda cause: excess_s[cause])
    return (
        f" The largest difference, at {projection.context:,}, is {main}: "
        f"{milliseconds(_seconds(slow, main))} ms of a step with {other.name}, "
        f"{milliseconds(_seconds(fast, main))} with {row.name}."
    )


def _seconds(step: StepProjection, cause: str) -> float:
    return step.shares.get(cause, 0.0) * step.step_s.value


def _prefill(rows: Sequence[ProjectedDeployment]) -> str:
    known = [(row, row.prefill.tps.value) for row in rows if row.prefill]
    of_baselines = [each for each in known if each[0].is_baseline]
    of_proposals = [each for each in known if not each[0].is_baseline]
    if not of_baselines or not of_proposals:
        return ""
    best, proposal = (max(some, key=lambda each: each[1]) for some in (of_baselines, of_proposals))
    return (
        f" Prefill: {figures(proposal[1])} TPS with {proposal[0].name}, {figures(best[1])} with "
        f"{best[0].name} ({times(proposal[1] / best[1])})."
    )


def _skewed(projection: Projection, top_k: int) -> str:
    found = next((each for each in projection.conditions if _is_skewed(each, top_k)), None)
    if found is None:
        return ""
    rows = projection.rows(found)
    best, proposal = fastest(projection, baselines(rows)), fastest(projection, proposals(rows))
    factor = at_context(projection, proposal).tps.value / at_context(projection, best).tps.value
    return (
        f" With skewed routing the best proposal, {proposal.name}, has {times(factor)} the decode "
        f"TPS of the best baseline, {best.name}, at {projection.context:,}."
    )


def _is_skewed(conditions: tuple[int, str, str], top_k: int) -> bool:
    return conditions[0] == top_k and conditions[2] == "skewed"


def _factors(
    projection: Projection, row: ProjectedDeployment, other: ProjectedDeployment
) -> list[float]:
    found = []
    for context in projection.contexts:
        own = row.decode_of(context, projection.num_sequences)
        others = other.decode_of(context, projection.num_sequences)
        if own is not None and others is not None:
            found.append(own.tps.value / others.tps.value)
    return found


def _span(factors: list[float]) -> str:
    least, most = times(min(factors)), times(max(factors))
    return least if least == most else f"{figures(min(factors))} to {most}"


def _firmness(projection: Projection) -> str:
    steps = [at_context(projection, row) for row in projection.usual(projection.top_ks[0])]
    shares = [step.extrapolated_share for step in steps]
    low, high = min(shares), max(shares)
    if high == 0:
        return "All of it lies within the sizes that the profile's laws were fitted to."
    span = percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"
    words = "Most" if low > 0.5 else "Part"
    return (
        f"{words} of it is extrapolated: {span} of these steps' time lies outside the sizes that "
        "were ever measured (see the assumptions), so trust orders and factors more than digits."
    )
