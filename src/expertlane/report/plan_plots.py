"""Plots of a plan, and of a comparison against one."""

from collections.abc import Sequence
from dataclasses import replace

from expertlane.report.charts.bars import FASTER, Bar, throughput_chart
from expertlane.report.charts.pareto import Dot, Role, pareto_chart
from expertlane.report.compared import Comparison
from expertlane.report.document import Chart, Section
from expertlane.report.loads import device_of
from expertlane.report.numbers import figures, percent, times
from expertlane.report.planning import (
    asked_rate,
    explained,
    most_requests,
    named,
    serving,
    tpot,
)
from expertlane.report.speed import how_run
from expertlane.report.step_plots import PHASES, causes, fits, plot_section, timelines
from expertlane.results.estimate import Estimate
from expertlane.results.record import BEST, FAMILY, PARETO, TWO_POOLS, DeploymentRecord
from expertlane.results.results import Results

_POOLS = "disaggregated"


def plan(results: Results) -> tuple[Section, ...]:
    """Plots of a plan; all are projected."""
    rows = {f"{number} {named(each)}": each for number, each in explained(results)}
    steps = {
        phase: {name: step for name, each in rows.items() for step in each.steps_of(phase)}
        for phase in PHASES
    }
    words = "One step of each, at its own batch size, given below it."
    ranked, front = _ranked(results), _plan_front(results)
    return (
        Section("projected", (*([ranked] if ranked else ()), front), "first", "answer"),
        plot_section("Where the time goes", causes(steps)),
        plot_section("One step, rank by rank", timelines(words, steps)),
    )


def _ranked(results: Results) -> Chart | None:
    """Throughput of the best in their ranking; the recommended one is emphasised."""
    best, pools = results.select("projected", BEST), results.faster_pools
    num_tied = min(results.plans[0].num_tied, len(best))
    layouts = [str(each.layout) for each in best]
    names = [
        f"#{place} {layout if layouts.count(layout) == 1 else named(each)}"
        for place, (layout, each) in enumerate(zip(layouts, best, strict=True), 1)
    ]
    is_at_rate = asked_rate(results) is not None

    def most(record: DeploymentRecord) -> Estimate:
        return most_requests(results, record) if is_at_rate else serving(record).output_tps

    bars = [
        Bar(name, most(each), FASTER if each is best[0] and not pools else "other")
        for name, each in zip(names, best, strict=True)
    ]
    if pools is not None:
        bars.insert(0, Bar(_POOLS, most(pools), FASTER))
    what = "requests/s" if is_at_rate else "tokens/s"
    title = _lead(best, num_tied, what, has_pools=pools is not None)
    axis = "most requests/s" if is_at_rate else "output tokens/s"
    return throughput_chart(title, axis, bars, between="low–high", is_ranked=True)


def _lead(best: Sequence[DeploymentRecord], num_tied: int, what: str, *, has_pools: bool) -> str:
    """Title: how far ahead the best are.

    Args:
        what: ranking unit, `tokens/s` or `requests/s`.
    """
    over = best[num_tied].over_best if num_tied < len(best) else None
    said = (
        f"{what.capitalize()} of #1" if num_tied == 1 else f"#1 to #{num_tied} tie for most {what}"
    )
    if over is not None and num_tied == 1:
        said = f"#1 gives {percent(1 / over.value - 1)} more {what} than #2"
    elif over is not None:
        said += f"; #{num_tied + 1} is {percent(1 - over.value)} behind"
    return f"Disaggregated pools are ahead; of the others, {said}" if has_pools else said


def _plan_front(results: Results) -> Chart:
    """The front, the recommendation, and the best of each kind that is on neither."""
    device = device_of(results)
    best, *_ = results.select("projected", BEST)
    front, pools = results.select("projected", PARETO), results.faster_pools
    chosen = _planned(best, "chosen", f"#1 {best.layout}")
    known = {named(best), *map(named, front)}
    kinds = [(each, each.name) for each in results.select("projected", FAMILY)]
    if pools is None:
        kinds += [(each, _POOLS) for each in results.select("projected", TWO_POOLS)]
        first = [chosen]
    else:
        chosen, aggregated = _planned(pools, "chosen", _POOLS), replace(chosen, role="other")
        first = [chosen, aggregated]
    dots = [
        *first,
        *_front_dots(front, without=named(best)),
        *(_planned(each, "other", kind) for each, kind in kinds if named(each) not in known),
    ]
    return pareto_chart(
        f"What to use: {figures(chosen.device_tps)} tokens/s per {device}, "
        f"{figures(chosen.user_tps)} per user",
        dots,
        device=device,
        max_tpot_s=results.question.get("max_tpot_s"),
        note="No aggregated deployment is above and right of the front. It and the others, the "
        "best of their kinds, are screened, the best projected in full; lines: low to high.",
    )


def front_chart(
    results: Results, compared: Comparison, others: Sequence[Dot] = (), note: str = ""
) -> Chart:
    """The planner's front, the experiment's own deployments, and others if there are any."""
    front = results.select("projected", PARETO, compared.conditions)
    own = [
        Dot(
            row.name,
            row.step.round_s,
            row.step.tps / row.record.num_ranks,
            "other",
            fits(row.step),
            row.name if row in compared.cast else "",
        )
        for row in compared.rows
    ]
    best = max(front, key=lambda each: serving(each).output_tps.value, default=None)
    ahead = compared.fastest
    title = f"{ahead.name} decodes fastest of these deployments"
    if best is not None:
        factor = serving(best).output_tps.value / ahead.tps
        title += f"; the planner's best, {named(best)}, has {times(factor)} its throughput"
    return pareto_chart(
        title,
        [*_front_dots(front), *own, *others],
        note=f"Decode only, at {compared.context:,} tokens of context, "
        f"{how_run(compared.conditions)}. The front is screened. Others: the experiment's, "
        f"each with all {compared.num_seqs:,} sequences.{note}",
    )


def _planned(record: DeploymentRecord, role: Role, label: str = "") -> Dot:
    return Dot(
        named(record),
        tpot(record),
        serving(record).output_tps / record.num_ranks,
        role,
        f"concurrency {serving(record).num_running or 0:,}",
        label,
    )


def _front_dots(front: Sequence[DeploymentRecord], without: str = "") -> list[Dot]:
    """Dots of the front; each deployment's name only at the first of its points."""
    dots, seen = [], {without}
    for each in sorted(front, key=lambda each: -tpot(each).value):
        name = named(each)
        dots.append(_planned(each, "front", "" if name in seen else name))
        seen.add(name)
    return dots
