"""The plots of a page: one set, whatever the source; measured and projected never share one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from expertlane.report.charts.bars import Bar, causes_chart, speed_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.charts.traffic import fan_out_chart, load_chart, traffic_chart
from expertlane.report.compared import Comparison, Row, scaling
from expertlane.report.document import Chart, Plot, Section, Tabs, Words
from expertlane.report.numbers import likely, milliseconds
from expertlane.report.planning import explained, named, serving, tpot
from expertlane.report.serving import phases_of
from expertlane.report.speed import in_words, unit_of
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    FAMILY,
    PARETO,
    RUN,
    DeploymentRecord,
    Source,
    StepsRecord,
)
from expertlane.results.results import Results
from expertlane.spec.names import Phase, Traffic

_WHERE = {"measured": "measured", "virtual": "virtual time"}
_PHASES = (Phase.DECODE, Phase.PREFILL)
_MS_PER_S, _US_PER_S = 1e3, 1e6
_UNTYPICAL = 0.25  # of the usual time
_Named = Mapping[str, StepsRecord]


def _plots(heading: str, parts: Iterable[Words | Plot]) -> Section:
    return Section(heading, tuple(parts), "plots")


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
        squares = _squares(loads, steps, results.measured_on.ranks_per_node)
        own = _plots(f"Experts and traffic, {what}", squares)
        front = []
    else:
        own = _plots(f"Context and batch, {what}", _by_context(compared))
        front = _front(results, compared)
    return (
        _plots(f"Speed, {what}", _speed(compared)),
        _plots(f"Where the time goes, {what}", (*largest, *_causes(steps))),
        _plots(f"One step, rank by rank, {what}", _compared_timelines(compared, steps)),
        own,
        _plots(f"Scaling, {what}", _sizes(results, compared.source)),
        _plots(f"Throughput against latency, {where}", front),
    )


def _tabs(title: str, charts: Mapping[str, Chart | None]) -> list[Tabs]:
    """The tabs that show anything."""
    drawn = tuple((name, chart) for name, chart in charts.items() if chart is not None)
    return [Tabs(title, drawn)] if drawn else []


def _steps(compared: Comparison, phase: Phase) -> dict[str, StepsRecord]:
    """Steps by the deployment's label; of decoding, the step that is spoken of."""
    of_phase = {
        row.label: row.step if phase is compared.phase else row.record.prefill
        for row in compared.rows
        if phase in (compared.phase, Phase.PREFILL)
    }
    return {name: step for name, step in of_phase.items() if step is not None}


def _speed(compared: Comparison) -> list[Tabs]:
    is_measured = compared.is_run
    at = "" if is_measured else f" at {compared.context:,} tokens of context"
    bars = {str(compared.phase): [_bar(row, row.tps_range) for row in compared.rows]}
    if not is_measured:
        prefills = [(row, row.record.prefill) for row in compared.rows]
        bars["prefill"] = [_bar(row, step.tps) for row, step in prefills if step]
    charts = {
        phase: speed_chart(
            f"{phase} tokens per second{at if phase == 'decode' else ''}".capitalize(),
            f"{phase} tokens/s",
            of_phase,
            between="slowest–fastest run" if is_measured else "low–high",
        )
        for phase, of_phase in bars.items()
        if of_phase
    }
    return _tabs("Speed", charts)


def _bar(row: Row, of: Estimate) -> Bar:
    return Bar(row.label, of, row.record.is_baseline)


def _causes(steps: Mapping[Phase, _Named]) -> list[Tabs]:
    charts = {
        str(phase): causes_chart(
            f"Time of a {phase} step by cause",
            of_phase,
            note="Mean over ranks; one decode step of all sequences, or the prefill. Reads: "
            "operations bound by memory bandwidth.",
        )
        for phase, of_phase in steps.items()
        if of_phase
    }
    return _tabs("Time by cause", charts)


def _timelines(
    words: str,
    steps: Mapping[Phase, _Named],
    first: Sequence[str] = (),
    *,
    what: str = "One {} step",
    notes: Callable[[Phase, str], str] | None = None,
    shows_waits: bool = False,
) -> list[Words | Plot]:
    drawn: list[Words | Plot] = []
    for phase, of_phase in steps.items():
        timelines = {
            name: (step.timeline, notes(phase, name) if notes else "")
            for name, step in of_phase.items()
            if step.timeline
        }
        if timelines:
            title = what.format(phase)
            drawn.append(timelines_chart(title, timelines, first, is_measured=shows_waits))
    lower = "waiting" if shows_waits else "transfers"
    how = f"{words}Upper half of a row: compute; lower half: {lower}. Gaps are idle."
    return [how, *drawn] if drawn else []


def _compared_timelines(compared: Comparison, steps: Mapping[Phase, _Named]) -> list[Words | Plot]:
    cast = [row.label for row in compared.cast]
    if compared.source == "projected":
        words = (
            "One steady-state step of each deployment, on the same time axis. With rotating "
            "micro-batches one step of each is drawn; it overlaps its neighbours. "
        )
        return _timelines(words, steps, cast)
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

    words = "One step of each deployment, from a short run of its own, on the same time axis. "
    shows_waits = compared.source == "measured"
    return _timelines(words, steps, cast, notes=typical, shows_waits=shows_waits)


_Loads = Mapping[str, Sequence[Sequence[int]]]


def _squares(loads: _Loads, steps: Mapping[Phase, _Named], per_node: int) -> list[Plot]:
    parts = _loads(loads)
    for phase, of_phase in steps.items():
        sent = {name: step.traffic for name, step in of_phase.items() if step.traffic}
        alone = "" if len(sent) > 1 else ": traffic matrix"
        matrices = {
            name: traffic_chart(f"{name}{alone}", payload, per_node)
            for name, seen in sent.items()
            if (payload := seen.sent_bytes.get(Traffic.PAYLOAD.label))
        }
        parts += _tabs(f"Traffic matrix, {phase}", matrices)
        fan_outs = {name: seen.fan_out for name, seen in sent.items() if seen.fan_out}
        fan_out = fan_out_chart(f"Ranks reached per token, {phase}", fan_outs)
        if fan_out is not None:
            parts.append(fan_out)
    return parts


def _loads(loads: _Loads) -> list[Plot]:
    """One plot where all had the same; none without experts."""
    title = "Expert load"
    if len(set(loads.values())) == 1:
        also = ", the same in all deployments" if len(loads) > 1 else ""
        loads = {f"{title}{also}": next(iter(loads.values()))}
    charts = [(name, chart) for name, load in loads.items() if (chart := load_chart(name, load))]
    return [Tabs(title, tuple(charts))] if len(charts) > 1 else [chart for _, chart in charts]


def _sizes(results: Results, source: Source) -> list[Chart]:
    """How TPS grows with the number of ranks: of each of them where it was measured."""
    found = scaling(results, source)
    if not found:
        return []
    if source == "virtual":
        curves = {"virtual time": [Estimate(each.tps_per_rank) for each in found]}
        title, y = "Decode tokens/s per rank, by number of ranks", "tokens/s per rank"
        note = "Linear scaling is a horizontal line."
    elif source == "measured":
        curves = {
            "wall time": [Estimate(each.tps_per_rank) for each in found],
            "critical-path CPU time": [Estimate(each.critical_path_tps_per_rank) for each in found],
        }
        title, y = "Decode tokens/s per rank, by number of ranks", "tokens/s per rank"
        note = (
            "Linear scaling is a horizontal line. Critical-path CPU time: one core per rank, "
            "transfers excluded."
        )
    else:
        curves = {
            "same sequences": [each.step.tps for each in found],
            "same sequences per GPU": [each.share.tps for each in found],
        }
        title, y = "Decode tokens/s by number of GPUs", "tokens/s"
        note = (
            "One expert-parallel group of all GPUs. Linear scaling is a straight line: ten times "
            "the tokens/s with ten times the GPUs."
        )
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
    def curve(row: Row, of: Callable[[StepsRecord], int], steps: Iterable[StepsRecord]) -> Curve:
        return Curve(
            row.name,
            tuple(Point(of(step), step.round_s * _MS_PER_S, _fit(step)) for step in steps),
            role=_role(compared, row),
            is_dashed=row.record.is_baseline,
        )

    by_context = [
        curve(
            row,
            lambda step: step.context or 0,
            [compared.at(row, context) for context in compared.contexts],
        )
        for row in compared.rows
    ]
    by_batch = [
        curve(row, lambda step: step.num_seqs, sorted(of_row, key=lambda step: step.num_seqs))
        for row in compared.rows
        if len(of_row := [s for s in row.record.steps if s.context == compared.context]) > 1
    ]
    charts = [
        curves_chart(
            f"TPOT against context, {compared.num_seqs:,} sequences",
            Axis("tokens of context", "log"),
            Axis("TPOT, ms", "log"),
            by_context,
            note="Vertical lines: bounds. Dashed: baselines.",
        )
    ]
    if by_batch:
        charts.append(
            curves_chart(
                f"TPOT against batch, {compared.context:,} tokens of context",
                Axis("sequences", "log"),
                Axis("TPOT, ms", "log"),
                by_batch,
                note="Sequences in the whole system, one token each per step. Dashed: baselines.",
            )
        )
    return charts


def _planned(record: DeploymentRecord) -> Point:
    words = f"{named(record)}, concurrency {serving(record).num_running or 0:,}"
    return Point(_MS_PER_S * tpot(record).value, serving(record).output_tps, words)


def _front(results: Results, compared: Comparison) -> list[Chart]:
    front = results.select("projected", PARETO, compared.conditions)
    return [front_chart(results, compared)] if front else []


def front_chart(
    results: Results, compared: Comparison, others: Sequence[Curve] = (), note: str = ""
) -> Chart:
    """The planner's front, the experiment's own deployments, and others if there are any."""
    front = results.select("projected", PARETO, compared.conditions)
    curves = [Curve("planner's Pareto front", tuple(map(_planned, front)))]
    for row in compared.rows:
        at = Point(_MS_PER_S * row.step.round_s.value, row.step.tps, _fit(row.step))
        curves.append(Curve(row.name, (at,), is_joined=False, role=_role(compared, row)))
    return curves_chart(
        f"Decode tokens/s against TPOT, {in_words(compared.conditions)}",
        Axis("TPOT, ms", "log"),
        Axis("decode tokens/s", "log"),
        [*curves, *others],
        note=f"Decode only, at {compared.context:,} tokens of context. No aggregated deployment is "
        "above and left of the front, which is screened. The experiment's deployments have all "
        f"{compared.num_seqs:,} sequences.{note}",
    )


def plan(results: Results) -> tuple[Section, ...]:
    """Plots of a plan; everything is projected."""
    best = results.select("projected", BEST)
    bars = [
        Bar(f"#{place} {named(each)}", serving(each).output_tps)
        for place, each in enumerate(best, 1)
    ]
    rows = {f"{number} {named(each)}": each for number, each in explained(results)}
    steps = {
        phase: {name: step for name, each in rows.items() for step in each.steps_of(phase)}
        for phase in _PHASES
    }
    curves = [
        Curve("Pareto front", tuple(map(_planned, results.select("projected", PARETO)))),
        Curve("best within the limits", (_planned(best[0]),), is_joined=False),
        *(
            Curve(f"best of: {each.name}", (_planned(each),), is_joined=False, role="back")
            for each in results.select("projected", FAMILY)
        ),
    ]
    front = curves_chart(
        "Tokens/s against TPOT",
        Axis("TPOT, ms", "log"),
        Axis("output tokens/s", "log"),
        curves,
        note="No aggregated deployment is above and left of the front. The front and the best of "
        "each kind are screened, the others projected in full.",
    )
    speed = speed_chart("Output tokens per second", "output tokens/s", bars, between="low–high")
    words = "One step of each, at its own batch size, given below it. "
    return (
        _plots("Throughput against latency, projected", [front]),
        _plots("The best deployments, projected", [speed]),
        _plots("Where the time goes, projected", _causes(steps)),
        _plots("One step, rank by rank, projected", _timelines(words, steps)),
    )


def simulation(results: Results) -> tuple[Section, ...]:
    """Plots of one simulated deployment."""
    record = results.deployments[0]
    phases = dict(phases_of(record))
    steps = {step.phase: {name: step} for name, step in phases.items()}
    sent = {step.phase: {f"The largest {name} step": step} for name, step in phases.items()}
    causes = causes_chart("Mean step by cause", phases, note="Mean over ranks.")
    loads = {record.name: record.num_tokens_per_expert}
    squares = _squares(loads, sent, results.projected_for.ranks_per_node)
    timelines = _timelines("", steps, what="The largest {} step")
    return (
        _plots("Where the time goes, projected", [causes]),
        _plots("One step, rank by rank, projected", timelines),
        _plots("Experts and traffic, projected", squares),
    )
