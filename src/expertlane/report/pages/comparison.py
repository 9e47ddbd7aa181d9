"""The plots of a comparison: what was measured, then what a cluster model says of the same."""

from expertlane.report.charts.bars import Bar, causes_chart, speed_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.fan_out import fan_out_chart
from expertlane.report.charts.squares import load_chart, traffic_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.comparison import Comparison, Row, compare
from expertlane.report.document import Chart, PageSection, Tabs, Timelines
from expertlane.report.numbers import milliseconds
from expertlane.report.pages import projection as projected
from expertlane.report.verdict import verdict
from expertlane.results.schema import DeploymentResult, Machine, Results
from expertlane.spec.names import Phase, Traffic

_US_PER_S = 1e6
_UNTYPICAL = 0.25  # of the usual time


def headline(results: Results) -> str:
    """The verdict in a sentence."""
    if results.machine is None:
        assert results.projection is not None, "one of both is there"
        return projected.headline(results.projection)
    return verdict(compare(results), results.machine)[0]


def sections(results: Results) -> tuple[PageSection, ...]:
    """All plots, those of what was measured first."""
    of_measured = _measured(results, results.machine) if results.machine is not None else ()
    of_projected = projected.sections(results) if results.projection is not None else ()
    return (*of_measured, *of_projected)


def _measured(results: Results, machine: Machine) -> tuple[PageSection, ...]:
    comparison = compare(results)
    parts = (
        PageSection("Speed, measured", _speed(comparison)),
        PageSection("Where the time goes, measured", (*_why(comparison), *_causes(results))),
        PageSection("One step, rank by rank, measured", _timelines(results, comparison)),
        PageSection("Experts and traffic, measured", _squares(results, machine)),
        PageSection("Scaling, measured", _scaling(results)),
    )
    return tuple(part for part in parts if part.parts)


def _named(results: Results) -> dict[str, DeploymentResult]:
    """With the number that tables have, so that names cut short can be told apart."""
    return {f"#{place} {each.name}": each for place, each in enumerate(results.deployments, 1)}


def _speed(comparison: Comparison) -> tuple[Chart, ...]:
    bars = [
        Bar(
            f"#{row.number} {row.deployment.name}",
            row.phase.tps,
            row.deployment.is_baseline,
            min(row.phase.tps_of_runs) if len(row.phase.tps_of_runs) > 1 else None,
            max(row.phase.tps_of_runs) if len(row.phase.tps_of_runs) > 1 else None,
        )
        for row in comparison.rows
    ]
    unit = f"{comparison.phase} tokens/s"
    title = f"{comparison.phase} tokens a second".capitalize()
    return (speed_chart(title, unit, bars, between="slowest–fastest run"),)


def _why(comparison: Comparison) -> tuple[str, ...]:
    """What takes most of the time, of those that the verdict speaks of."""
    return tuple(
        dict.fromkeys(
            f"The largest part of {row.deployment.name} is {row.deployment.bottleneck.sentence}."
            for row in _cast(comparison)
        )
    )


def _cast(comparison: Comparison) -> list[Row]:
    """The first, the best baseline and the best proposal."""
    cast = (comparison.rows[0], comparison.best_baseline, comparison.best_proposal)
    return [row for row in cast if row is not None]


def _causes(results: Results) -> tuple[Tabs, ...]:
    charts = []
    for phase in (Phase.DECODE, Phase.PREFILL):
        seconds = {
            name: {str(cause): s for cause, s in each.breakdown_s[phase].items()}
            for name, each in _named(results).items()
            if phase in each.breakdown_s
        }
        if seconds:
            unit = "every sequence one token on" if phase is Phase.DECODE else "the whole prefill"
            note = f"Mean over ranks of a round: {unit}."
            title = f"Time of {phase} by cause"
            charts.append((str(phase), causes_chart(title, seconds, note=note)))
    return (Tabs("Time by cause", tuple(charts)),)


def _timelines(results: Results, comparison: Comparison) -> tuple[Timelines | str, ...]:
    first = {f"#{row.number} {row.deployment.name}" for row in _cast(comparison)}
    parts: list[Timelines | str] = []
    for phase in (Phase.DECODE, Phase.PREFILL):
        of_phase = {name: each for name, each in _named(results).items() if phase in each.timelines}
        if of_phase:
            parts.append(
                timelines_chart(
                    f"One {phase} step",
                    {name: each.timelines[phase] for name, each in of_phase.items()},
                    first,
                    notes={name: _typical(each, phase) for name, each in of_phase.items()},
                    is_measured=True,
                )
            )
    if parts:
        parts.insert(
            0,
            "A step of each deployment from a short run of its own, all on the same time axis. "
            "Upper half of a row: what the rank computes; lower half: what it waits for. Gaps are "
            "idle.",
        )
    return tuple(parts)


def _typical(deployment: DeploymentResult, phase: Phase) -> str:
    """How the step that is drawn compares with those that were measured."""
    step = deployment.timelines[phase]
    measured = deployment.prefill if phase is Phase.PREFILL else deployment.decode
    if measured is None:
        return ""
    is_round = deployment.options.micro_batch_schedule == "rotating"
    usual_s = measured.round_s if is_round and phase is Phase.DECODE else measured.step_s
    own_s = step.end_us / _US_PER_S
    what = "a mean round" if is_round and phase is Phase.DECODE else "the median step"
    words = f"It took {milliseconds(own_s)} ms; {what} of the run {milliseconds(usual_s)} ms."
    if abs(own_s / usual_s - 1) > _UNTYPICAL:
        words += " So it is not typical: look at its shape, not at its length."
    return words


def _squares(results: Results, machine: Machine) -> tuple[Tabs | Chart, ...]:
    parts: list[Tabs | Chart] = _loads(results)
    for phase in (Phase.DECODE, Phase.PREFILL):
        of_phase = {
            name: each.traffic[phase]
            for name, each in _named(results).items()
            if phase in each.traffic
        }
        matrices = [
            (
                name,
                traffic_chart(name, seen.sent_bytes[Traffic.PAYLOAD.label], machine.ranks_per_node),
            )
            for name, seen in of_phase.items()
        ]
        drawn = tuple((name, chart) for name, chart in matrices if chart is not None)
        if drawn:
            parts.append(Tabs(f"Who sends to whom in {phase}", drawn))
        tokens = {
            name: seen.fan_out.tokens_by_ranks_reached
            for name, seen in of_phase.items()
            if seen.fan_out is not None
        }
        fan_out = fan_out_chart(f"Ranks that a token reaches in {phase}", tokens)
        if fan_out is not None:
            parts.append(fan_out)
    return tuple(parts)


def _loads(results: Results) -> list[Tabs | Chart]:
    """One plot where all had the same; none without experts."""
    loads = {name: each.expert_load.num_tokens_per_expert for name, each in _named(results).items()}
    title = "Load of the experts"
    if len(set(loads.values())) == 1:
        also = ", the same in all deployments" if len(loads) > 1 else ""
        charts = [("", load_chart(f"{title}{also}", next(iter(loads.values()))))]
    else:
        charts = [(name, load_chart(name, load)) for name, load in loads.items()]
    drawn = tuple((name, chart) for name, chart in charts if chart is not None)
    if len(drawn) > 1:
        return [Tabs(title, drawn)]
    return [chart for _, chart in drawn]


def _scaling(results: Results) -> tuple[Chart, ...]:
    if not results.scaling:
        return ()
    wall = [Point(each.num_ranks, each.tps_per_rank, words=each.name) for each in results.scaling]
    critical = [
        Point(each.num_ranks, each.critical_path_tps_per_rank, words=each.name)
        for each in results.scaling
    ]
    curves = [
        Curve("wall time", tuple(wall)),
        Curve("critical-path CPU time", tuple(critical)),
    ]
    return (
        curves_chart(
            "Decode tokens a second and rank, by the number of ranks",
            Axis("ranks", "log"),
            Axis("tokens/s a rank"),
            curves,
            note="Linear scaling is a level line. Critical-path CPU time is what one core a rank "
            "would take, transfers left out.",
        ),
    )
