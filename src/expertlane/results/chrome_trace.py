"""Chrome traces of steps: the time of every rank, for Perfetto or chrome://tracing.

A process for every rank, with a row for each `Track`. Measured steps show a rank's own work on the
compute row and its waits for others on the network row; modelled ones show the transfers there.
Ranks of one host share a clock; those of other hosts stand where their own clock puts them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expertlane.results.step_record import RankEvents, StepRecord
from expertlane.spec.files import strict_json, write_text
from expertlane.spec.names import Stage, Track

_TRACKS = list(Track)
_US_PER_S = 1e6
_DIGITS = 3  # decimals of microseconds


def write_traces(traces: Mapping[str, Sequence[StepRecord]], folder: Path) -> list[Path]:
    """Write a trace file for each deployment, each whole or not at all; return their paths.

    Raises:
        UserError: the folder can't be written to.
    """
    names = _file_names(traces)
    return [write_text(folder / names[each], to_json(steps)) for each, steps in traces.items()]


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


def to_json(steps: Sequence[StepRecord]) -> str:
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
        yield place | {"tid": row, "name": "thread_name", "args": {"name": track.value}}
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
            "cat": _TRACKS[track].value,
            "ts": round((shift_s + begin_s) * _US_PER_S, _DIGITS),
            "dur": round((end_s - begin_s) * _US_PER_S, _DIGITS),
            "args": args,
        }
