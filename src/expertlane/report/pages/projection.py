"""The plots of a projection, apart from all that was measured."""

from collections.abc import Iterable, Sequence
from typing import Literal

from expertlane.report.charts.bars import Bar, causes_chart, speed_chart
from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.charts.timeline import timelines_chart
from expertlane.report.document import Chart, PageSection, Tabs, Timelines
from expertlane.report.paper import HARDWARE, ROWS, is_papers_experiment
from expertlane.report.projected_rows import (
    at_context,
    baselines,
    conditions_in_words,
    fastest,
    numbers,
    proposals,
)
from expertlane.report.projected_verdict import headline as first_sentence
from expertlane.results.projection import (
    Estimate,
    Planned,
    ProjectedDeployment,
    Projection,
    StepProjection,
)
from expertlane.results.schema import Results
from expertlane.spec.names import Phase

_MS_PER_S = 1e3


def headline(projection: Projection) -> str:
    """The verdict in a sentence."""
    sentence = first_sentence(projection, projection.top_ks[0])
    return f"Projected for {projection.cluster}, {sentence[0].lower()}{sentence[1:]}"


def sections(results: Results) -> tuple[PageSection, ...]:
    """All plots, under the usual conditions unless a plot says otherwise."""
    projection = results.projection
    assert projection is not None, "the caller looked"
    rows = projection.usual(projection.top_ks[0])
    what = f"projected for {projection.cluster} ({conditions_in_words(rows[0].conditions)})"
    parts = (
        PageSection(f"Speed, {what}", _speed(projection, rows)),
        PageSection(f"Where the time goes, {what}", _causes(projection, rows)),
        PageSection(f"One step, rank by rank, {what}", _timelines(projection, rows)),
        PageSection(f"Context and batch, {what}", _latency(projection, rows)),
        PageSection(f"Scaling, {what}", _scaling(projection)),
        PageSection(
            f"Throughput against latency, projected for {projection.cluster}",
            tuple(
                _pareto(projection, planned, is_papers=is_papers_experiment(results))
                for planned in projection.planned
                if planned.pareto
            ),
        ),
    )
    return tuple(part for part in parts if part.parts)


def point(x: float, estimate: Estimate, scale: float = 1.0, words: str = "") -> Point:
    """An estimate at a place."""
    return Point(x, scale * estimate.value, scale * estimate.low, scale * estimate.high, words)


def _speed(projection: Projection, rows: Sequence[ProjectedDeployment]) -> tuple[Tabs, ...]:
    named = _named(projection, rows)
    decode = [_bar(name, row, at_context(projection, row)) for name, row in named.items()]
    charts = [
        (
            "decode",
            speed_chart(
                f"Decode tokens a second at {projection.context:,} tokens of context",
                "decode tokens/s",
                decode,
                between="low–high",
            ),
        )
    ]
    prefill = [
        _bar(name, row, row.prefill) for name, row in named.items() if row.prefill is not None
    ]
    if prefill:
        chart = speed_chart(
            "Prefill tokens a second", "prefill tokens/s", prefill, between="low–high"
        )
        charts.append(("prefill", chart))
    return (Tabs("Speed", tuple(charts)),)


def _named(
    projection: Projection, rows: Sequence[ProjectedDeployment]
) -> dict[str, ProjectedDeployment]:
    """With the number that tables have, so that names cut short can be told apart."""
    place = numbers(projection)
    return {f"#{place[row.name]} {row.name}": row for row in rows}


def _cast(projection: Projection, rows: Sequence[ProjectedDeployment]) -> list[str]:
    """The names of the first, the best baseline and the best proposal."""
    cast = [rows[0], fastest(projection, baselines(rows))]
    cast += [fastest(projection, proposals(rows))] if proposals(rows) else []
    return [row.name for row in cast]


def _bar(name: str, row: ProjectedDeployment, step: StepProjection) -> Bar:
    return Bar(name, step.tps.value, row.is_baseline, step.tps.low, step.tps.high)


def step_seconds(step: StepProjection) -> dict[str, float]:
    """Seconds of a step by cause."""
    return {cause: share * step.step_s.value for cause, share in step.shares.items()}


def _causes(projection: Projection, rows: Sequence[ProjectedDeployment]) -> tuple[Tabs, ...]:
    note = "Likely values, mean over GPUs. Reads: of operations that memory bounds."
    named = _named(projection, rows)
    decode = {name: step_seconds(at_context(projection, row)) for name, row in named.items()}
    prefill = {
        name: step_seconds(row.prefill) for name, row in named.items() if row.prefill is not None
    }
    charts = [
        (name, causes_chart(f"Time of a {name} step by cause", seconds, note=note))
        for name, seconds in (("decode", decode), ("prefill", prefill))
        if seconds
    ]
    return (Tabs("Time by cause", tuple(charts)),)


def _timelines(
    projection: Projection, rows: Sequence[ProjectedDeployment]
) -> tuple[Timelines | str, ...]:
    named, cast = _named(projection, rows), _cast(projection, rows)
    first = [name for name, row in named.items() if row.name in cast]
    parts: list[Timelines | str] = []
    for phase in (Phase.DECODE, Phase.PREFILL):
        steps = {
            name: row.timelines[phase] for name, row in named.items() if phase in row.timelines
        }
        if steps:
            parts.append(timelines_chart(f"One {phase} step", steps, first))
    if parts:
        parts.insert(
            0,
            "A step in the steady state of each deployment, all on the same time axis; of rotating "
            "micro-batches one of each, which lie over the round before and after. Upper half of "
            "a row: what the GPU computes; lower half: its transfers. Gaps are idle.",
        )
    return tuple(parts)


def _latency(projection: Projection, rows: Sequence[ProjectedDeployment]) -> tuple[Chart, ...]:
    def curve(row: ProjectedDeployment, points: Iterable[Point]) -> Curve:
        is_seen = row.name in _cast(projection, rows)
        return Curve(
            row.name,
            tuple(points),
            role="front" if is_seen else "back",
            is_dashed=row.is_baseline,
        )

    by_context = [
        curve(
            row,
            (
                point(step.context, step.step_s, _MS_PER_S, _fit(step))
                for step in row.decode
                if step.num_tokens == projection.num_sequences
            ),
        )
        for row in rows
    ]
    by_batch = [
        curve(
            row,
            (point(step.num_tokens, step.step_s, _MS_PER_S, _fit(step)) for step in row.by_batch),
        )
        for row in rows
        if row.by_batch
    ]
    charts = [
        curves_chart(
            f"TPOT against context, {projection.num_sequences:,} sequences",
            Axis("tokens of context", "log"),
            Axis("TPOT, ms", "log"),
            by_context,
            note="Lines through the points: low to high. Dashed: baselines.",
        )
    ]
    if by_batch:
        charts.append(
            curves_chart(
                f"TPOT against batch, {projection.context:,} tokens of context",
                Axis("sequences", "log"),
                Axis("TPOT, ms", "log"),
                by_batch,
                note="Sequences of the whole system, one token each a step. Dashed: baselines.",
            )
        )
    return tuple(charts)


def _scaling(projection: Projection) -> tuple[Chart, ...]:
    if not projection.scaling:
        return ()
    work = [
        point(each.num_ranks, each.same_work.tps, words=_fit(each.same_work))
        for each in projection.scaling
    ]
    share = [
        point(each.num_ranks, each.same_share.tps, words=_fit(each.same_share))
        for each in projection.scaling
    ]
    curves = [
        Curve("the same sequences", tuple(work)),
        Curve("as many sequences a GPU", tuple(share)),
    ]
    return (
        curves_chart(
            "Decode tokens a second by the number of GPUs",
            Axis("GPUs", "log"),
            Axis("tokens/s", "log"),
            curves,
            note="One expert-parallel group of all GPUs; linear scaling is a straight line "
            "that rises tenfold over a tenfold of GPUs.",
        ),
    )


def _fit(step: StepProjection) -> str:
    return "" if step.fits else "does not fit"


def _pareto(projection: Projection, planned: Planned, *, is_papers: bool) -> Chart:
    curves = [
        Curve(
            "the planner's front",
            tuple(
                point(
                    _MS_PER_S * each.tpot_s.value,
                    each.tps,
                    words=f"{each.name}, {each.num_seqs:,} at once",
                )
                for each in planned.pareto
            ),
        )
    ]
    rows = projection.usual(planned.top_k)
    cast = _cast(projection, rows)
    for row in rows:
        step = at_context(projection, row)
        at = point(_MS_PER_S * step.step_s.value, step.tps, words=_fit(step))
        role: Literal["front", "back"] = "front" if row.name in cast else "back"
        curves.append(Curve(row.name, (at,), is_joined=False, role=role))
    note = (
        f"Decoding alone, at {projection.context:,} tokens of context. No deployment of one pool "
        "is above and left of the front, which is screened. The experiment's own have all "
        f"{projection.num_sequences:,} sequences."
    )
    if is_papers:
        curves += [
            Curve(
                f"reported by the paper: {row.name}",
                (Point(row.tpot_ms, row.tps, words="unchecked"),),
                is_joined=False,
                role="reported",
            )
            for row in ROWS
        ]
        note += f" Stars: as the paper reports for {HARDWARE}; neither projected nor checked."
    return curves_chart(
        f"Decode tokens a second against TPOT, top-{planned.top_k}",
        Axis("TPOT, ms", "log"),
        Axis("decode tokens/s", "log"),
        curves,
        note=note,
    )
