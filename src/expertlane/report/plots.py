"""The plots of a page, the same set for any source; measured and projected never share one."""

from collections.abc import Sequence
from typing import Literal

from expertlane.report.charts.bars import FASTER, SLOWER, Bar, causes_chart, throughput_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.waterfall import step_title, waterfall_chart
from expertlane.report.compared import Comparison, Row, scaling
from expertlane.report.difference import step_difference
from expertlane.report.document import Chart, Plot, Section, Words
from expertlane.report.numbers import counted, figures, times
from expertlane.report.plan_plots import front_chart
from expertlane.report.scaling import overlap_sentence
from expertlane.report.serving import phases_of
from expertlane.report.speed import unit_of
from expertlane.report.step_plots import (
    PHASES,
    by_rank,
    causes,
    experts_and_traffic,
    fits,
    plot_section,
    timelines,
)
from expertlane.report.verdict import Verdict, judge, ratio, spoken_of
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    PARETO,
    RUN,
    Source,
    StepsRecord,
)
from expertlane.results.results import Results
from expertlane.spec.names import Phase

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
        plot_section(f"Prompts ({where})", _prefill(compared), "loads"),
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


def _prefill(compared: Comparison) -> list[Chart]:
    """Prefill throughput of a projection."""
    if compared.is_run or compared.phase is Phase.PREFILL:
        return []
    found = {row.name: step for row in compared.rows if (step := row.record.prefill)}
    if not found:
        return []
    fastest = max(found, key=lambda name: found[name].tps.value)
    chart = throughput_chart(
        f"{fastest} prefills fastest: {figures(found[fastest].tps)} tokens/s",
        "prefill tokens/s",
        [Bar(name, step.tps) for name, step in found.items()],
        between="low–high",
    )
    return [chart] if chart else []


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
