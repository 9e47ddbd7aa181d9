"""The answer of a comparison: what fits on one screen of 80 columns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from expertlane.report.compared import OTHER, Comparison, Row, difference_of
from expertlane.report.document import Answer, Column, Figure, Table, Words, number, text
from expertlane.report.loads import lengths_of
from expertlane.report.numbers import (
    NONE,
    Amount,
    counted,
    figures,
    likely,
    milliseconds,
    percent,
    signed,
    whole,
)
from expertlane.report.setup import foreign_load, how_judged, limits_of
from expertlane.report.speed import LOWER_OF_TWO, how_run
from expertlane.report.verdict import (
    Verdict,
    headline,
    in_wall_time,
    judge,
    ratio,
    rounding,
    workload_headline,
)
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import StepsRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.names import Cause, Phase, ProjectedCause

_MOST_LINES, _FEWER_LINES = 16, 8  # lines of a table; of one with another below it
_LETTERS = 22  # letters of a name that fit on a line
_THOUSANDS = 10_000
_MOST_CAUSES = 6

# What stands in a column beside seven others; other causes have words that are short.
_SHORT: dict[str, str] = {
    Cause.HEAD: "head",
    Cause.DISPATCH_COMBINE: "dispatch",
    Cause.WAITING: "waiting",
    Cause.PIPELINE_BUBBLE: "bubble",
    Cause.ENGINE: "scheduler",
    ProjectedCause.EXPERT_COMPUTE: "experts",
    ProjectedCause.OTHER_COMPUTE: "other compute",
    ProjectedCause.DISPATCH_COMBINE: "dispatch",
    ProjectedCause.CONTENTION: "contention",
    ProjectedCause.IMBALANCE: "imbalance",
}


def short(cause: str) -> str:
    """A cause in a word or two."""
    return _SHORT.get(cause, cause)


def comparison_answer(
    name: str,
    results: Results,
    own: Comparison | None,
    wall: Comparison | None,
    modelled: Comparison | None,
) -> Answer:
    """Measured numbers, then projected ones; one of the two may be missing.

    Args:
        name: name of the experiment, with its changes.
        own: comparison on the clock of the verdict.
        wall: comparison in wall time, where that is another clock.
    """
    if own is None:
        assert modelled is not None, "something was measured or projected"
        setting = f"{name} | {_projected_setting(results, modelled)}"
        served = workload_headline(results, modelled)
        if served is None:
            only = _parts(results, modelled, _MOST_LINES - 1)
            return Answer(setting, headline(modelled, results), (*only, how_judged(results)))
        return Answer(setting, served, (*_of_workload(results, modelled), how_judged(results)))
    machine = results.measured_on
    cores = counted(machine.num_cores, "core") if machine.device == "cpu" else machine.device
    ranks = counted(machine.num_ranks, "rank")
    setting = f"{name} | {ranks} on {cores} | {_clock(results, own)}"
    busy = foreign_load(results)
    parts: tuple[Words, ...] = (busy,) if busy else ()
    room = _FEWER_LINES if modelled else _MOST_LINES
    parts += _parts(results, own, room - 2 * len(parts))
    if modelled is None and wall is not None and (beside := in_wall_time(wall, results)):
        parts += (beside,)
    if modelled is not None:
        said = workload_headline(results, modelled) or headline(modelled, results)
        table = _served_table if results.workload else _table
        cast = _shown(modelled, modelled.compared or modelled.cast, len(modelled.cast))
        parts += (
            f"Also projected ({_projected_setting(results, modelled)}): {said} "
            f"{how_judged(results)}",
            table(modelled, cast),
        )
    return Answer(setting, headline(own, results), parts)


def _clock(results: Results, own: Comparison) -> str:
    virtual = results.virtual_time
    if own.source != "virtual" or virtual is None:
        return "wall time"
    links = f"links of {virtual.links}" if virtual.links else "no links"
    return f"virtual time: a core per rank, {links}"


def _projected_setting(results: Results, modelled: Comparison) -> str:
    experiment = results.question["experiment"]
    workload, limit = experiment["workload"], experiment["model"].get("max_position_embeddings", 0)
    lengths = lengths_of(results.question.get("load") or {}, workload, limit)
    parts = [
        results.projected_for.name,
        how_run(modelled.conditions),
        f"{workload['num_sequences']:,} × {lengths}",
        *limits_of(results),
    ]
    return ", ".join(parts)


def _of_workload(results: Results, modelled: Comparison) -> tuple[Words, ...]:
    """Throughput and latency of the whole workload, and why two deployments differ."""
    served = [row for row in modelled.rows if row.record.serving]
    rows = _shown(replace(modelled, rows=tuple(served)), modelled.compared, _MOST_LINES)
    parts: list[Words] = [_served_table(modelled, rows)]
    verdict = results.workload
    if verdict is not None and verdict.causes_s:
        one, other = modelled.compared[:2]
        tps = (each.record.serving[0].output_tps.value for each in (other, one))
        before_us, after_us = (1e6 / each for each in tps)
        causes_us = {cause: 1e6 * seconds for cause, seconds in verdict.causes_s.items()}
        by_size = sorted(causes_us.items(), key=lambda each: -abs(each[1]))
        difference = difference_of(before_us, after_us, dict(by_size[:_MOST_CAUSES]))
        title = (
            f"Why, µs per output token: {other.name} {figures(before_us)} → {one.name} "
            f"{figures(after_us)}"
        )
        words = (f"{_short_in(cause)} {signed(us)}" for cause, us in difference.causes)
        parts.append(Figure("", (title, "  " + "   ".join(words))))
    notes = []
    if len(rows) < len(served):
        notes.append(f"{len(served) - len(rows)} more deployments: --full.")
    held = [
        f"{running:,} with {row.name}"
        for row in modelled.compared
        if (running := row.record.serving[0].num_running or 0) < modelled.num_seqs
    ]
    if held:
        how = "run at once within the limits" if limits_of(results) else "fit in memory at once"
        notes.append(
            f"Of {modelled.num_seqs:,} sequences, {', '.join(held)} {how}; the others wait."
        )
    notes += [
        f"{row.name}, at {counted(serving.num_running or 0, 'sequence')}, misses {missed}."
        for row in served
        for serving in row.record.serving
        if (missed := _missed(serving))
    ]
    if modelled.compared:
        notes.append(f"rel: against {modelled.compared[1].name}.")
    notes.append("TPOT and TTFT: means, in ms.")
    if judged := judge(modelled):
        notes += rounding((judged.one, judged.other))
    return (*parts, " ".join(notes))


def _missed(serving: ServingRecord) -> str:
    """`TPOT mean ≤ 20 ms with 31 ms`; empty where all limits are met."""
    return " and ".join(
        f"{each.slo} with {milliseconds(each.value)} ms"
        for each in serving.slos
        if each.value is not None and not each.is_met
    )


def _short_in(cause: str) -> str:
    """A cause in a phase, in a few words."""
    what, of, phase = cause.partition(" in ")
    return f"{short(what)}{of}{phase}"


def _served_table(modelled: Comparison, rows: Sequence[Row]) -> Table:
    """Throughput, latency and concurrent sequences of each deployment on the whole workload."""

    def mean(metric: str) -> Callable[[Row], Estimate | None]:
        def of(row: Row) -> Estimate | None:
            summary: Summary | None = getattr(row.record.serving[0], metric)
            return None if summary is None else summary.mean

        return of

    columns: list[Column[Row]] = [
        text("deployment", lambda row: row.name),
        number("tok/s", lambda row: row.record.serving[0].output_tps, compact),
        number("bounds", lambda row: row.record.serving[0].output_tps, compact_range),
        number("seqs at once", lambda row: row.record.serving[0].num_running, whole),
        number("TPOT", mean("tpot_s"), milliseconds),
        number("TTFT", mean("ttft_s"), milliseconds),
    ]
    if modelled.compared:
        best = modelled.compared[1].record.serving[0].output_tps.value
        columns.append(
            number("rel", lambda row: row.record.serving[0].output_tps.value / best, ratio)
        )
    return Table.of("", columns, rows)


def _parts(results: Results, comparison: Comparison, most_lines: int) -> tuple[Words, ...]:
    judged = judge(comparison)
    rows = _shown(comparison, comparison.compared, most_lines)
    parts: list[Words] = [_table(comparison, rows)]
    if judged is not None:
        parts.append(_why(comparison, judged))
    notes = []
    if len(rows) < len(comparison.rows):
        notes.append(f"{len(comparison.rows) - len(rows)} more deployments: --full.")
    if judged is not None:
        notes.append(f"rel: against {judged.other.name}.")
        if comparison.is_run and judged.has_interval:
            notes.append(_intervals(comparison, judged))
        notes += rounding((judged.one, judged.other))
    if comparison.source == "virtual" and any(len(r.step.tps_of_runs) > 1 for r in rows):
        notes.append(LOWER_OF_TWO)
    return (*parts, " ".join(notes)) if notes else tuple(parts)


def _intervals(comparison: Comparison, judged: Verdict) -> str:
    """Meaning of the intervals in the table and the first sentence."""
    virtual = comparison.virtual
    runs = f"90 %: interval of {judged.num_runs} runs; the other deployments ran twice."
    if len(comparison.rows) == len(comparison.compared):
        runs = f"90 %: interval of {judged.num_runs} runs."
    if virtual is None or not virtual.links:
        return f"{runs} In brackets: that of the ratio."
    return f"{runs} In brackets: that of the ratio, also for links half to twice as fast."


def _shown(comparison: Comparison, first: Sequence[Row], most: int) -> list[Row]:
    """The rows that there is room for: those compared, the first, and the fastest.

    Under shorter names where all of them would take more lines than `most`.

    Args:
        first: rows that are always shown.
    """
    rows = list(comparison.rows)
    if sum(math.ceil(len(row.name) / _LETTERS) for row in rows) <= most:
        return rows
    others = sorted(rows, key=lambda row: -row.tps)
    kept = list(dict.fromkeys(row.number for row in [*first, comparison.first, *others]))[:most]
    return [_shortened(row) for row in rows if row.number in kept]


def _shortened(row: Row) -> Row:
    """The row under a name short enough for a line, with its number."""
    if len(row.name) <= _LETTERS:
        return row
    name = f"#{row.number} {row.name}"[: _LETTERS - 1] + "…"
    return replace(row, record=replace(row.record, name=name))


def _table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    columns: list[Column[Row]] = [
        text("deployment", lambda row: row.name),
        number("tok/s", lambda row: row.tps, compact),
    ]
    if any(row.step.tps.low is not None for row in comparison.rows):
        range_of = "90 %" if comparison.is_run else "bounds"
        columns.append(number(range_of, lambda row: row.step.tps, compact_range))
    if comparison.phase is Phase.DECODE:
        columns.append(number("TPOT", lambda row: row.latency_s, milliseconds))
    columns.append(number("TTFT", lambda row: _ttft(row.record.prefill), milliseconds))
    if comparison.compared:
        by_number = {row.number: row for row in comparison.rows}  # under their whole names
        other = comparison.compared[1]
        columns.append(
            number("rel", lambda row: comparison.factor(by_number[row.number], other), ratio)
        )
    columns.append(text("largest cost", _largest))
    return Table.of("", columns, rows)


def _ttft(prefill: StepsRecord | None) -> Estimate | None:
    if prefill is None:
        return None
    return prefill.token_s.median if prefill.token_s else prefill.round_s


def _largest(row: Row) -> str | None:
    if not row.step.breakdown_s:
        return None
    cause, share = row.step.largest
    return f"{short(cause)} {percent(share)}"


def compact(amount: Amount) -> str:
    """Three digits, thousands as `k`."""
    value = likely(amount)
    return f"{figures(value / 1e3)}k" if value >= _THOUSANDS else figures(value)


def compact_range(estimate: Estimate) -> str:
    """`438–568`, `39.1–42.4k`; a dash where there is no range."""
    low, _, high = estimate.bounds
    if estimate.low is None or low == high:
        return NONE
    if high < _THOUSANDS:
        return f"{figures(low)}–{figures(high)}"
    return f"{figures(low / 1e3)}–{figures(high / 1e3)}k"


def _largest_causes(judged: Verdict) -> list[tuple[str, float]]:
    """Causes in milliseconds, as many as there is room for, and the sum of all others."""
    first = (*judged.reasons[:1], *judged.counter[:1])  # the largest of each kind stay
    others = (*judged.reasons[1:], *judged.counter[1:])
    by_size = sorted(others, key=lambda each: -abs(each[1].value))
    kept = dict((*first, *by_size[: _MOST_CAUSES - len(first)]))
    all_ms = dict((*judged.reasons, *judged.counter))
    causes_ms = {cause: ms.value for cause, ms in all_ms.items() if cause in kept}
    one_ms, other_ms = (1e3 * seconds for seconds in judged.steps_s)
    rest = dict(difference_of(other_ms, one_ms, causes_ms).causes).get(OTHER)
    return [*causes_ms.items(), *([(OTHER, rest)] if rest else [])]


def _why(comparison: Comparison, judged: Verdict) -> Figure | str:
    """Difference of two steps in milliseconds: what makes one faster, then what it pays."""
    one, other = judged.one, judged.other
    what = "step" if comparison.phase is Phase.DECODE else "prefill"
    title = (
        f"Why, ms per {what}: {other.name} {milliseconds(judged.steps_s[1])} → {one.name} "
        f"{milliseconds(judged.steps_s[0])}"
    )
    if not judged.reasons and not judged.counter:
        return f"{title}; no cause differs by more than its noise."
    words = (f"{short(cause)} {signed(ms)}" for cause, ms in _largest_causes(judged))
    return Figure("", (title, "  " + "   ".join(words)))
