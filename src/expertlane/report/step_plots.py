"""Plots of steps, of any comparison: causes, ranks, experts, traffic."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from expertlane.report.charts.bars import causes_chart
from expertlane.report.charts.load import alike, load_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.charts.traffic import fan_out_chart, traffic_charts
from expertlane.report.compared import Comparison
from expertlane.report.document import ChapterName, Chart, Plot, Section, Words
from expertlane.report.numbers import likely, milliseconds
from expertlane.report.verdict import spoken_of
from expertlane.results.record import StepsRecord
from expertlane.results.results import Results
from expertlane.spec.names import Phase, Traffic

PHASES = (Phase.DECODE, Phase.PREFILL)
_US_PER_S = 1e6
_UNTYPICAL = 0.25  # share of the usual time by which an untypical step differs
Named = Mapping[str, StepsRecord]


def plot_section(
    heading: str, parts: Iterable[Words | Plot], chapter: ChapterName = "why"
) -> Section:
    """A section among the plots."""
    return Section(heading, tuple(parts), "plots", chapter)


def causes(steps: Mapping[Phase, Named]) -> list[Chart]:
    """A plot a phase of the steps' time by cause."""
    charts = [
        causes_chart(
            of_phase,
            f"{phase} step",
            note="ms per step, mean over ranks. Reads: operations bound by memory.",
        )
        for phase, of_phase in steps.items()
        if of_phase
    ]
    return [chart for chart in charts if chart is not None]


def timelines(
    words: str,
    steps: Mapping[Phase, Named],
    title: str = "The {} step, rank by rank",
    notes: Callable[[Phase, str], str] = lambda phase, name: "",
    *,
    is_measured: bool = False,
    shares_cores: bool = False,
) -> list[Words | Plot]:
    """A group of timelines a phase; arguments as in `timelines_chart`."""
    drawn: list[Words | Plot] = []
    for phase, of_phase in steps.items():
        found = {
            name: (step.timeline, notes(phase, name))
            for name, step in of_phase.items()
            if step.timeline
        }
        if found:
            drawn.append(
                timelines_chart(
                    title.format(phase),
                    found,
                    is_measured=is_measured,
                    shares_cores=shares_cores,
                )
            )
    said = (
        f"{words} Each row is a rank; all share one time axis, and what is shorter than a "
        "thousandth of it merges with its neighbours. Idle: a rank has no work."
    )
    return [said, *drawn] if drawn else []


def by_rank(
    results: Results, compared: Comparison, steps: Mapping[Phase, Named]
) -> list[Words | Plot]:
    """Timelines of the deployments that sentences are about; the others' are in the trace."""
    cast = [row.label for row in spoken_of(compared, results)]
    of_cast = {
        phase: {name: step for name, step in of_phase.items() if name in cast}
        for phase, of_phase in steps.items()
    }
    if compared.source == "projected":
        words = (
            "One steady-state step of each deployment. With rotating micro-batches one step of "
            "each is drawn; it overlaps its neighbours."
        )
        return timelines(words, of_cast)
    rows = {row.label: row for row in compared.rows}

    def typical(phase: Phase, name: str) -> str:
        """A note on the drawn step against the measured ones."""
        step, options = steps[phase][name], rows[name].record.known_options
        assert step.timeline is not None, "it is drawn"
        is_round = options.micro_batch_schedule == "rotating" and phase is Phase.DECODE
        median = step.step_s.median if step.step_s else None
        usual_s = likely(step.round_s if is_round or median is None else median)
        own_s = step.timeline.end_us / _US_PER_S
        what = "the mean step" if is_round else "the median step"
        words = f"It took {milliseconds(own_s)} ms; {what} of the run {milliseconds(usual_s)} ms."
        if abs(own_s / usual_s - 1) > _UNTYPICAL:
            words += " Not typical: read its shape, not its length."
        return words

    is_wall = compared.source == "measured"
    shares_cores = is_wall and results.measured_on.is_oversubscribed
    words = "The step nearest to the median, of a short run of its own."
    if shares_cores:
        words += (
            " Descheduled: a rank had work, but other ranks had the cores; its length is measured, "
            "and drawn at the end of a stretch."
        )
    return timelines(
        words,
        of_cast,
        "The median {} step, rank by rank",
        typical,
        is_measured=is_wall,
        shares_cores=shares_cores,
    )


_Loads = Mapping[str, Sequence[Sequence[int]]]


def experts_and_traffic(
    loads: _Loads, steps: Mapping[Phase, Named], per_node: int, of_what: str = "all steps"
) -> list[Words | Plot]:
    """Load of the experts, traffic between ranks, and fan-out of tokens, each distinct one once."""
    groups = alike(loads)
    if len(groups) == 1 and len(loads) > 1:
        groups = [([f"all {len(loads)} deployments"], groups[0][1])]
    parts: list[Words | Plot | None] = [load_chart(*each) for each in groups]
    for phase, of_phase in steps.items():
        seen = {name: step.traffic for name, step in of_phase.items() if step.traffic}
        sent = {name: each.sent_bytes.get(Traffic.PAYLOAD.label) for name, each in seen.items()}
        payloads = {name: each for name, each in sent.items() if each}
        parts += traffic_charts(str(phase), payloads, per_node, of_what)
        fan_outs = {name: each.fan_out for name, each in seen.items() if each.fan_out}
        parts.append(fan_out_chart(str(phase), fan_outs))
    return [part for part in parts if part is not None]


def fits(step: StepsRecord, between: str = "") -> str:
    """Words for a step whose sequences do not fit; else empty."""
    return "" if step.fits else f"{between}does not fit"
