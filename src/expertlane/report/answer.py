"""The answer of a comparison: what fits on one screen of 80 columns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from expertlane.report.compared import Comparison, Row
from expertlane.report.difference import OTHER, difference_of
from expertlane.report.document import Answer, Column, Figure, Table, Words, number, text
from expertlane.report.numbers import (
    NONE,
    counted,
    figures,
    low_high,
    milliseconds,
    percent,
    signed,
    whole,
)
from expertlane.report.setup import foreign_load, how_judged
from expertlane.report.speed import in_words
from expertlane.report.verdict import Verdict, headline, in_wall_time, judge, ratio, rounding
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import EXPERIMENT, StepsRecord
from expertlane.results.results import Results
from expertlane.spec.names import Cause, Phase, ProjectedCause

_MOST_LINES, _FEWER_LINES = 16, 8  # of a table; of one that has another below it
_LETTERS = 22  # of a name, for which there is room on a line
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
    """What was measured, then what was projected; one of the two may be missing.

    Args:
        name: of the experiment, with what was changed in it.
        own: on the clock that the verdict goes by.
        wall: in wall time, where that is another clock.
    """
    if own is None:
        assert modelled is not None, "something was measured or projected"
        setting = f"{name} | {_projected_setting(results, modelled)}"
        served = workload_headline(results)
        if served is None:
            only = _parts(results, modelled, _MOST_LINES - 1)
            return Answer(setting, headline(modelled, results), (*only, how_judged(results)))
        step = (
            f"One decode step of {modelled.num_seqs:,} sequences at {modelled.context:,} tokens of "
            f"context: {headline(modelled, results)}"
        )
        of_step = _parts(results, modelled, _FEWER_LINES)
        workload = _whole_workload(modelled)
        return Answer(setting, served, (workload, step, *of_step, how_judged(results)))
    machine = results.measured_on
    cores = counted(machine.num_cores, "core") if machine.device == "cpu" else machine.device
    ranks = counted(machine.num_ranks, "rank")
    setting = f"{name} | {ranks} on {cores} | {_clock(results, own)}"
    busy = foreign_load(results)
    parts: tuple[Words, ...] = (busy,) if busy else ()
    room = _FEWER_LINES if modelled else _MOST_LINES
    parts += _parts(results, own, room - 2 * len(parts))
    if wall is not None and (beside := in_wall_time(wall, results)):
        parts += (beside,)
    if modelled is not None:
        judged = judge(modelled)
        parts += (
            f"Also projected ({_projected_setting(results, modelled)}): "
            f"{headline(modelled, results)} {how_judged(results)}",
            _table(modelled, judged, _shown(modelled, judged, len(modelled.cast))),
        )
    return Answer(setting, headline(own, results), parts)


def _clock(results: Results, own: Comparison) -> str:
    virtual = results.virtual_time
    if own.source != "virtual" or virtual is None:
        return "wall time"
    if virtual.links is None:
        return "virtual time without links"
    scaled = "scaled from" if (virtual.scale, virtual.byte_scale) != (1, 1) else "of"
    return f"virtual time, links {scaled} {virtual.links}"


def _projected_setting(results: Results, modelled: Comparison) -> str:
    workload = results.question["experiment"]["workload"]
    return (
        f"{results.projected_for.name}, {in_words(modelled.conditions)}, "
        f"{workload['num_sequences']:,} × {workload['prompt_len']:,} in / "
        f"{workload['output_len']:,} out"
    )


def workload_headline(results: Results) -> str | None:
    """What the whole workload comes to, against the first deployment and the best of the others."""
    found = results.workload
    if found is None:
        return None
    own = {each.name: each for each in results.select("projected", EXPERIMENT) if each.serving}
    tps = own[found.name].serving[0].output_tps
    said = f"{found.name} serves {figures(tps)} tokens/s of the whole workload ({low_high(tps)})"
    against = []
    if found.over_first is not None:
        is_best = " and best of the others" if found.other == found.first else ""
        against.append(f"{_factor(found.over_first)} {found.first}, the first{is_best}")
    if found.over_other is not None and found.other != found.first:
        against.append(f"{_factor(found.over_other)} {found.other}, the best of the others")
    return f"{said}{': ' if against else ''}{'; '.join(against)}."


def _factor(over: Estimate) -> str:
    low, value, high = over.bounds
    within = " (within error)" if low <= 1 <= high else ""
    return f"{ratio(value)}× ({ratio(low)}–{ratio(high)}){within} that of"


def _whole_workload(modelled: Comparison) -> Table:
    """How each deployment serves it: with how many sequences, how fast."""
    served = [row for row in modelled.rows if row.record.serving]
    most = modelled.num_seqs

    def of(metric: str) -> Callable[[Row], Estimate | None]:
        def mean(row: Row) -> Estimate | None:
            summary: Summary | None = getattr(row.record.serving[0], metric)
            return None if summary is None else summary.mean

        return mean

    columns: list[Column[Row]] = [
        text("the whole workload", lambda row: row.name),
        number("tok/s", lambda row: row.record.serving[0].output_tps, compact_of),
        number("bounds", lambda row: row.record.serving[0].output_tps, compact_range),
        number(f"seqs of {most:,}", lambda row: row.record.serving[0].num_running, whole),
        number("TPOT", of("tpot_s"), milliseconds),
        number("TTFT", of("ttft_s"), milliseconds),
    ]
    return Table.of("", columns, served)


def _parts(results: Results, comparison: Comparison, most_lines: int) -> tuple[Words, ...]:
    judged = judge(comparison)
    rows = _shown(comparison, judged, most_lines)
    parts: list[Words] = [_table(comparison, judged, rows)]
    if judged is not None:
        parts.append(_why(comparison, judged))
    notes = []
    if len(rows) < len(comparison.rows):
        notes.append(f"{len(comparison.rows) - len(rows)} more deployments: --full.")
    if judged is not None:
        notes.append(f"rel: against {judged.other.name}.")
        if comparison.is_run and judged.has_interval:
            notes.append("In brackets: 90 % intervals.")
        notes += rounding((judged.one, judged.other))
    if comparison.source == "virtual" and any(len(r.step.tps_of_runs) > 1 for r in rows):
        notes.append(
            "min–max: single runs; tok/s lies at their top since virtual time drops disturbances: "
            "each computation takes the shorter of two measurements."
        )
        if comparison.pair:
            notes.append("The factor and Why take the shortest of all.")
    return (*parts, " ".join(notes)) if notes else tuple(parts)


def _shown(comparison: Comparison, judged: Verdict | None, most: int) -> list[Row]:
    """The rows that there is room for: the two of the verdict, the first, and the fastest.

    Under shorter names where all of them would take more lines than `most`.
    """
    rows = list(comparison.rows)
    if sum(math.ceil(len(row.name) / _LETTERS) for row in rows) <= most:
        return rows
    pair = [judged.one, judged.other] if judged else []
    others = sorted((row for row in rows if row not in pair), key=lambda row: -row.tps)
    kept = list(dict.fromkeys(row.number for row in [*pair, comparison.first, *others]))[:most]
    return [_shortened(row) for row in rows if row.number in kept]


def _shortened(row: Row) -> Row:
    """Under a name for which there is room on a line, with the number that tells it from others."""
    if len(row.name) <= _LETTERS:
        return row
    name = f"#{row.number} {row.name}"[: _LETTERS - 1] + "…"
    return replace(row, record=replace(row.record, name=name))


def _table(comparison: Comparison, judged: Verdict | None, rows: Sequence[Row]) -> Table:
    is_decode = comparison.phase is Phase.DECODE
    is_run = comparison.is_run
    columns: list[Column[Row]] = [
        text("deployment", lambda row: row.name),
        number("tok/s", lambda row: row.tps, compact),
        number("min–max" if is_run else "bounds", lambda row: row.tps_range, compact_range),
    ]
    if is_decode:
        columns += [number("TPOT", lambda row: row.latency_s, milliseconds)]
        if is_run:
            columns += [number("p95", _p95, milliseconds)]
    columns += [number("TTFT", lambda row: _ttft(row.record.prefill), milliseconds)]
    if judged is not None:
        columns += [number("rel", lambda row: comparison.factor(row, judged.other), ratio)]
    columns += [text("largest cost", _largest)]
    return Table.of("", columns, rows)


def _p95(row: Row) -> Estimate | None:
    return row.step.token_s.p95 if row.step.token_s else None


def _ttft(prefill: StepsRecord | None) -> Estimate | None:
    if prefill is None:
        return None
    return prefill.token_s.median if prefill.token_s else prefill.round_s


def _largest(row: Row) -> str | None:
    if not row.step.breakdown_s:
        return None
    cause, share = row.step.largest
    return f"{short(cause)} {percent(share)}"


def compact_of(estimate: Estimate) -> str:
    """The likely value, as `compact`."""
    return compact(estimate.value)


def compact(value: float) -> str:
    """Three digits, thousands as `k`."""
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
    """In milliseconds, those that there is room for and all others added up."""
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
    """How the one's step differs, in milliseconds: what makes it faster, then what it pays."""
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
