"""The plots of a page: one set, whatever the source; measured and projected never share one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from expertlane.report.charts.bars import FASTER, SLOWER, Bar, causes_chart, throughput_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.load import alike, load_chart
from expertlane.report.charts.pareto import Dot, Role, pareto_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.charts.traffic import fan_out_chart, traffic_charts
from expertlane.report.charts.waterfall import step_title, waterfall_chart
from expertlane.report.compared import Comparison, Row, scaling
from expertlane.report.difference import step_difference
from expertlane.report.document import Chart, Multiples, Plot, Section, Timelines, Words
from expertlane.report.numbers import counted, figures, likely, milliseconds, times
from expertlane.report.planning import explained, named, serving, tpot
from expertlane.report.serving import phases_of
from expertlane.report.speed import in_words, unit_of
from expertlane.report.verdict import Verdict, judge
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

_WHERE = {"measured": "measured", "virtual": "virtual time"}
_PHASES = (Phase.DECODE, Phase.PREFILL)
_MS_PER_S, _US_PER_S = 1e3, 1e6
_TWO = 2  # points, which are no curve
_UNTYPICAL = 0.25  # of the usual time
_Named = Mapping[str, StepsRecord]


def _plots(heading: str, parts: Iterable[Words | Plot]) -> Section:
    """With what its first plot shows."""
    parts = tuple(parts)
    return Section(heading, parts, "plots", next(filter(None, map(_finding, parts)), ""))


def _finding(part: Words | Plot) -> str:
    match part:
        case Chart() | Multiples():
            return part.title
        case Timelines():
            return part.charts[0][1].title
    return ""


def comparison(results: Results, compared: Comparison) -> tuple[Section, ...]:
    """Plots of a comparison, under the usual conditions unless a plot says otherwise."""
    is_measured = compared.is_run
    where = _WHERE.get(compared.source) or f"projected for {results.projected_for.name}"
    what = where if is_measured else f"{where} ({in_words(compared.conditions)})"
    steps = {phase: _steps(compared, phase) for phase in _PHASES}
    largest = [
        f"Largest cost of {row.name}: {row.record.bottleneck.sentence}."
        for row in compared.cast
        if row.record.bottleneck
    ]
    if is_measured:
        loads = {row.label: row.record.num_tokens_per_expert for row in compared.rows}
        squares = _experts_and_traffic(loads, steps, results.measured_on.ranks_per_node)
        own = _plots(f"Experts and traffic, {what}", squares)
        front = []
    else:
        own = _plots(f"Context and batch, {what}", _by_context(compared))
        front = _front(results, compared)
    return (
        _plots(f"Prefill, {what}", _prefill(compared)),
        _plots(f"Where the time goes, {what}", (*largest, *_causes(steps))),
        _plots(f"One step, rank by rank, {what}", _compared_timelines(results, compared, steps)),
        own,
        _plots(f"Scaling, {what}", _sizes(results, compared.source)),
        _plots(f"Throughput against latency, {where}", front),
    )


def _steps(compared: Comparison, phase: Phase) -> dict[str, StepsRecord]:
    """Steps by the deployment's label; of decoding, the step that is spoken of."""
    of_phase = {
        row.label: row.step if phase is compared.phase else row.record.prefill
        for row in compared.rows
        if phase in (compared.phase, Phase.PREFILL)
    }
    return {name: step for name, step in of_phase.items() if step is not None}


def first(results: Results, compared: Comparison) -> Section:
    """What a page's first screen shows beside the verdict: how fast all are, and why."""
    judged = judge(compared, results)
    chart = _throughput(compared, judged)
    charts = [chart] if chart else []
    if judged is not None:
        charts.append(_step_difference(compared, *judged.slower_and_faster))
    return Section(_WHERE.get(compared.source) or "projected", tuple(charts), "first")


def _throughput(compared: Comparison, judged: Verdict | None) -> Chart | None:
    """How fast all deployments are, those that the verdict names in colours of their own."""
    slower, faster = judged.slower_and_faster if judged else (None, None)
    roles = {row.number: role for row, role in ((faster, FASTER), (slower, SLOWER)) if row}
    bars = [Bar(row.name, row.tps_range, roles.get(row.number, "other")) for row in compared.rows]
    phase, fastest = compared.phase, compared.fastest
    done = "decodes" if phase is Phase.DECODE else "prefills"
    if judged is None or faster is None or slower is None:
        title = f"{fastest.name} {done} {figures(fastest.tps)} tokens/s"
    elif judged.has_interval and not judged.is_told_apart:
        title = f"{faster.name} and {slower.name} {done[:-1]} equally fast within error"
    else:
        title = f"{faster.name} {done} {times(faster.tps / slower.tps)} as fast as {slower.name}"
    unit = f"{phase} tokens/s"
    between = "slowest–fastest run" if compared.is_run else "low–high"
    return throughput_chart(title, unit, bars, between=between)


def _step_difference(compared: Comparison, slower: Row, faster: Row) -> Chart:
    difference = step_difference(slower, faster)
    phase = compared.phase
    return waterfall_chart(
        step_title(slower.name, faster.name, difference),
        slower.name,
        faster.name,
        difference,
        note=f"ms of a {phase} step, mean over ranks.",
    )


def _prefill(compared: Comparison) -> list[Chart]:
    """Of a projection, how fast prompts are computed."""
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


def _causes(steps: Mapping[Phase, _Named]) -> list[Chart]:
    charts = [
        causes_chart(
            of_phase,
            f"{phase} step",
            note="ms, mean over ranks, of one step of every sequence. Reads: operations bound by "
            "memory.",
        )
        for phase, of_phase in steps.items()
        if of_phase
    ]
    return [chart for chart in charts if chart is not None]


def _timelines(
    words: str,
    steps: Mapping[Phase, _Named],
    title: str = "The {} step, rank by rank",
    notes: Callable[[Phase, str], str] = lambda phase, name: "",
    *,
    is_measured: bool = False,
    shares_cores: bool = False,
) -> list[Words | Plot]:
    """A group a phase; the rest as `timelines_chart` takes it."""
    drawn: list[Words | Plot] = []
    for phase, of_phase in steps.items():
        timelines = {
            name: (step.timeline, notes(phase, name))
            for name, step in of_phase.items()
            if step.timeline
        }
        if timelines:
            drawn.append(
                timelines_chart(
                    title.format(phase),
                    timelines,
                    is_measured=is_measured,
                    shares_cores=shares_cores,
                )
            )
    said = (
        f"{words} Each row is a rank; all share one time axis, and what is shorter than a "
        "thousandth of it counts with what is around it. Idle: a rank has nothing to do."
    )
    return [said, *drawn] if drawn else []


def _compared_timelines(
    results: Results, compared: Comparison, steps: Mapping[Phase, _Named]
) -> list[Words | Plot]:
    """Of those that are spoken of; the others' are in the trace."""
    cast = [row.label for row in compared.cast]
    of_cast = {
        phase: {name: step for name, step in of_phase.items() if name in cast}
        for phase, of_phase in steps.items()
    }
    if compared.source == "projected":
        words = (
            "A step of each deployment in the steady state. Where micro-batches rotate, one step "
            "of each is drawn; it overlaps the rounds beside it."
        )
        return _timelines(words, of_cast)
    rows = {row.label: row for row in compared.rows}

    def typical(phase: Phase, name: str) -> str:
        """How the step that is drawn compares with those that were measured."""
        step, options = steps[phase][name], rows[name].record.options
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
    words = "Of a short run by itself, the step that is nearest to the median one."
    if shares_cores:
        words += (
            " Descheduled: a rank had work, but other ranks had the cores; how much of a stretch "
            "that was is known, and drawn at its end."
        )
    return _timelines(
        words,
        of_cast,
        "The median {} step, rank by rank",
        typical,
        is_measured=is_wall,
        shares_cores=shares_cores,
    )


_Loads = Mapping[str, Sequence[Sequence[int]]]


def _experts_and_traffic(
    loads: _Loads, steps: Mapping[Phase, _Named], per_node: int, of_what: str = "all steps"
) -> list[Words | Plot]:
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


def _sizes(results: Results, source: Source) -> list[Chart]:
    """How TPS grows with the number of ranks: of each of them where it was measured."""
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
    title = f"From {first} to {counted(last, unit)} {y} go to {factor} ({name})"
    drawn = [
        Curve(
            name,
            tuple(
                Point(each.record.num_ranks, at, f"{each.name}{_fit(each.step, ', ')}")
                for each, at in zip(found, of_curve, strict=True)
            ),
        )
        for name, of_curve in curves.items()
    ]
    scale: Literal["linear", "log"] = "linear" if source in RUN else "log"
    x = Axis(f"{unit_of(source)}s", "log")
    return [curves_chart(title, x, Axis(y, scale), drawn, note=note)]


def _fit(step: StepsRecord, between: str = "") -> str:
    return "" if step.fits else f"{between}does not fit"


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
        Point(x, step.round_s * _MS_PER_S, _fit(step)) for x, step in zip(at, steps, strict=True)
    )
    role = _role(compared, row)
    return Curve(row.name, tuple(points), role=role, is_dashed=row.record.is_baseline)


def _growth(name: str, curves: Sequence[Curve], what: str) -> str:
    """How the latency of one of them changes from the first to the last point."""
    curve = next((each for each in curves if each.name == name), curves[0])
    first, *_, last = curve.points
    return (
        f"{curve.name}'s TPOT goes from {figures(first.y)} to {figures(last.y)} ms "
        f"from {first.x:,} to {last.x:,} {what}"
    )


def _front(results: Results, compared: Comparison) -> list[Chart]:
    front = results.select("projected", PARETO, compared.conditions)
    return [front_chart(results, compared)] if front else []


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
            _fit(row.step),
            row.name if row in compared.cast else "",
        )
        for row in compared.rows
    ]
    best = max(front, key=lambda each: serving(each).output_tps.value, default=None)
    ahead = compared.fastest
    title = f"{ahead.name} decodes fastest of the experiment's own"
    if best is not None:
        factor = serving(best).output_tps.value / ahead.tps
        title += f"; {named(best)} has {times(factor)} the throughput"
    return pareto_chart(
        title,
        [*_front_dots(front), *own, *others],
        note=f"Decoding alone, at {compared.context:,} tokens of context, "
        f"{in_words(compared.conditions)}. The front is screened. Others: the experiment's own, "
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
    """The front, each deployment's name at the first of its points alone."""
    dots, seen = [], {without}
    for each in sorted(front, key=lambda each: -tpot(each).value):
        name = named(each)
        dots.append(_planned(each, "front", "" if name in seen else name))
        seen.add(name)
    return dots


def plan(results: Results) -> tuple[Section, ...]:
    """Plots of a plan; everything is projected."""
    best = results.select("projected", BEST)
    bars = [
        Bar(f"#{place} {named(each)}", serving(each).output_tps, FASTER if place == 1 else "other")
        for place, each in enumerate(best, 1)
    ]
    rows = {f"{number} {named(each)}": each for number, each in explained(results)}
    steps = {
        phase: {name: step for name, each in rows.items() for step in each.steps_of(phase)}
        for phase in _PHASES
    }
    speed = throughput_chart(
        f"{named(best[0])} gives {figures(serving(best[0]).output_tps)} output tokens/s",
        "output tokens/s",
        bars,
        between="low–high",
    )
    words = "A step of each at its own number of sequences or prompts, written under it."
    return (
        _plots("Throughput against latency, projected", [_plan_front(results)]),
        _plots("The best deployments, projected", [speed] if speed else []),
        _plots("Where the time goes, projected", _causes(steps)),
        _plots("One step, rank by rank, projected", _timelines(words, steps)),
    )


def _plan_front(results: Results) -> Chart:
    """The front, what was chosen, and the best of each kind that is on neither."""
    best, *_ = results.select("projected", BEST)
    front = results.select("projected", PARETO)
    chosen = _planned(best, "chosen", f"#1 {named(best)}")
    known = {named(best), *map(named, front)}
    kinds = {each: each.name for each in results.select("projected", FAMILY)}
    kinds |= dict.fromkeys(results.select("projected", TWO_POOLS), "disaggregated")
    dots = [
        chosen,
        *_front_dots(front, without=named(best)),
        *(
            _planned(each, "other", kind)
            for each, kind in kinds.items()
            if named(each) not in known
        ),
    ]
    limit_s = results.question.get("max_tpot_s")
    within = "" if limit_s is None else " within the limit"
    return pareto_chart(
        f"{chosen.name} gives most{within}: {figures(chosen.device_tps)} tokens/s per GPU at "
        f"{figures(chosen.user_tps)} per user",
        dots,
        max_tpot_s=limit_s,
        note="No aggregated deployment is above and right of the front. It and the others, the "
        "best of their kinds, are screened, the best projected in full; lines: low to high.",
    )


def simulation(results: Results) -> tuple[Section, ...]:
    """Plots of one simulated deployment."""
    record = results.deployments[0]
    phases = dict(phases_of(record))
    steps = {step.phase: {name: step} for name, step in phases.items()}
    sent = {step.phase: {record.name: step} for step in phases.values()}
    causes = causes_chart(phases, "mean step", note="ms, mean over ranks.")
    loads = {record.name: record.num_tokens_per_expert}
    squares = _experts_and_traffic(loads, sent, results.projected_for.ranks_per_node, "one step")
    words = "The step that is nearest to the median one, by itself."
    timelines = _timelines(words, steps, "The median {} step, rank by rank")
    return (
        _plots("Where the time goes, projected", [causes] if causes else []),
        _plots("One step, rank by rank, projected", timelines),
        _plots("Experts and traffic, projected", squares),
    )
