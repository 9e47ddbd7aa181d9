"""The plots of a page, the same set for any source; measured and projected never share one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from expertlane.report.charts.bars import (
    FASTER,
    SLOWER,
    Bar,
    causes_chart,
    step_title,
    throughput_chart,
    waterfall_chart,
)
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.pareto import Dot, Role, pareto_chart
from expertlane.report.charts.squares import alike, load_chart, traffic_charts
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.compared import Comparison, Row, scaling, step_difference
from expertlane.report.document import ChapterName, Chart, Plot, Section, Words
from expertlane.report.loads import device_of
from expertlane.report.numbers import counted, figures, likely, milliseconds, percent, times
from expertlane.report.planning import (
    asked_rate,
    explained,
    most_requests,
    named,
    serving,
    tpot,
)
from expertlane.report.scaling import overlap_sentence
from expertlane.report.serving import phases_of
from expertlane.report.speed import how_run, unit_of
from expertlane.report.verdict import Verdict, judge, ratio, spoken_of
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    FAMILY,
    PARETO,
    RUN,
    TWO_POOLS,
    DeploymentRecord,
    Source,
    StepsRecord,
)
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
    """Load of the experts and traffic between ranks, each distinct one once."""
    groups = alike(loads)
    if len(groups) == 1 and len(loads) > 1:
        groups = [([f"all {len(loads)} deployments"], groups[0][1])]
    parts: list[Words | Plot | None] = [load_chart(*each) for each in groups]
    for phase, of_phase in steps.items():
        seen = {name: step.traffic for name, step in of_phase.items() if step.traffic}
        sent = {name: each.sent_bytes.get(Traffic.PAYLOAD.label) for name, each in seen.items()}
        payloads = {name: each for name, each in sent.items() if each}
        parts += traffic_charts(str(phase), payloads, per_node, of_what)
    return [part for part in parts if part is not None]


def fits(step: StepsRecord, between: str = "") -> str:
    """Words for a step whose sequences do not fit; else empty."""
    return "" if step.fits else f"{between}does not fit"


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


_WHERE = {"measured": "measured", "virtual": "virtual time"}
_MS_PER_S = 1e3
_TWO = 2  # points, which are no curve


def comparison(results: Results, compared: Comparison) -> tuple[Section, ...]:
    """Plots of a comparison, under the usual conditions unless a plot says otherwise."""
    is_measured = compared.is_run
    where = _WHERE.get(compared.source, "projected")
    steps = {phase: _steps(compared, phase) for phase in PHASES}
    largest = [
        f"Largest cost of {row.name}: {row.record.bottleneck.sentence}."
        for row in spoken_of(compared, results)
        if row.record.bottleneck
    ]
    if is_measured:
        loads = {row.label: row.record.num_tokens_per_expert for row in compared.rows}
        squares = experts_and_traffic(loads, steps, results.measured_on.ranks_per_node)
        own = plot_section(f"Load of experts, and who sends to whom ({where})", squares)
        front = []
    else:
        own = plot_section(
            f"Longer contexts and other batches ({where})", _by_context(compared), "loads"
        )
        front = _front(results, compared)
    return (
        plot_section(f"Where the time goes ({where})", (*largest, *causes(steps))),
        plot_section(f"One step, rank by rank ({where})", by_rank(results, compared, steps)),
        own,
        plot_section(f"Overlap ({where})", _overlap(compared)),
        plot_section(f"More ranks ({where})", _sizes(results, compared.source), "loads"),
        plot_section(f"Throughput against latency ({where})", front, "loads"),
    )


def _steps(compared: Comparison, phase: Phase) -> dict[str, StepsRecord]:
    """Steps by the deployment's label; for decoding, those of `Row.step`."""
    of_phase = {
        row.label: row.step if phase is compared.phase else row.record.prefill
        for row in compared.rows
        if phase in (compared.phase, Phase.PREFILL)
    }
    return {name: step for name, step in of_phase.items() if step is not None}


def first(results: Results, compared: Comparison) -> Section:
    """Plots beside the verdict on the first screen: throughput, and why it differs."""
    judged = judge(compared)
    chart = _served(results, compared) or _throughput(compared, judged)
    charts = [chart] if chart else []
    if judged is not None:
        charts.append(_step_difference(compared, judged))
    return Section(_WHERE.get(compared.source, "projected"), tuple(charts), "first", "answer")


def _throughput(compared: Comparison, judged: Verdict | None) -> Chart | None:
    """Throughput of all deployments, with colours for those that the verdict names."""
    slower, faster = judged.slower_and_faster if judged else (None, None)
    roles = {row.number: role for row, role in ((faster, FASTER), (slower, SLOWER)) if row}
    bars = [Bar(row.name, row.step.tps, roles.get(row.number, "other")) for row in compared.rows]
    phase, fastest = compared.phase, compared.fastest
    done = "decodes" if phase is Phase.DECODE else "prefills"
    if judged is None or faster is None or slower is None:
        title = f"{fastest.name} {done} {figures(fastest.tps)} tokens/s"
    elif judged.has_interval and not judged.is_told_apart:
        title = f"{faster.name} and {slower.name} {done[:-1]} equally fast within error"
    else:
        value = judged.ratio.value if faster is judged.one else 1 / judged.ratio.value
        title = f"{faster.name} {done} {ratio(value)}× as fast as {slower.name}"
    unit = f"{phase} tokens/s"
    between = "90 % interval" if compared.is_run else "low–high"
    return throughput_chart(title, unit, bars, between=between)


def _served(results: Results, compared: Comparison) -> Chart | None:
    """Projected throughput of all deployments on the whole workload, where that was simulated."""
    if compared.is_run or results.workload is None or not results.workload.over:
        return None
    one, other = compared.compared[:2]
    over = results.workload.over[other.name]
    roles = {one.number: FASTER, other.number: SLOWER}
    if over.value < 1:
        roles = {one.number: SLOWER, other.number: FASTER}
    bars = [
        Bar(row.name, row.record.serving[0].output_tps, roles.get(row.number, "other"))
        for row in compared.rows
        if row.record.serving
    ]
    title = f"{one.name} serves {ratio(over.value)}× the tokens/s of {other.name}"
    return throughput_chart(title, "output tokens/s, whole workload", bars, between="low–high")


def _step_difference(compared: Comparison, judged: Verdict) -> Chart:
    one, other, difference = judged.one, judged.other, judged.difference
    return waterfall_chart(
        step_title(other.name, one.name, difference),
        other.name,
        one.name,
        difference,
        note=f"ms of a {compared.phase} step, mean over ranks.",
    )


def _overlap(compared: Comparison) -> list[Words | Plot]:
    """Effect of overlap on steps, and why it pays or not; drawn for the fastest pair."""
    pairs = compared.overlapped
    if not pairs:
        return []
    pair = max(pairs, key=lambda each: each.on.tps)
    difference = step_difference(pair.off, pair.on)
    pays = "pays" if pair.gained_s > 0 else "does not pay"
    chart = waterfall_chart(
        f"Overlap {pays}. {step_title(pair.off.name, pair.on.name, difference)}",
        pair.off.name,
        pair.on.name,
        difference,
        note="ms of a decode step, mean over ranks. Each half of a batch reads the weights for "
        "itself.",
    )
    return [" ".join(map(overlap_sentence, pairs)), chart]


def _sizes(results: Results, source: Source) -> list[Chart]:
    """TPS by number of ranks; where measured, TPS of each rank."""
    found = scaling(results, source)
    if len(found) <= _TWO:
        return []
    if source == "virtual":
        curves = {"virtual time": [Estimate(each.tps_per_rank) for each in found]}
        note = "Linear scaling is a level line."
    elif source == "measured":
        curves = {
            "wall time": [Estimate(each.tps_per_rank) for each in found],
            "critical-path CPU time": [Estimate(each.critical_path_tps_per_rank) for each in found],
        }
        note = (
            "Linear scaling is a horizontal line. Critical-path CPU time: one core per rank, "
            "transfers excluded."
        )
    else:
        curves = {
            "same sequences": [each.step.tps for each in found],
            "same sequences per GPU": [each.share.tps for each in found],
        }
        note = (
            "One expert-parallel group of all GPUs. Linear scaling is a straight line: ten times "
            "the tokens/s with ten times the GPUs."
        )
    first, last, unit = found[0].record.num_ranks, found[-1].record.num_ranks, unit_of(source)
    name, values = next(iter(curves.items()))
    y = f"decode tokens/s per {unit}" if source in RUN else "decode tokens/s"
    factor = times(values[-1].value / values[0].value)
    title = f"With {counted(last, unit)}, {factor} the {y} of {first} ({name})"
    drawn = [
        Curve(
            name,
            tuple(
                Point(each.record.num_ranks, at, f"{each.name}{fits(each.step, ', ')}")
                for each, at in zip(found, of_curve, strict=True)
            ),
        )
        for name, of_curve in curves.items()
    ]
    scale: Literal["linear", "log"] = "linear" if source in RUN else "log"
    x = Axis(f"{unit_of(source)}s", "log")
    return [curves_chart(title, x, Axis(y, scale), drawn, note=note)]


def _role(compared: Comparison, row: Row) -> Literal["front", "back"]:
    return "front" if row in compared.cast else "back"


def _by_context(compared: Comparison) -> list[Chart]:
    """TPOT by context, and by batch where more than one was projected."""
    of_all = [[compared.at(row, context) for context in compared.contexts] for row in compared.rows]
    by_context = [
        _latencies(compared, row, steps, [step.context or 0 for step in steps])
        for row, steps in zip(compared.rows, of_all, strict=True)
    ]
    by_batch = []
    for row in compared.rows:
        steps = [step for step in row.record.steps if step.context == compared.context]
        steps.sort(key=lambda step: step.num_seqs)
        if len(steps) > 1:
            by_batch.append(_latencies(compared, row, steps, [step.num_seqs for step in steps]))
    named = "Dashed: baselines. Lines through points: low to high."
    drawn = (
        (by_context, "tokens of context", f"All {compared.num_seqs:,} sequences. {named}"),
        (by_batch, "sequences", f"At {compared.context:,} tokens of context. {named}"),
    )
    return [
        curves_chart(
            _growth(compared.fastest.name, curves, what),
            Axis(what, "log"),
            Axis("TPOT, ms", "log"),
            curves,
            note=note,
        )
        for curves, what, note in drawn
        if curves and len(curves[0].points) > _TWO
    ]


def _latencies(
    compared: Comparison, row: Row, steps: Sequence[StepsRecord], at: Sequence[int]
) -> Curve:
    points = (
        Point(x, step.round_s * _MS_PER_S, fits(step)) for x, step in zip(at, steps, strict=True)
    )
    role = _role(compared, row)
    return Curve(row.name, tuple(points), role=role, is_dashed=row.record.is_baseline)


def _growth(name: str, curves: Sequence[Curve], what: str) -> str:
    """Change of one curve's latency from its first to its last point, in words."""
    curve = next((each for each in curves if each.name == name), curves[0])
    first, *_, last = curve.points
    return (
        f"A token of {curve.name} takes {figures(first.y)} ms at {first.x:,}, {figures(last.y)} ms "
        f"at {last.x:,} {what}"
    )


def _front(results: Results, compared: Comparison) -> list[Chart]:
    front = results.select("projected", PARETO, compared.conditions)
    return [front_chart(results, compared)] if front else []


def simulation(results: Results) -> tuple[Section, ...]:
    """Plots of one simulated deployment."""
    record = results.deployments[0]
    phases = dict(phases_of(record))
    steps = {step.phase: {record.name: step} for step in phases.values()}
    note = "Shares of each phase's mean step; numbers are ms, mean over ranks."
    drawn = causes_chart(phases, "mean step", note=note, as_shares=True)
    loads = {record.name: record.num_tokens_per_expert}
    per_node = results.projected_for.ranks_per_node
    squares = experts_and_traffic(loads, steps, per_node, "one step")
    words = "The step nearest to the median."
    by_phase = timelines(words, steps, "The median {} step, rank by rank")
    return (
        Section("projected", (drawn,) if drawn else (), "first", "answer"),
        plot_section("One step, rank by rank", by_phase),
        plot_section("Load of experts, and who sends to whom", squares),
    )
