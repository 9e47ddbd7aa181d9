"""The plots of a plan."""

from typing import Literal

from expertlane.report.charts.bars import Bar, causes_chart, speed_chart
from expertlane.report.charts.curves import Axis, Curve, curves_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.document import Chart, PageSection, Tabs, Timelines
from expertlane.report.pages.projection import point, step_seconds
from expertlane.report.plan import named, verdict
from expertlane.results.plan import PlannedDeployment, PlanResults
from expertlane.spec.names import Phase

_MS_PER_S = 1e3
_NUM_EXPLAINED = 3


def headline(plan: PlanResults) -> str:
    """What to run, in a sentence."""
    return verdict(plan)[0]


def sections(plan: PlanResults) -> tuple[PageSection, ...]:
    """All plots; everything is projected."""
    parts = (
        PageSection("Throughput against latency, projected", (_pareto(plan),)),
        PageSection("The best deployments, projected", (_speed(plan),)),
        PageSection("Where the time goes, projected", _causes(plan)),
        PageSection("One step, rank by rank, projected", _timelines(plan)),
    )
    return tuple(part for part in parts if part.parts)


def _closer(plan: PlanResults) -> dict[str, PlannedDeployment]:
    """The first few, and the paper's."""
    rows = {f"#{place} {named(each)}": each for place, each in enumerate(plan.best, 1)}
    first = dict(list(rows.items())[:_NUM_EXPLAINED])
    return first | {f"{name}, {named(each)}": each for name, each in plan.papers.items()}


def _pareto(plan: PlanResults) -> Chart:
    def at(each: PlannedDeployment, words: str, role: Literal["front", "back"] = "front") -> Curve:
        where = point(
            _MS_PER_S * each.tpot_s.value,
            each.tps,
            words=f"{named(each)}, {each.num_sequences:,} at once",
        )
        return Curve(words, (where,), is_joined=False, role=role)

    front = tuple(
        point(
            _MS_PER_S * each.tpot_s.value,
            each.tps,
            words=f"{named(each)}, {each.num_sequences:,} at once",
        )
        for each in plan.pareto
    )
    curves = [
        Curve("front", front),
        at(plan.best[0], "the best within the limits"),
        *(at(each, f"best of: {family}", "back") for family, each in plan.families.items()),
        *(at(each, name) for name, each in plan.papers.items()),
    ]
    return curves_chart(
        "Tokens a second against TPOT",
        Axis("TPOT, ms", "log"),
        Axis("output tokens/s", "log"),
        curves,
        note="No deployment of one pool is above and left of the front. The front and the best of "
        "each kind are screened, the others projected in full.",
    )


def _speed(plan: PlanResults) -> Chart:
    bars = [
        Bar(f"#{place} {named(each)}", each.tps.value, False, each.tps.low, each.tps.high)
        for place, each in enumerate(plan.best, 1)
    ]
    bars += [
        Bar(f"{name}, {named(each)}", each.tps.value, True, each.tps.low, each.tps.high)
        for name, each in plan.papers.items()
    ]
    return speed_chart(
        "Output tokens a second",
        "output tokens/s",
        bars,
        between="low–high",
        kinds=("the paper's", "the planner's"),
    )


def _causes(plan: PlanResults) -> tuple[Tabs, ...]:
    rows = _closer(plan)
    steps = {
        "decode": {name: each.decode for name, each in rows.items()},
        "prefill": {name: each.prefill for name, each in rows.items()},
    }
    charts = tuple(
        (
            phase,
            causes_chart(
                f"Time of a {phase} step by cause",
                {name: step_seconds(step) for name, step in of_phase.items() if step is not None},
                note="Likely values, mean over GPUs.",
            ),
        )
        for phase, of_phase in steps.items()
        if any(of_phase.values())
    )
    return (Tabs("Time by cause", charts),)


def _timelines(plan: PlanResults) -> tuple[Timelines | str, ...]:
    rows = _closer(plan)
    first = [name for place, name in enumerate(rows) if not place or place >= _NUM_EXPLAINED]
    first = first if plan.papers else []
    by_phase = {
        phase: {
            name: each.timelines[phase] for name, each in rows.items() if phase in each.timelines
        }
        for phase in (Phase.DECODE, Phase.PREFILL)
    }
    words = (
        "A step of each at its own number of sequences or prompts, written under it. Upper half of "
        "a row: what the GPU computes; lower half: its transfers. Gaps are idle."
    )
    groups = [
        timelines_chart(f"One {phase} step", steps, first)
        for phase, steps in by_phase.items()
        if steps
    ]
    return (words, *groups) if groups else ()
