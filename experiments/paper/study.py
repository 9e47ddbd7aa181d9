"""The paper's claims, held against results of its own deployments.

    expertlane compare paper-small
    python experiments/paper/study.py results/paper-small

    expertlane compare paper --project --experts-per-token 2,1
    python experiments/paper/study.py results/paper-top2 results/paper-top1 --out results/study

Judges the paper's four design goals, and, where the model is the paper's own, what would have to
be true for its reported numbers. Reads kept results and runs nothing. Measured, projected and
reported numbers never share a table.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertlane.errors import UserError
from expertlane.report import html, markdown
from expertlane.report.charts.pareto import Dot
from expertlane.report.compared import (
    Comparison,
    OverlapPair,
    Row,
    experts_at_once,
    experts_per_rank,
    part_of_expert,
    projected,
    run,
    scaling,
    stages_at_once,
    weight_bytes_of_rank,
)
from expertlane.report.document import Answer, Column, Report, Section, Table, number, text
from expertlane.report.numbers import (
    bytes_si,
    counted,
    figures,
    low_high,
    milliseconds,
    percent,
    span,
    times,
    whole,
    with_bounds,
)
from expertlane.report.plots import front_chart
from expertlane.report.scaling import sizes_sentence
from expertlane.report.speed import NAMED, communication_share, in_words, unit_of
from expertlane.results.estimate import Estimate
from expertlane.results.file import read
from expertlane.results.results import Results
from expertlane.spec.files import write_text
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

LAYOUTS = (Layout(tp=8, pp=2), Layout(dp=16, ep=16))
NUM_GPUS = 16
HARDWARE = f"{NUM_GPUS} NVIDIA H100 in two nodes of 8, FP16, 1024 sequences of 10,000 tokens"
# Of a model, the sizes that the paper gives; it does not give the number of experts of a token.
SIZES = (
    "num_hidden_layers",
    "num_experts",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "moe_intermediate_size",
    "gated_mlp",
)
NUM_SHOWN = 6
NUM_NEAREST = 20
SHARED = 0.8  # of combinations, from where on what they assume alike is named


@dataclass(frozen=True)
class Reported:
    """One deployment as the paper reports it."""

    name: str
    tps: float
    tpot_ms: float


BASELINE = Reported("baseline: TP=8, PP=2", 120_000, 8.3)
PROPOSED = Reported("proposed: EP=16", 450_000, 2.2)
FACTOR = PROPOSED.tps / BASELINE.tps


def study_of(results: Sequence[Results]) -> Report:
    """Everything; of several results, each with its goals, and the projections judged together.

    Raises:
        UserError: one of them has not the paper's two layouts.
    """
    sections: list[Section] = []
    projections = []
    for each in results:
        missing = set(LAYOUTS) - {record.layout for record in each.deployments}
        if each.kind != "comparison" or missing:
            raise UserError(f"not the paper's experiment: {each.command}")
        compared = (run(each, "measured"), projected(each))
        sections += [goals(each, comparison) for comparison in compared if comparison]
        if each.conditions and is_papers_model(each):
            projections.append(each)
    if projections:
        found = combinations(projections)
        sections += [factor(found), absolute(projections), *fronts(projections)]
    else:
        sections.append(Section("The reported numbers", (NOT_HELD,), "top"))
    sections.append(reported())
    headline = verdict(found) if projections else str(sections[0].parts[0])
    first = results[0]
    return Report(
        "The paper's claims, held against results", Answer("The paper's claims", headline),
        "judged", first.command, first.created, tuple(sections),
    )  # fmt: skip


NOT_HELD = (
    "The paper's numbers are of another model or machine; only a projection of its own model on "
    "its cluster is held against them: expertlane compare paper --project."
)


def is_papers_model(results: Results) -> bool:
    """Whether it has all the sizes that the paper gives."""
    model = results.question["experiment"]["model"]
    return all(model.get(name) == getattr(PRESETS["paper"], name) for name in SIZES)


def numbers(rows: Iterable[Row]) -> str:
    """`#3, #4`."""
    return ", ".join(f"#{row.number}" for row in rows) or "no deployment"


# The four design goals.


def goals(results: Results, comparison: Comparison) -> Section:
    """Each judged in a sentence, then the evidence for every deployment."""
    rows, source = comparison.rows, comparison.source
    unit = unit_of(source)
    most = max(experts_at_once(row.record) for row in rows)
    least = min(map(weight_bytes_of_rank, rows))
    leaders = numbers(row for row in rows if experts_at_once(row.record) == most)
    alone = numbers(row for row in rows if experts_per_rank(row.record) == {1})
    readers = numbers(row for row in rows if weight_bytes_of_rank(row) < 1.01 * least)
    contention = f"fewest weights read by a {unit} in a step: {bytes_si(least)}, with {readers}"
    if source == "measured":
        contention = f"one expert of a layer to a rank: {alone}; {contention}"
    sizes = scaling(results, source)
    growing = "no layouts of growing ep" if not sizes else sizes_sentence(sizes, unit)
    overlap = " ".join(map(hidden, comparison.overlapped))
    evidence: tuple[Column[Row], ...] = (
        *NAMED,
        number("experts at once, of a layer", lambda row: experts_at_once(row.record)),
        number("stages at once", lambda row: stages_at_once(row.record)),
        number("experts per rank", lambda row: experts_per_rank(row.record), span, "measured"),
        number("part of each", lambda row: part_of_expert(row.record)),
        number(f"weights read by a {unit}", weight_bytes_of_rank, bytes_si),
        number(
            "transfers, waiting", lambda row: communication_share(row.step), percent, "measured"
        ),
        number(f"TPS per {unit}", lambda row: row.tps_per_rank, figures),
    )
    where = results.projected_for.name if source == "projected" else "this machine"
    return Section(
        f"The four design goals, {source} ({where}{_at(comparison)})",
        (
            f"Goal 1, most expert-level parallelism: by layout {most} experts of a layer compute "
            f"at once with {leaders}.",
            f"Goal 2, no contention inside a {unit}: {contention}.",
            "Goal 3, communication overlapped with computation: "
            + (overlap or "no two deployments differ in overlap alone."),
            f"Goal 4, scaling: {growing}",
            Table.of("", evidence, rows, source),
        ),
        "top",
    )


def _at(comparison: Comparison) -> str:
    if comparison.context is None:
        return ""
    return f", {in_words(comparison.conditions)}, {comparison.context:,} tokens of context"


def hidden(pair: OverlapPair) -> str:
    """What overlap hides between two deployments, in a sentence."""
    steps = (
        f"#{pair.off.number} takes {milliseconds(pair.off.step.round_s)} ms per step without it, "
        f"#{pair.on.number} {milliseconds(pair.on.step.round_s)} ms with it; "
        f"{milliseconds(pair.exposed_s)} ms are exposed without it."
    )
    if pair.hidden is None:
        return f"Nothing to hide: {steps}"
    if pair.gained_s < 0:
        return f"Overlap costs {milliseconds(-pair.gained_s)} ms: {steps}"
    return f"Overlap hides {percent(pair.hidden)}: {steps}"


# What would have to be true for the reported numbers.


@dataclass(frozen=True)
class Combination:
    """A proposal against a baseline under the same conditions and at the same context."""

    comparison: Comparison
    baseline: Row
    proposal: Row
    context: int

    @property
    def factor(self) -> Estimate:
        """Low: if all errors were against the proposal; high: if all were for it."""
        above, below = (
            self.comparison.at(row, self.context).tps.bounds
            for row in (self.proposal, self.baseline)
        )
        return Estimate(above[1] / below[1], above[0] / below[2], above[2] / below[0])

    @property
    def distance(self) -> float:
        """From the reported factor."""
        return abs(self.factor.value - FACTOR)

    @property
    def reaches(self) -> bool:
        """As it is likely."""
        return self.factor.value >= FACTOR

    @property
    def could(self) -> bool:
        """Within the bounds of both."""
        low, _, high = self.factor.bounds
        return low <= FACTOR <= high

    @property
    def assumed(self) -> dict[str, str]:
        """What it takes for granted, by dimension."""
        top_k, execution, routing = in_words(self.comparison.conditions).split(", ")
        return {
            "baseline": self.baseline.name,
            "proposal": self.proposal.name,
            "context": f"{self.context:,}",
            "top-k": top_k,
            "execution": execution,
            "routing": routing,
        }


def under_all_conditions(projections: Iterable[Results]) -> Iterator[Comparison]:
    """Of each projection."""
    for results in projections:
        for conditions in results.conditions:
            comparison = projected(results, conditions)
            if comparison is not None:
                yield comparison


def combinations(projections: Iterable[Results]) -> list[Combination]:
    """Every baseline × proposal × context × conditions."""
    return [
        Combination(comparison, baseline, proposal, context)
        for comparison in under_all_conditions(projections)
        for baseline in comparison.baselines
        for proposal in comparison.proposals
        for context in comparison.contexts
    ]


def against_best(found: Iterable[Combination]) -> list[Combination]:
    """Of each proposal, context and conditions the one with the fastest baseline."""
    best: dict[tuple[object, ...], Combination] = {}
    for each in found:
        key = each.comparison.conditions, each.proposal.name, each.context
        if key not in best or each.factor.value < best[key].factor.value:
            best[key] = each
    return list(best.values())


def verdict(found: Sequence[Combination]) -> str:
    """The few sentences on top."""
    num_reaching = sum(each.reaches for each in found)
    most, most_of_best = (
        max(each.factor.value for each in some) for some in (found, against_best(found))
    )
    return (
        f"Reported by the paper: {BASELINE.tps:,} and {PROPOSED.tps:,} TPS, TPOT "
        f"{BASELINE.tpot_ms} and {PROPOSED.tpot_ms} ms, {times(FACTOR)}. Of the combinations of "
        f"assumptions projected here, {num_reaching or 'none'} of {len(found):,} reach that factor "
        f"(the most is {times(most)}); against the best baseline the most is {times(most_of_best)}."
    )


def factor(found: Sequence[Combination]) -> Section:
    """Where the reported factor would come from."""
    best = against_best(found)
    nearest = sorted(found, key=lambda each: each.distance)
    reaching = [each for each in found if each.reaches]
    dimensions = " × ".join(
        f"{counted(len({each.assumed[name] for each in found}), name)}" for name in found[0].assumed
    )
    shared = (
        f"Those that reach it share: {alike(reaching)}."
        if reaching
        else f"None reaches it. The {NUM_NEAREST} that come nearest share: "
        f"{alike(nearest[:NUM_NEAREST])}."
    )
    return Section(
        f"Projected: where {times(FACTOR)} would come from",
        (
            verdict(found),
            f"{counted(len(found), 'combination')} ({dimensions}): {len(reaching):,} reach "
            f"{times(FACTOR)}, {sum(each.could for each in found):,} could if errors of the two "
            f"sides went opposite ways as far as their bounds. {shared}",
            _table("The nearest", found),
            "Against the best baseline of the same conditions and context: "
            f"{sum(each.reaches for each in best):,} of {len(best):,} reach it, "
            f"{sum(each.could for each in best):,} could within bounds.",
            _table("The nearest against the best baseline", best),
        ),
        "top",
    )


def _table(title: str, found: Iterable[Combination]) -> Table:
    """The nearest to the reported factor; of those that differ in execution alone, one."""
    different: dict[tuple[str, ...], Combination] = {}
    for each in sorted(found, key=lambda each: each.distance):
        key = tuple(value for name, value in each.assumed.items() if name != "execution")
        different.setdefault(key, each)
    columns: tuple[Column[Combination], ...] = (
        text("baseline", lambda each: each.baseline.name),
        text("proposal", lambda each: each.proposal.name),
        text("conditions", lambda each: in_words(each.comparison.conditions)),
        number("context", lambda each: each.context, whole),
        number("factor", lambda each: each.factor.value, times),
        number("low–high", lambda each: each.factor, low_high),
    )
    return Table.of(title, columns, list(different.values())[:NUM_SHOWN])


def alike(found: Sequence[Combination]) -> str:
    """What most of them assume alike."""
    words = []
    for name in found[0].assumed:
        value, count = Counter(each.assumed[name] for each in found).most_common(1)[0]
        if count >= SHARED * len(found):
            extent = "all" if count == len(found) else percent(count / len(found))
            words.append(f"{name} {value} ({extent})")
    return ", ".join(words) or "nothing that holds for four in five"


def absolute(projections: Sequence[Results]) -> Section:
    """Both reported numbers against all projected steps."""
    return Section(
        "Projected: the reported numbers against the projection",
        (
            within(projections, BASELINE, "baseline"),
            within(projections, PROPOSED, "proposal"),
            floor(projections[0]),
        ),
        "top",
    )


def within(projections: Iterable[Results], claim: Reported, part: str) -> str:
    """In how many steps' bounds a reported number lies, and which comes nearest."""
    steps = [
        (f"{row.name} at {context:,} ({in_words(each.conditions)})", each.at(row, context))
        for each in under_all_conditions(projections)
        for row in (each.baselines if part == "baseline" else each.proposals)
        for context in each.contexts
    ]
    bounds = [step.tps.bounds for _, step in steps]
    num_inside = sum(low <= claim.tps <= high for low, _, high in bounds)
    name, step = min(steps, key=lambda each: abs(each[1].tps.value - claim.tps))
    top_name, top = max(steps, key=lambda each: each[1].tps.value)
    return (
        f"{claim.name}, {claim.tps:,} TPS: within the bounds of {num_inside:,} of "
        f"{len(steps):,} projected {part} steps. The nearest is {name}: {with_bounds(step.tps)} "
        f"TPS, {milliseconds(step.round_s)} ms. The fastest is {top_name}: {figures(top.tps)}; no "
        f"bound is above {figures(max(high for _, _, high in bounds))}."
    )


def floor(results: Results) -> str:
    """From which context on the reported TPOT is under the floor of its own layout."""
    comparison = projected(results)
    assert comparison is not None, "the caller looked"
    near, far = comparison.contexts[0], comparison.contexts[-1]

    def floor_s(row: Row, context: int) -> float:
        return comparison.at(row, context).floor_s or 0.0

    row = min(comparison.proposals, key=lambda row: floor_s(row, near))
    claim_s, least_s, most_s = PROPOSED.tpot_ms * 1e-3, floor_s(row, near), floor_s(row, far)
    head = (
        f"The floor of {row.name} is {milliseconds(least_s)} ms at {counted(near, 'token')} of "
        f"context and {milliseconds(most_s)} ms at {far:,}, by bytes over bandwidth alone. The "
        f"reported {PROPOSED.tpot_ms} ms"
    )
    if claim_s < least_s:
        return f"{head} is under it everywhere."
    if claim_s >= most_s:
        return f"{head} is above it everywhere."
    limit = near + (far - near) * (claim_s - least_s) / (most_s - least_s)
    return (
        f"{head} is above it only up to {limit:,.0f} tokens of context: beyond, no kernel could "
        "be as fast, whatever is assumed."
    )


def fronts(projections: Iterable[Results]) -> Iterator[Section]:
    """Throughput against latency, the reported points among them with marks of their own."""
    points = [
        Dot(
            f"reported by the paper: {claim.name}",
            Estimate(claim.tpot_ms / 1e3),
            Estimate(claim.tps / NUM_GPUS),
            "reported",
            "unchecked",
            f"reported, {claim.name}",
        )
        for claim in (BASELINE, PROPOSED)
    ]
    note = f" Stars: as the paper reports for {HARDWARE}; neither projected nor checked."
    for results in projections:
        comparison = projected(results)
        if comparison is not None:
            chart = front_chart(results, comparison, points, note)
            heading = f"Throughput against latency, projected ({in_words(comparison.conditions)})"
            yield Section(heading, (chart,), "plots")


def reported() -> Section:
    """The paper's own table, labelled as such."""
    columns: tuple[Column[Reported], ...] = (
        text("deployment", lambda claim: claim.name),
        text("source", lambda _: "reported"),
        number("TPS", lambda claim: claim.tps, figures),
        number("TPOT ms", lambda claim: claim.tpot_ms, "{:.1f}".format),
        number("throughput", lambda claim: claim.tps / BASELINE.tps, times),
        number("latency", lambda claim: BASELINE.tpot_ms / claim.tpot_ms, times),
    )
    return Section(
        "The paper's table (reported, other hardware)",
        (
            f"Reported by the paper for {HARDWARE}; nothing here was measured, projected or "
            "checked.",
            Table.of("", columns, (BASELINE, PROPOSED)),
        ),
        "top",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the study as Markdown, or write it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", nargs="+", type=Path, help="results.json, or its folder")
    parser.add_argument("--out", type=Path, help="folder for study.md and study.html")
    options = parser.parse_args(arguments)
    try:
        study = study_of([read(path, "comparison") for path in options.results])
        if options.out is None:
            print(markdown.render(study), end="")
        else:
            for name, render in (("study.md", markdown.render), ("study.html", html.render)):
                print(write_text(options.out / name, render(study)))
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
