"""Chrome traces: what viewers need is there, and files are whole or not there."""

import json

import numpy as np
import pytest

from cli.screen import telling
from expertlane.errors import UserError
from expertlane.results.step_record import RankEvents
from expertlane.results.timeline import trace_text, write_traces
from expertlane.spec.names import Phase, Stage, Track
from records import rank_record, step_record

COMPUTE, NETWORK, COPY = range(3)
TRACKS = ["compute", "network", "copy", "descheduled"]


def record(rank, start_s, rows, **counts):
    """Rows of track, stage, layer, micro-batch, begin and end."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    made = rank_record(rank)
    object.__setattr__(made, "events", RankEvents(start_s, *columns, **counts))
    return made


@pytest.fixture
def steps():
    rows = [
        (COMPUTE, Stage.ATTENTION, 3, 0, 0.5, 1.0),
        (NETWORK, Stage.HAND_OVER, -1, 1, 1.0, 1.25),
    ]
    counts = {"flops": np.array([7, 0]), "num_bytes": np.array([0, 9])}
    first = step_record(0, 1, [0], [record(0, 10.0, rows, **counts), record(1, 10.5, rows)])
    plain = step_record(1, 2, [0], [rank_record(0), record(1, 12.0, rows[:1])])
    return [first, plain]


def test_a_process_for_every_rank_and_a_row_for_every_track(steps):
    trace = json.loads(trace_text(steps))
    named = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name")
    }
    assert named == {
        (rank, row): name
        for rank in (0, 1)
        for row, name in [(None, f"rank {rank}"), *enumerate(TRACKS)]
    }
    assert [track.value for track in Track] == TRACKS


def test_events_in_microseconds_from_the_first(steps):
    events = [e for e in json.loads(trace_text(steps))["traceEvents"] if e["ph"] == "X"]
    place = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events]
    assert place == [
        (0, COMPUTE, "attention", 0.0, 5e5),
        (0, NETWORK, "PP send/recv", 5e5, 2.5e5),
        (1, COMPUTE, "attention", 5e5, 5e5),
        (1, NETWORK, "PP send/recv", 1e6, 2.5e5),
        (1, COMPUTE, "attention", 2e6, 5e5),
    ]
    assert [e["args"] for e in events[:2]] == [
        {"step": 0, "phase": "decode", "micro_batch": 0, "layer": 3, "flops": 7},
        {"step": 0, "phase": "decode", "micro_batch": 1, "bytes": 9},
    ]
    assert events[2]["args"] == {"step": 0, "phase": "decode", "micro_batch": 0, "layer": 3}
    assert events[-1]["args"]["step"] == 1
    assert Phase.DECODE.value == "decode"


def test_without_events_a_trace_is_empty():
    assert json.loads(trace_text([step_record(0, 1, [0], [rank_record(0)])]))["traceEvents"] == []


def test_a_file_is_whole_or_not_there(tmp_path, steps, monkeypatch):
    (path,) = write_traces({"EP 2": steps}, tmp_path / "sub")
    assert path.read_text(encoding="utf-8") == trace_text(steps)
    assert [each.name for each in path.parent.iterdir()] == ["trace-EP-2.json"]
    with pytest.raises(UserError, match=r"cannot write .*: File exists"):
        write_traces({"EP 2": steps}, path)

    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match=telling("No space left")):
        write_traces({"EP 2": steps}, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_file_names_differ(tmp_path):
    names = ["TP 8 × PP 2", "TP 8 / PP 2", "ep=16"]
    written = write_traces(dict.fromkeys(names, ()), tmp_path)
    assert [each.name for each in written] == [
        "trace-TP-8-PP-2.json",
        "trace-TP-8-PP-2-2.json",
        "trace-ep-16.json",
    ]
