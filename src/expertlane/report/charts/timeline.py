"""What every rank does when in one step: a row a rank, deployments on one time axis."""

from collections.abc import Collection, Mapping
from typing import Any

from expertlane.report.charts.colours import OF_STAGE
from expertlane.report.charts.encoding import Spec, colour, tooltip
from expertlane.report.document import Chart, Legend, Table, Timelines, number, text
from expertlane.report.numbers import counted, milliseconds, percent
from expertlane.results.timeline import RankTimeline, StepTimeline
from expertlane.spec.names import Track

_LANE_PX, _LEAST_PX = 7, 36
_NUM_OPEN = 3
_US_PER_MS = 1e3
_US_PER_S = 1e6
_UNSHOWN = {"idle", "setup"}


def timelines_chart(
    title: str, timelines: Mapping[str, StepTimeline], first: Collection[str]
) -> Timelines:
    """One a deployment, all over the same stretch of time.

    Args:
        timelines: by deployment, at least one.
        first: the deployments that are seen at once; the first few if there is none.
    """
    until_ms = max(each.shown_us for each in timelines.values()) / _US_PER_MS
    seen = [name for name in timelines if name in first] or list(timelines)[:_NUM_OPEN]
    return Timelines(
        title,
        tuple((name, _chart(name, step, until_ms)) for name, step in timelines.items()),
        frozenset(seen),
    )


def _chart(name: str, step: StepTimeline, until_ms: float) -> Chart:
    used = {place for rank in step.ranks for place in rank.stage}
    stages = [
        label for place, label in enumerate(step.stages) if place in used and label not in _UNSHOWN
    ]
    tracks = [
        track
        for place, track in enumerate(step.tracks)
        if any(place in rank.track for rank in step.ranks)
    ]
    return Chart(
        name,
        f"A row for each of {counted(len(step.ranks), 'rank')}: what it computed above, what it "
        f"sent or waited for below, over {milliseconds(step.end_us / _US_PER_S)} ms. "
        + _extremes(step),
        _spec(stages, tracks, len(step.ranks)),
        _table(name, step),
        legend=tuple(Legend(stage, OF_STAGE[stage]) for stage in stages),
        note=_note(step),
        data={
            "until_ms": until_ms,
            "stages": list(step.stages),
            "tracks": list(step.tracks),
            "ranks": [_compact(rank) for rank in step.ranks],
        },
    )


def _spec(stages: list[str], tracks: list[str], num_ranks: int) -> Spec:
    return {
        "data": {"name": "events"},
        "height": max(_LEAST_PX, _LANE_PX * len(tracks) * num_ranks),
        "params": [{"name": "from_ms", "value": 0}, {"name": "to_ms", "value": 1}],
        "mark": {"type": "rect", "clip": True},
        "encoding": {
            "x": {
                "field": "begin",
                "type": "quantitative",
                "title": "ms",
                "scale": {
                    "domainMin": {"expr": "from_ms"},
                    "domainMax": {"expr": "to_ms"},
                    "nice": False,
                    "zero": False,
                },
            },
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
            "color": colour("stage", stages, [OF_STAGE[stage] for stage in stages]),
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


def _compact(rank: RankTimeline) -> dict[str, Any]:
    """Columns, as the page's script reads them."""
    return {
        "rank": rank.rank,
        "track": rank.track,
        "stage": rank.stage,
        "layer": rank.layer,
        "micro_batch": rank.micro_batch,
        "begin": rank.begin_us,
        "duration": rank.duration_us,
    }


def _busy_us(rank: RankTimeline, step: StepTimeline) -> float:
    compute = step.tracks.index(Track.COMPUTE.value)
    return sum(
        duration
        for track, stage, duration in zip(rank.track, rank.stage, rank.duration_us, strict=True)
        if track == compute and step.stages[stage] not in _UNSHOWN
    )


def _extremes(step: StepTimeline) -> str:
    busy = {rank.rank: _busy_us(rank, step) for rank in step.ranks}
    most, least = max(busy, key=lambda rank: busy[rank]), min(busy, key=lambda rank: busy[rank])
    return (
        f"Busiest is rank {most}, which computes {percent(busy[most] / step.shown_us)} of it; "
        f"least busy rank {least}, {percent(busy[least] / step.shown_us)}."
    )


def _note(step: StepTimeline) -> str:
    notes = [f"{counted(step.num_tokens, 'token')} of {counted(step.num_seqs, 'sequence')}."]
    if len(step.ranks) < step.num_ranks:
        notes.append(f"{len(step.ranks)} of {step.num_ranks} ranks are drawn, evenly chosen.")
    if step.shown_us < step.end_us:
        notes.append(
            f"Drawn are the first {milliseconds(step.shown_us / _US_PER_S)} of "
            f"{milliseconds(step.end_us / _US_PER_S)} ms."
        )
    return " ".join(notes)


def _table(name: str, step: StepTimeline) -> Table:
    """Milliseconds of every rank by stage; stretches that overlap count each."""
    used = sorted({place for rank in step.ranks for place in rank.stage})
    places = [place for place in used if step.stages[place] not in _UNSHOWN]
    rows = []
    for rank in step.ranks:
        spent = dict.fromkeys(places, 0.0)
        for stage, duration in zip(rank.stage, rank.duration_us, strict=True):
            if stage in spent:
                spent[stage] += duration
        rows.append((str(rank.rank), *(milliseconds(each / _US_PER_S) for each in spent.values())))
    columns = (number("rank"), *(number(step.stages[place]) for place in places))
    return (
        Table(f"{name}: ms by stage", columns, tuple(rows))
        if places
        else Table(name, (text("rank"),), ())
    )
