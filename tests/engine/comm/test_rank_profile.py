"""A rank's trace: annotations of its steps, stages and waits, and what it leaves when it ends."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from expertlane.engine.comm import rank_profile
from expertlane.engine.comm.rank_profile import RankProfile
from expertlane.spec.names import Phase, Stage


class Clock:
    """A microsecond later at each look."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1000
        return self.now_ns


def a_step(num_seqs=3, num_tokens=3):
    own = SimpleNamespace(num_seqs=num_seqs, num_tokens=num_tokens)
    return SimpleNamespace(phase=Phase.DECODE, micro_batches=[SimpleNamespace(own=own)])


@pytest.fixture
def profile():
    profile = RankProfile(on_gpu=False, now_ns=Clock())
    yield profile
    profile._end()


def annotations(path):
    """Name, duration in µs and arguments of each, in the order of their begin."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    events = [e for e in events if e["name"].startswith("expertlane")]
    own = sorted(events, key=lambda e: (e["ts"], -e["dur"]))
    return trace, [(e["name"], round(e["dur"], 3), e.get("args", {})) for e in own]


def test_a_step_has_stages_waits_and_a_send(profile, tmp_path):
    recorder = SimpleNamespace(profile=None)

    def run():
        assert recorder.profile is profile
        profile.enter(Stage.IDLE)
        profile.enter(Stage.DISPATCH)
        profile.begin_transfer()
        comm_op = profile.comm_op([0, 1])
        profile.begin_wait()
        profile.end_wait(comm_op)
        profile.enter(Stage.HAND_OVER)
        profile.send((0, 1))
        assert profile.comm_op(()) is None
        profile.begin_wait()
        profile.end_wait(None)
        torch.ones(4) + 1
        profile.enter(Stage.IDLE)
        return 7

    assert profile.run_step(recorder, a_step(), run) == 7
    assert recorder.profile is None
    path = tmp_path / "new" / "rank0.pt.trace.json.gz"
    profile.write(path)
    trace, found = annotations(path)
    assert [(name, us) for name, us, _ in found] == [
        ("expertlane: decode 3 seqs 3 tokens", 11.0),
        ("expertlane: dispatch", 4.0),
        ("expertlane: wait", 1.0),
        ("expertlane: PP send/recv", 4.0),
        ("expertlane: send", 0.001),
    ]
    (wait,) = [args for name, _, args in found if name == "expertlane: wait"]
    assert wait["Process Group Ranks"] == "[0, 1]"
    assert [e["name"] for e in trace["traceEvents"] if e.get("cat") == "cpu_op"].count("aten::add")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_step_that_comes_to_nothing_leaves_nothing(profile, tmp_path):
    recorder = SimpleNamespace(profile=None)

    def run():
        profile.enter(Stage.DISPATCH)
        profile.begin_wait()
        profile.end_wait(profile.comm_op([0, 1]))
        raise KeyError

    with pytest.raises(KeyError):
        profile.run_step(recorder, a_step(), run)
    assert recorder.profile is None
    profile.write(path := tmp_path / "rank0.json.gz")
    assert annotations(path)[1] == []
    assert profile.num_steps == 0


def test_a_trace_is_bounded(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(rank_profile, "MOST_STEPS", 2)
    recorder, seen = SimpleNamespace(profile=None), []
    for _ in range(4):
        profile.run_step(recorder, a_step(), lambda: seen.append(recorder.profile is profile))
    assert seen == [True, True, False, False]
    profile.write(path := tmp_path / "rank0.json.gz")
    assert len(annotations(path)[1]) == profile.num_steps == 2


def test_what_cannot_be_written_leaves_no_part(profile, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        profile.write(tmp_path / "taken" / "rank0.json.gz")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
