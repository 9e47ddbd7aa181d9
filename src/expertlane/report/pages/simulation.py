"""The plots of a simulated deployment."""

from expertlane.report.charts.bars import causes_chart
from expertlane.report.charts.fan_out import fan_out_chart
from expertlane.report.charts.squares import load_chart, traffic_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.document import Chart, PageSection, Tabs
from expertlane.report.numbers import figures, milliseconds, percent
from expertlane.report.simulation import phases_of
from expertlane.results.simulation import Simulation


def headline(simulation: Simulation) -> str:
    """What users would feel, and what limits it."""
    service = simulation.service
    tpot = (
        "" if service.tpot_s is None else f"TPOT {milliseconds(service.tpot_s.median.value)} ms, "
    )
    main = max(phases_of(simulation), key=lambda named: named[1].seconds.value)
    cause, share = main[1].largest
    return (
        f"{figures(service.output_tps.value)} output tokens/s, {tpot}"
        f"TTFT {milliseconds(service.ttft_s.median.value)} ms (medians); most of the time is "
        f"{main[0]}, limited by {cause} ({percent(share)} of it)."
    )


def sections(simulation: Simulation) -> tuple[PageSection, ...]:
    """All plots."""
    phases = phases_of(simulation)
    seconds = {
        name: {cause: share * phase.step_s.mean.value for cause, share in phase.shares.items()}
        for name, phase in phases
    }
    causes = causes_chart("Time of a mean step by cause", seconds, note="Mean over ranks.")
    timelines = [
        timelines_chart(f"The largest {name} step", {name: phase.timeline}, (name,))
        for name, phase in phases
        if phase.timeline is not None
    ]
    words = (
        "A step by itself. Upper half of a row: what the rank computes; lower half: its transfers. "
        "Gaps are idle."
    )
    parts = (
        PageSection("Where the time goes, projected", (causes,)),
        PageSection("One step, rank by rank, projected", (words, *timelines) if timelines else ()),
        PageSection("Experts and traffic, projected", _squares(simulation)),
    )
    return tuple(part for part in parts if part.parts)


def _squares(simulation: Simulation) -> tuple[Chart | Tabs, ...]:
    parts: list[Chart | Tabs] = []
    load = load_chart("Load of the experts", simulation.num_tokens_per_expert)
    if load is not None:
        parts.append(load)
    phases = phases_of(simulation)
    matrices = [
        (name, traffic_chart(f"A {name} step", phase.sent_bytes, simulation.cluster.ranks_per_node))
        for name, phase in phases
    ]
    drawn = tuple((name, chart) for name, chart in matrices if chart is not None)
    if drawn:
        parts.append(Tabs("Who sends to whom in the largest step", drawn))
    fan_out = fan_out_chart(
        "Ranks that a token reaches",
        {name: phase.tokens_by_ranks_reached for name, phase in phases},
    )
    return (*parts, *([] if fan_out is None else [fan_out]))
