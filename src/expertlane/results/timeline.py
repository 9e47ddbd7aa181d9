"""Timelines of every rank: of one step, for a report's plots; of many, as Chrome traces.

A trace, for Perfetto or chrome://tracing, has a process for every rank, with a row for each
`Track`. Measured steps show a rank's own work on the compute row and its waits for others on the
network row; modelled ones show the transfers there. Ranks of one host share a clock; those of other
hosts stand where their own clock puts them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.results.step_record import RankEvents, StepRecord
from expertlane.spec.files import strict_json, write_text
from expertlane.spec.names import Phase, Stage, Track
from expertlane.spec.ranges import Strict, Valid

MOST_RANKS = 32
MOST_EVENTS = 4000  # events of a step; later ones are left out, which the plot says

_TRACKS = [track.value for track in Track]
_US_PER_S = 1e6
_DIGITS, _TRACE_DIGITS = 1, 3  # decimals of microseconds


@dataclass(frozen=True)
class RankTimeline(Strict):
    """One rank's intervals of time, N of them, by when they begin.

    Attributes:
        track, stage: [N]; places in `tracks` and `stages` of the step.
        layer: [N]; -1 outside of any.
        micro_batch: [N].
        begin_us, duration_us: [N]; from the step's first event on any rank.

    Raises:
        UserError: columns of several lengths.
    """

    rank: int
    track: tuple[int, ...]
    stage: tuple[int, ...]
    layer: tuple[int, ...]
    micro_batch: tuple[int, ...]
    begin_us: tuple[float, ...]
    duration_us: tuple[float, ...]

    def __post_init__(self) -> None:
        columns = (self.track, self.stage, self.layer, self.micro_batch, self.begin_us)
        if {len(column) for column in columns} != {len(self.duration_us)}:
            raise UserError(f"a timeline of rank {self.rank} has columns of several lengths")


@dataclass(frozen=True)
class StepTimeline(Strict):
    """Timelines of the ranks in one step.

    Attributes:
        end_us: end of the last event, those left out included.
        shown_us: time up to which events are kept; `end_us` where all are.
        num_ranks: ranks that took part; `ranks` may be some of them, spread evenly.

    Raises:
        UserError: no rank, or a place that nothing stands at.
    """

    num_tokens: int
    num_seqs: int
    end_us: float
    shown_us: Annotated[float, Valid(lambda until: until > 0, "above 0")]
    num_ranks: int
    tracks: tuple[str, ...]
    stages: tuple[str, ...]
    ranks: tuple[RankTimeline, ...]

    @property
    def is_cut(self) -> bool:
        """True if only its beginning is kept."""
        return self.shown_us < self.end_us

    def __post_init__(self) -> None:
        if not self.ranks:
            raise UserError("a timeline without ranks")
        for rank in self.ranks:
            for places, names in ((rank.track, self.tracks), (rank.stage, self.stages)):
                if any(not 0 <= place < len(names) for place in places):
                    raise UserError(f"a timeline of rank {rank.rank} names a row or stage too many")


def timelines_of(steps: Sequence[StepRecord]) -> dict[Phase, StepTimeline]:
    """A timeline a phase: its steps on one time axis, each as a micro-batch of its own.

    Phases without events are left out.
    """
    found = {}
    for phase in Phase:
        of_phase = [step for step in steps if step.phase is phase]
        events = [
            (record.rank, micro_batch, record.events)
            for micro_batch, step in enumerate(of_phase)
            for record in step.records
            if record.events is not None and len(record.events.begin_s)
        ]
        if events:
            found[phase] = timeline_of(
                events,
                num_tokens=sum(step.num_tokens for step in of_phase),
                num_seqs=sum(len(step.seq_ids) for step in of_phase),
            )
    return found


def timeline_of(
    events: Sequence[tuple[int, int, RankEvents]], *, num_tokens: int, num_seqs: int
) -> StepTimeline:
    """Events of ranks on one time axis.

    Args:
        events: rank, offset of its micro-batches' numbers, and its events; at least one.
    """
    zero_s = min(each.start_s + float(each.begin_s.min()) for _, _, each in events)
    end_us = _US_PER_S * max(
        each.start_s - zero_s + float(each.end_s.max()) for _, _, each in events
    )
    ranks = sorted({rank for rank, _, _ in events})
    places = np.unique(np.linspace(0, len(ranks) - 1, MOST_RANKS).round().astype(int))
    columns = [
        _columns([(first, each) for rank, first, each in events if rank == ranks[place]], zero_s)
        for place in places
    ]
    begins_us = np.sort(np.concatenate([of_rank["begin_us"] for of_rank in columns]))
    cut_us = float(begins_us[MOST_EVENTS]) if len(begins_us) > MOST_EVENTS else np.inf
    return StepTimeline(
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        end_us=round(end_us, _DIGITS),
        shown_us=round(min(end_us, cut_us), _DIGITS),
        num_ranks=len(ranks),
        tracks=tuple(_TRACKS),
        stages=tuple(stage.label for stage in Stage),
        ranks=tuple(
            _rank_timeline(ranks[place], of_rank, cut_us)
            for place, of_rank in zip(places, columns, strict=True)
        ),
    )


def _columns(
    of_rank: Sequence[tuple[int, RankEvents]], zero_s: float
) -> dict[str, npt.NDArray[np.float64]]:
    """The columns of `RankTimeline`, [N] each, by when they begin."""
    parts = [
        {
            "track": each.track,
            "stage": each.stage,
            "layer": each.layer,
            "micro_batch": each.micro_batch + first,
            "begin_us": _US_PER_S * (each.start_s - zero_s + each.begin_s),
            "duration_us": _US_PER_S * (each.end_s - each.begin_s),
        }
        for first, each in of_rank
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["begin_us"], kind="stable")
    return {name: column[order] for name, column in columns.items()}


def _rank_timeline(
    rank: int, columns: dict[str, npt.NDArray[np.float64]], cut_us: float
) -> RankTimeline:
    """The part of a rank's timeline that begins before `cut_us`."""
    num = int(np.searchsorted(columns["begin_us"], cut_us))
    shown = {name: tuple(column[:num].round(_DIGITS).tolist()) for name, column in columns.items()}
    return RankTimeline(rank, **shown)


def write_traces(traces: Mapping[str, Sequence[StepRecord]], folder: Path) -> list[Path]:
    """Write a trace file for each deployment, each whole or not at all; return their paths.

    Raises:
        UserError: the folder can't be written to.
    """
    names = _file_names(traces)
    return [write_text(folder / names[each], trace_text(steps)) for each, steps in traces.items()]


def _file_names(deployments: Iterable[str]) -> dict[str, str]:
    """The file that each deployment's trace goes to, all different."""
    names: dict[str, str] = {}
    for deployment in deployments:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", deployment)
        name, number = f"trace-{slug}.json", 1
        while name in names.values():
            number += 1
            name = f"trace-{slug}-{number}.json"
        names[deployment] = name
    return names


def trace_text(steps: Sequence[StepRecord]) -> str:
    """The text of a trace; records without events are left out. The first event is at zero."""
    ranks = sorted({record.rank for step in steps for record in step.records if record.events})
    starts = [
        record.events.start_s + float(record.events.begin_s.min())
        for step in steps
        for record in step.records
        if record.events is not None and len(record.events.begin_s)
    ]
    zero_s = min(starts, default=0.0)
    events = [event for rank in ranks for event in _names(rank)]
    for number, step in enumerate(steps):
        for record in step.records:
            if record.events is not None:
                at = {"step": number, "phase": step.phase.value}
                events += _of_rank(record.rank, record.events, zero_s, at)
    return strict_json({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _names(rank: int) -> Iterator[dict[str, Any]]:
    """Metadata events: names of a rank and its rows, and their order."""
    place = {"ph": "M", "pid": rank}
    yield place | {"name": "process_name", "args": {"name": f"rank {rank}"}}
    yield place | {"name": "process_sort_index", "args": {"sort_index": rank}}
    for row, track in enumerate(_TRACKS):
        yield place | {"tid": row, "name": "thread_name", "args": {"name": track}}
        yield place | {"tid": row, "name": "thread_sort_index", "args": {"sort_index": row}}


def _of_rank(
    rank: int, events: RankEvents, zero_s: float, at: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Complete events; only what is known, and not zero, is among their arguments."""
    shift_s = events.start_s - zero_s
    counts = [
        (name, values.tolist())
        for name, values in (("flops", events.flops), ("bytes", events.num_bytes))
        if len(values)
    ]
    columns = (events.track, events.stage, events.layer, events.micro_batch)
    moments = (events.begin_s, events.end_s)
    rows = zip(*(column.tolist() for column in (*columns, *moments)), strict=True)
    for number, (track, stage, layer, micro_batch, begin_s, end_s) in enumerate(rows):
        args = dict(at, micro_batch=micro_batch)
        if layer >= 0:
            args["layer"] = layer
        args |= {name: values[number] for name, values in counts if values[number]}
        yield {
            "ph": "X",
            "pid": rank,
            "tid": track,
            "name": Stage(stage).label,
            "cat": _TRACKS[track],
            "ts": round((shift_s + begin_s) * _US_PER_S, _TRACE_DIGITS),
            "dur": round((end_s - begin_s) * _US_PER_S, _TRACE_DIGITS),
            "args": args,
        }
