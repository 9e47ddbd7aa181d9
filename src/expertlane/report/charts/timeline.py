"""What every rank does when in one step: a row a rank, deployments on one time axis."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from expertlane.report.charts.colours import BUBBLE, OF_STAGE
from expertlane.report.charts.encoding import Spec, colour, quantity, tooltip
from expertlane.report.document import Chart, Heading, Legend, Table, Timelines
from expertlane.report.numbers import counted, milliseconds, percent
from expertlane.results.timeline import RankTimeline, StepTimeline
from expertlane.spec.names import Stage, Track

_LANE_PX, _LEAST_PX = 7, 36
_NUM_OPEN = 3
_US_PER_MS = 1e3
_US_PER_S = 1e6
_UNSHOWN = {"idle", "setup"}
_WAITS = "waits"


def timelines_chart(
    title: str,
    timelines: Mapping[str, tuple[StepTimeline, str]],
    first: Collection[str] = (),
    *,
    is_measured: bool = False,
) -> Timelines:
    """One a deployment, all over the same stretch of time.

    Args:
        timelines: by deployment, at least one, each with what more there is to say of it.
        first: the deployments that are seen at once; the first few if there is none.
        is_measured: a rank's lower row is then its waiting, not transfers of a model.
    """
    until_ms = max(step.shown_us for step, _ in timelines.values()) / _US_PER_MS
    seen = [name for name in timelines if name in first] or list(timelines)[:_NUM_OPEN]
    charts = [
        (name, _chart(name, _measured(step) if is_measured else step, until_ms, note))
        for name, (step, note) in timelines.items()
    ]
    return Timelines(title, tuple(charts), frozenset(seen))


def _measured(step: StepTimeline) -> StepTimeline:
    """A rank's lower row are its waits; those in PP send/recv are the bubble of its pipeline."""
    network = step.tracks.index(Track.NETWORK.value)
    hand_over, bubble = step.stages.index(Stage.HAND_OVER.label), len(step.stages)
    ranks = tuple(
        replace(
            rank,
            stage=tuple(
                bubble if (track, stage) == (network, hand_over) else stage
                for track, stage in zip(rank.track, rank.stage, strict=True)
            ),
        )
        for rank in step.ranks
    )
    tracks = (_WAITS if place == network else name for place, name in enumerate(step.tracks))
    return replace(step, ranks=ranks, tracks=tuple(tracks), stages=(*step.stages, BUBBLE))


def _used(step: StepTimeline) -> list[int]:
    """Places of the stages that are drawn."""
    places = {place for rank in step.ranks for place in rank.stage}
    return [place for place in sorted(places) if step.stages[place] not in _UNSHOWN]


def _chart(name: str, step: StepTimeline, until_ms: float, note: str) -> Chart:
    stages = [step.stages[place] for place in _used(step)]
    legend = [Legend(stage, OF_STAGE[stage]) for stage in stages]
    tracks = [
        track
        for place, track in enumerate(step.tracks)
        if any(place in rank.track for rank in step.ranks)
    ]
    lower = "what it waited for" if _WAITS in step.tracks else "its transfers"
    return Chart(
        name,
        f"A row for each of {counted(len(step.ranks), 'rank')}: what it computed above, {lower} "
        f"below, over {_extent(step)}. {_extremes(step)} Arrow keys move along the time axis, "
        "plus and minus zoom, 0 shows all.",
        _spec(legend, tracks, len(step.ranks)),
        _table(name, step),
        legend=legend,
        note=" ".join(filter(None, (_note(step), note))),
        data={
            "until_ms": until_ms,
            "stages": step.stages,
            "tracks": step.tracks,
            "ranks": list(map(vars, step.ranks)),
        },
    )


def _extent(step: StepTimeline) -> str:
    whole = f"{milliseconds(step.end_us / _US_PER_S)} ms"
    if not step.is_cut:
        return whole
    return f"the first {milliseconds(step.shown_us / _US_PER_S)} of {whole}"


def _spec(legend: list[Legend], tracks: list[str], num_ranks: int) -> Spec:
    return {
        "data": {"name": "events"},
        "height": max(_LEAST_PX, _LANE_PX * len(tracks) * num_ranks),
        "params": [{"name": "from_ms", "value": 0}, {"name": "to_ms", "value": 1}],
        "mark": {"type": "rect", "clip": True},
        "encoding": {
            "x": quantity(
                "begin",
                "ms",
                domainMin={"expr": "from_ms"},
                domainMax={"expr": "to_ms"},
                nice=False,
                zero=False,
            ),
            "x2": {"field": "end"},
            "y": {
                "field": "rank",
                "type": "ordinal",
                "title": "rank",
                "axis": {"ticks": False, "domain": False, "labelOverlap": True},
                "scale": {"paddingInner": 0.15},
            },
            "yOffset": {
                "field": "track",
                "type": "nominal",
                "sort": tracks,
                "scale": {"domain": tracks},
            },
            "color": colour("stage", legend),
            "tooltip": tooltip(
                stage="stage",
                where="rank",
                track="row",
                layer="layer",
                micro_batch="micro-batch",
                begins="begins at",
                takes="takes",
            ),
        },
    }


def _busy_us(rank: RankTimeline, step: StepTimeline) -> float:
    compute = step.tracks.index(Track.COMPUTE.value)
    return sum(
        duration
        for track, stage, duration in zip(rank.track, rank.stage, rank.duration_us, strict=True)
        if track == compute and step.stages[stage] not in _UNSHOWN
    )


def _extremes(step: StepTimeline) -> str:
    whole_us = step.shown_us
    busy = {rank.rank: _busy_us(rank, step) for rank in step.ranks}
    most, least = max(busy, key=lambda rank: busy[rank]), min(busy, key=lambda rank: busy[rank])
    return (
        f"Busiest is rank {most}, which computes {percent(busy[most] / whole_us)} of it; "
        f"least busy rank {least}, {percent(busy[least] / whole_us)}."
    )


def _note(step: StepTimeline) -> str:
    notes = [f"{counted(step.num_tokens, 'token')} of {counted(step.num_seqs, 'sequence')}."]
    if len(step.ranks) < step.num_ranks:
        notes.append(f"{len(step.ranks)} of {step.num_ranks} ranks are drawn, evenly chosen.")
    if step.is_cut:
        notes.append(f"Drawn, and in the table and the trace: {_extent(step)}.")
    return " ".join(notes)


def _table(name: str, step: StepTimeline) -> Table:
    """Milliseconds of every rank by stage; stretches that overlap count each."""
    rows = []
    for rank in step.ranks:
        spent_us = np.bincount(rank.stage, rank.duration_us, len(step.stages))[_used(step)]
        rows.append((str(rank.rank), *map(milliseconds, spent_us / _US_PER_S)))
    columns = tuple(map(Heading, ["rank", *(step.stages[place] for place in _used(step))]))
    of_part = f", {_extent(step)}" if step.is_cut else ""
    return Table(f"{name}: ms by stage{of_part}", columns, tuple(rows))
