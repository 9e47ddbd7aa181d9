"""The paper's reported numbers held against a projection: what would have to be true for them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import counted, figures, milliseconds, percent, times
from expertlane.report.paper import ROWS, ReportedRow, reported_table
from expertlane.report.projected_rows import (
    baselines,
    conditions_in_words,
    decode_step,
    proposals,
)
from expertlane.results.projection import ProjectedDeployment, Projection, StepProjection

REPORTED_FACTOR = ROWS[1].tps / ROWS[0].tps
_NUM_SHOWN = 6
_NUM_NEAREST = 20
_SHARED = 0.8


@dataclass(frozen=True)
class Combination:
    """A proposal against a baseline under the same conditions and at the same context."""

    baseline: ProjectedDeployment
    proposal: ProjectedDeployment
    below: StepProjection
    above: StepProjection

    @property
    def factor(self) -> float:
        """Of the likely values."""
        return self.above.tps.value / self.below.tps.value

    @property
    def low(self) -> float:
        """If all errors were against the proposal."""
        return self.above.tps.low / self.below.tps.high

    @property
    def high(self) -> float:
        """If all errors were for it."""
        return self.above.tps.high / self.below.tps.low

    @property
    def distance(self) -> float:
        """From the reported factor."""
        return abs(self.factor - REPORTED_FACTOR)

    @property
    def assumed(self) -> tuple[tuple[str, str], ...]:
        """What it takes for granted, by dimension."""
        top_k, execution, routing = self.baseline.conditions
        return (
            ("baseline", self.baseline.name),
            ("proposal", self.proposal.name),
            ("context", f"{self.below.context:,}"),
            ("experts per token", f"top-{top_k}"),
            ("execution", execution),
            ("routing", routing),
        )


def combinations(projection: Projection) -> list[Combination]:
    """Every baseline × proposal × context × conditions."""
    return [
        Combination(
            baseline,
            proposal,
            decode_step(projection, baseline, context),
            decode_step(projection, proposal, context),
        )
        for conditions in projection.conditions
        for baseline in baselines(projection.rows(conditions))
        for proposal in proposals(projection.rows(conditions))
        for context in projection.contexts
    ]


def against_best(all_of_them: Iterable[Combination]) -> list[Combination]:
    """Of each proposal, context and conditions the one with the fastest baseline."""
    best: dict[tuple[object, ...], Combination] = {}
    for each in all_of_them:
        key = each.proposal.name, each.proposal.conditions, each.below.context
        if key not in best or each.factor < best[key].factor:
            best[key] = each
    return list(best.values())


def reported_verdict(projection: Projection) -> tuple[str, ...]:
    """The few sentences on top."""
    found = combinations(projection)
    best = against_best(found)
    reaching = [each for each in found if each.factor >= REPORTED_FACTOR]
    most = max(found, key=lambda each: each.factor)
    most_of_best = max(best, key=lambda each: each.factor)
    reached = f"{len(reaching):,} of {len(found):,}" if reaching else f"none of {len(found):,}"
    return (
        f"Reported by the paper: {ROWS[0].tps:,} and {ROWS[1].tps:,} TPS, TPOT {ROWS[0].tpot_ms} "
        f"and {ROWS[1].tpot_ms} ms, {times(REPORTED_FACTOR)}. Of the combinations of assumptions "
        f"projected here, {reached} reach that factor (the most is {times(most.factor)}); against "
        f"the best baseline the most is {times(most_of_best.factor)}.",
    )


def judged(projection: Projection) -> tuple[Section, ...]:
    """The factor, the absolute numbers, and the paper's own table."""
    return (
        _factor(projection),
        _absolute(projection),
        Section(
            "The paper's table (reported, not projected)",
            ("Nothing here was measured, projected or checked.", reported_table()),
            leads=True,
        ),
    )


def _factor(projection: Projection) -> Section:
    found = combinations(projection)
    reaching = [each for each in found if each.factor >= REPORTED_FACTOR]
    in_bounds = [each for each in found if each.low <= REPORTED_FACTOR <= each.high]
    nearest = _nearest(found)
    best = against_best(found)
    best_nearest = _nearest(best)
    best_reaching = sum(each.factor >= REPORTED_FACTOR for each in best)
    best_in_bounds = sum(each.low <= REPORTED_FACTOR <= each.high for each in best)
    dimensions = " × ".join(
        f"{len({dict(each.assumed)[name] for each in found})} {plural}"
        for name, plural in (
            ("baseline", "baselines"),
            ("proposal", "proposals"),
            ("context", "contexts"),
            ("experts per token", "numbers of experts per token"),
            ("execution", "executions"),
            ("routing", "routings"),
        )
    )
    if reaching:
        shared = f"Those that reach it share: {_shared(reaching)}."
    else:
        shared = (
            f"None reaches it. The {_NUM_NEAREST} that come nearest share: "
            f"{_shared(sorted(found, key=lambda each: each.distance)[:_NUM_NEAREST])}."
        )
    return Section(
        f"Projected: where {times(REPORTED_FACTOR)} would come from",
        (
            f"{counted(len(found), 'combination')} ({dimensions}): {len(reaching):,} reach "
            f"{times(REPORTED_FACTOR)}, {len(in_bounds):,} could if errors of the two sides went "
            f"opposite ways as far as their bounds. {shared}",
            _table("The nearest", nearest[:_NUM_SHOWN]),
            f"Against the best baseline of the same conditions and context: {best_reaching:,} of "
            f"{len(best):,} reach it, {best_in_bounds:,} could within bounds.",
            _table("The nearest against the best baseline", best_nearest[:_NUM_SHOWN]),
        ),
    )


def _nearest(found: Iterable[Combination]) -> list[Combination]:
    """Nearest to the reported factor first; of those that differ in execution alone, one."""
    different: dict[tuple[object, ...], Combination] = {}
    for each in sorted(found, key=lambda each: each.distance):
        top_k, _, routing = each.baseline.conditions
        key = each.baseline.name, each.proposal.name, top_k, routing, each.below.context
        different.setdefault(key, each)
    return list(different.values())


def _table(title: str, rows: Sequence[Combination]) -> Table:
    return Table(
        title,
        (
            text("baseline"),
            text("proposal"),
            text("conditions"),
            number("context"),
            number("factor"),
            number("low–high"),
        ),
        tuple(
            (
                each.baseline.name,
                each.proposal.name,
                conditions_in_words(each.baseline.conditions),
                f"{each.below.context:,}",
                times(each.factor),
                f"{figures(each.low)}–{figures(each.high)}",
            )
            for each in rows
        ),
    )


def _shared(found: Sequence[Combination]) -> str:
    """What most of them assume alike."""
    words = []
    for place, (dimension, _) in enumerate(found[0].assumed):
        values = Counter(each.assumed[place][1] for each in found)
        value, count = values.most_common(1)[0]
        if count >= _SHARED * len(found):
            extent = "all" if count == len(found) else percent(count / len(found))
            words.append(f"{dimension} {value} ({extent})")
    return ", ".join(words) or "nothing that holds for four in five"


def _absolute(projection: Projection) -> Section:
    sentences = []
    for row, part in zip(ROWS, ("baseline", "proposal"), strict=True):
        sentences.append(_within(projection, row, part))
    sentences.append(_floor(projection))
    return Section("Projected: the reported numbers against the projection", tuple(sentences))


def _within(projection: Projection, reported: ReportedRow, part: str) -> str:
    select = baselines if part == "baseline" else proposals
    steps = [
        (row, decode_step(projection, row, context))
        for conditions in projection.conditions
        for row in select(projection.rows(conditions))
        for context in projection.contexts
    ]
    inside = [each for each in steps if each[1].tps.low <= reported.tps <= each[1].tps.high]
    row, step = min(steps, key=lambda each: abs(each[1].tps.value - reported.tps))
    top_row, top = max(steps, key=lambda each: each[1].tps.value)
    highest = max(each[1].tps.high for each in steps)
    return (
        f"{reported.name}, {reported.tps:,} TPS: within the bounds of {len(inside):,} of "
        f"{len(steps):,} projected {part} steps. The nearest is {row.name} at "
        f"{counted(step.context, 'token')} of context ({conditions_in_words(row.conditions)}): "
        f"{figures(step.tps.value)} TPS "
        f"({figures(step.tps.low)}–{figures(step.tps.high)}), {milliseconds(step.step_s.value)} "
        f"ms. The fastest is {top_row.name} at {top.context:,} "
        f"({conditions_in_words(top_row.conditions)}): {figures(top.tps.value)}; no bound is above "
        f"{figures(highest)}."
    )


def _floor(projection: Projection) -> str:
    """From which context on the reported TPOT is under the floor of its own layout."""
    rows = proposals(projection.usual(projection.top_ks[0]))
    row = min(rows, key=lambda each: decode_step(projection, each, projection.contexts[0]).floor_s)
    reported_s = ROWS[1].tpot_ms * 1e-3
    near, far = projection.contexts[0], projection.contexts[-1]
    least_s = decode_step(projection, row, near).floor_s
    most_s = decode_step(projection, row, far).floor_s
    head = (
        f"The floor of {row.name} is {milliseconds(least_s)} ms at {counted(near, 'token')} of "
        f"context and "
        f"{milliseconds(most_s)} ms at {far:,}, by bytes over bandwidth alone. The reported "
        f"{ROWS[1].tpot_ms} ms"
    )
    if reported_s < least_s:
        return f"{head} is under it everywhere."
    if reported_s >= most_s:
        return f"{head} is above it everywhere."
    limit = near + (far - near) * (reported_s - least_s) / (most_s - least_s)
    return (
        f"{head} is above it only up to {limit:,.0f} tokens of context: beyond, no kernel could "
        "be as fast, whatever is assumed."
    )
