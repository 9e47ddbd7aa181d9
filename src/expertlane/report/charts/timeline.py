"""What every rank does when in one step: a row a rank, deployments on one time axis."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

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
    timelines: Mapping[str, StepTimeline],
    first: Collection[str] = (),
    *,
    notes: Mapping[str, str] | None = None,
    is_measured: bool = False,
) -> Timelines:
    """One a deployment, all over the same stretch of time.

    Args:
        timelines: by deployment, at least one.
        first: the deployments that are seen at once; the first few if there is none.
        notes: more to say of a deployment's step.
        is_measured: a rank's lower row is then its waiting, not transfers of a model.
    """
    until_ms = max(each.shown_us for each in timelines.values()) / _US_PER_MS
    seen = [name for name in timelines if name in first] or list(timelines)[:_NUM_OPEN]
    charts = []
    for name, step in timelines.items():
        shown = _Shown.of(step, is_measured=is_measured)
        charts.append((name, _chart(name, shown, until_ms, (notes or {}).get(name, ""))))
    return Timelines(title, tuple(charts), frozenset(seen))


class _Shown(NamedTuple):
    """A step, with what its rows and stages are called.

    Attributes:
        stages: those of the step, and of a measured one the pipeline bubble.
    """

    step: StepTimeline
    tracks: list[str]
    stages: list[str]

    @classmethod
    def of(cls, step: StepTimeline, *, is_measured: bool) -> "_Shown":
        """A measured rank's waits in a hand-over are the bubble of its pipeline."""
        if not is_measured:
            return cls(step, list(step.tracks), list(step.stages))
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
        tracks = [_WAITS if place == network else name for place, name in enumerate(step.tracks)]
        stages = (*step.stages, BUBBLE)
        return cls(replace(step, ranks=ranks, stages=stages), tracks, list(stages))

    @property
    def used(self) -> list[int]:
        """Places of the stages that are drawn."""
        places = {place for rank in self.step.ranks for place in rank.stage}
        return [place for place in sorted(places) if self.stages[place] not in _UNSHOWN]

    @property
    def is_cut(self) -> bool:
        """Whether only its beginning is there."""
        return self.step.shown_us < self.step.end_us


def _chart(name: str, shown: _Shown, until_ms: float, note: str) -> Chart:
    step = shown.step
    stages = [shown.stages[place] for place in shown.used]
    legend = [Legend(stage, OF_STAGE[stage]) for stage in stages]
    tracks = [
        track
        for place, track in enumerate(shown.tracks)
        if any(place in rank.track for rank in step.ranks)
    ]
    lower = "what it waited for" if _WAITS in shown.tracks else "its transfers"
    return Chart(
        name,
        f"A row for each of {counted(len(step.ranks), 'rank')}: what it computed above, {lower} "
        f"below, over {_extent(shown)}. {_extremes(shown)} Arrow keys move along the time axis, "
        "plus and minus zoom, 0 shows all.",
        _spec(legend, tracks, len(step.ranks)),
        _table(name, shown),
        legend=legend,
        note=" ".join(filter(None, (_note(shown), note))),
        data={
            "until_ms": until_ms,
            "stages": shown.stages,
            "tracks": shown.tracks,
            "ranks": [_compact(rank) for rank in step.ranks],
        },
    )


def _extent(shown: _Shown) -> str:
    whole = f"{milliseconds(shown.step.end_us / _US_PER_S)} ms"
    if not shown.is_cut:
        return whole
    return f"the first {milliseconds(shown.step.shown_us / _US_PER_S)} of {whole}"


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


def _busy_us(rank: RankTimeline, shown: _Shown) -> float:
    compute = shown.step.tracks.index(Track.COMPUTE.value)
    return sum(
        duration
        for track, stage, duration in zip(rank.track, rank.stage, rank.duration_us, strict=True)
        if track == compute and shown.stages[stage] not in _UNSHOWN
    )


def _extremes(shown: _Shown) -> str:
    whole_us = shown.step.shown_us
    busy = {rank.rank: _busy_us(rank, shown) for rank in shown.step.ranks}
    most, least = max(busy, key=lambda rank: busy[rank]), min(busy, key=lambda rank: busy[rank])
    return (
        f"Busiest is rank {most}, which computes {percent(busy[most] / whole_us)} of it; "
        f"least busy rank {least}, {percent(busy[least] / whole_us)}."
    )


def _note(shown: _Shown) -> str:
    step = shown.step
    notes = [f"{counted(step.num_tokens, 'token')} of {counted(step.num_seqs, 'sequence')}."]
    if len(step.ranks) < step.num_ranks:
        notes.append(f"{len(step.ranks)} of {step.num_ranks} ranks are drawn, evenly chosen.")
    if shown.is_cut:
        notes.append(f"Drawn, and in the table and the trace: {_extent(shown)}.")
    return " ".join(notes)


def _table(name: str, shown: _Shown) -> Table:
    """Milliseconds of every rank by stage; stretches that overlap count each."""
    rows = []
    for rank in shown.step.ranks:
        spent = dict.fromkeys(shown.used, 0.0)
        for stage, duration in zip(rank.stage, rank.duration_us, strict=True):
            if stage in spent:
                spent[stage] += duration
        rows.append((str(rank.rank), *(milliseconds(each / _US_PER_S) for each in spent.values())))
    columns = tuple(map(Heading, ["rank", *(shown.stages[place] for place in shown.used)]))
    of_part = f", {_extent(shown)}" if shown.is_cut else ""
    return Table(f"{name}: ms by stage{of_part}", columns, tuple(rows))
