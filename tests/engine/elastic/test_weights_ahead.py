"""Ranks make the weights of a layout to come while another one serves."""

import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest

from cli.screen import telling
from engine.elastic.recovering import PARAMS, PROMPTS, facts, model, pids, record_of
from engine.elastic.test_scaling import open_descriptors, tokens
from expertlane.engine.elastic import scaling
from expertlane.engine.elastic.scaling import WeightsAhead
from expertlane.engine.ranks.commands import PreparationProgress, Prepare
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import CapacityError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Origin

PATIENCE_S = 60.0


def prepared(llm, layout, meanwhile=lambda: None):
    """Prepare a layout under load, and change to it; gives outputs and the change."""
    engine, scaling = llm.engine, llm.scaling
    outputs = [
        engine.add(str(number), prompt, params)
        for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    engine.step()
    scaling.prepare(Layout.parse(layout))
    until_s, is_ready = time.monotonic() + PATIENCE_S, False
    while not (is_ready := scaling.advance()) and time.monotonic() < until_s:
        meanwhile()
        if max(len(each.token_ids) for each in outputs) < 20:  # some go on after the change
            engine.step()
    assert is_ready
    assert scaling.ahead.share == 1
    assert engine.scheduler.num_running
    llm.scale(layout)
    while engine.has_unfinished:
        engine.step()
    return tokens(outputs), scaling.changes[-1]


def bytes_from(change, *origins):
    return [sum(each.bytes_from.get(origin, 0) for each in change.held) for origin in origins]


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        ({}, ["dp=2,ep=2", "dp=4,ep=4", "dp=8,ep=8", "dp=3,ep=3", "dp=16,ep=16"]),
        ({"check": "full"}, ["tp=2", "pp=2,dp=2,ep=2", "replicas=2,dp=2,ep=2", "tp=1"]),
        ({"options": Options(weights="int8"), "dtype": "bfloat16"}, ["dp=2,ep=2", "dp=3,ep=3"]),
        (None, ["dp=2,ep=2", "dp=4,ep=4", "tp=2"]),
    ],
    ids=["more-and-fewer", "other-axes", "int8", "checkpoint"],
)
def test_no_rank_reads_in_the_pause(settings, layouts, checkpoints):
    name = "paper-tiny" if settings is not None else str(checkpoints.folder("qwen2_moe"))
    with model(layouts[0], name=name, **settings or {}) as llm:
        expected = tokens(llm.generate(PROMPTS, PARAMS))
        for layout in layouts[1:]:
            found, change = prepared(llm, layout)
            if llm.machine[0].dtype == "float32":
                assert found == expected
            ahead, read = bytes_from(change, Origin.AHEAD, Origin.READ)
            whole = sum(each.weight_bytes for each in change.held)
            assert ahead > 0 or layout == "tp=1"
            assert sum(bytes_from(change, *Origin)) == whole
            assert read < whole / 20  # norms, which are made each time
            assert change.ahead_s > 0
            assert len(change.held) == llm.layout.world_size


@pytest.mark.full
def test_the_share_counts_new_ranks_from_the_start(monkeypatch):
    """They tell how far they are while they load, and nothing of one that has told nothing."""
    monkeypatch.setattr(scaling, "_NEW_SLICE_S", 0.0)  # a part each
    with model("dp=1") as llm:
        llm.scaling.prepare(Layout.parse("dp=3,ep=3"))
        ahead, seen = llm.scaling.ahead, []
        assert (ahead.share, sorted(ahead.prepared)) == (0, [0, 1, 2])
        while not llm.scaling.advance():
            seen.append((ahead.share, [ahead.prepared[rank].share for rank in range(3)]))
        shares = [share for share, _ in seen]
        assert shares == sorted(shares)
        assert all(share == pytest.approx(sum(each) / 3) for share, each in seen)
        for new in (1, 2):
            assert len({each[new] for _, each in seen} - {0, 1}) > 2
        llm.scaling.give_up()


@pytest.mark.parametrize("look_s", [0.001, 0.022, 0.06, 0.3])
def test_slices_take_a_fifth_of_the_time_however_often_one_looks(monkeypatch, look_s):
    """One slice a look at most; of looks that come often enough, a fifth of the time in all."""
    now_s, slices, slice_s = [0.0], [], 0.005
    monkeypatch.setattr(scaling.time, "monotonic", lambda: now_s[0])

    class Slice(SimpleNamespace):
        is_lost = False

        @property
        def is_done(self):
            return now_s[0] >= self.ends_s

    def submit(commands):
        slices.append(now_s[0])
        return Slice(results={0: PreparationProgress(0.5, 1, slice_s)}, ends_s=now_s[0] + slice_s)

    pool = SimpleNamespace(
        check=lambda: None,
        epoch=0,
        present={0},
        starting=set(),
        ahead=set(),
        submit_each=submit,
    )
    ahead = WeightsAhead(pool, SimpleNamespace(layout=Layout.parse("tp=1")), 0)
    while now_s[0] < 30:
        assert not ahead.advance(is_idle=False)
        now_s[0] += look_s
    share = len(slices) * slice_s / now_s[0]
    assert share <= 0.201
    assert share >= 0.95 * min(0.2, slice_s / look_s)


@pytest.mark.full
def test_what_is_given_up_leaves_nothing():
    with model("dp=2,ep=2") as llm:
        expected, before = facts(llm), pids(llm)
        server = psutil.Process(llm._pool._ranks._server.pid)
        descriptors = open_descriptors()
        for layout in ("dp=2,tp=2,ep=4", "tp=2"):
            llm.scaling.prepare(Layout.parse(layout))
            while not llm.scaling.advance():
                time.sleep(1e-3)
            made = {rank: each.num_bytes for rank, each in llm.scaling.ahead.prepared.items()}
            assert made[1] > 0
            spec = llm.scaling.ahead._spec
            llm.scaling.give_up()
            assert llm.scaling.ahead is None
            (begun,) = llm._pool.call(Prepare(spec, 1, 0.0), ranks=[1])  # anew
            assert begun.num_bytes < made[1]
            llm.scaling.give_up()
            until_s, found = time.monotonic() + PATIENCE_S, None
            while found != (sorted(before), descriptors) and time.monotonic() < until_s:
                llm.check_ranks()  # takes in that they have ended
                found = sorted(child.pid for child in server.children()), open_descriptors()
            assert found == (sorted(before), descriptors)
        assert facts(llm) == expected
        assert llm._pool.epoch == 0


@pytest.mark.full
def test_ranks_that_never_come(monkeypatch):
    ask = WeightsAhead._ask_new_ranks

    def ask_and_kill(ahead):
        for rank in ahead._pool.ahead:
            with suppress(ProcessLookupError):  # it was killed when it was asked before
                os.kill(ahead._pool.pid(rank), signal.SIGKILL)
        ask(ahead)

    with model("dp=2,ep=2") as llm:
        expected, before = facts(llm), pids(llm)
        monkeypatch.setattr(WeightsAhead, "_ask_new_ranks", ask_and_kill)
        with pytest.raises(CapacityError, match=telling("dp=3,ep=3 ranks ended 3")):
            prepared(llm, "dp=3,ep=3")
        assert llm.scaling.ahead is None
        assert (pids(llm), str(llm.layout)) == (before, "dp=2,ep=2")
        while llm.engine.has_unfinished:
            llm.engine.step()
        assert facts(llm) == expected


@pytest.mark.full
def test_there_is_little_room(monkeypatch):
    """What ranks that serve have no room for, they make in the pause."""
    begin = WeightsAhead.__init__

    def begin_small(ahead, pool: RankPool, spec, room_bytes):
        begin(ahead, pool, spec, 1)

    monkeypatch.setattr(WeightsAhead, "__init__", begin_small)
    with model("dp=4,ep=4") as llm:
        expected = tokens(llm.generate(PROMPTS, PARAMS))
        found, change = prepared(llm, "dp=2,ep=2")
        assert found == expected
        ahead, read = bytes_from(change, Origin.AHEAD, Origin.READ)
        assert read > ahead > 0


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "layout", "least"),
    [
        ({"options": Options(num_redundant_experts=16)}, "dp=4,ep=4", 0.95),
        ({}, "dp=2,tp=2,ep=4", 0.1),
        ({"check": "full", "options": Options(num_redundant_experts=4)}, "dp=4,ep=4", 0.1),
        ({"options": Options(weights="int8", num_redundant_experts=16)}, "dp=4,ep=4", 0.9),
        ({}, "tp=2,pp=2", 0.01),  # the embedding, which the other rank of its group has too
    ],
)
def test_a_new_rank_gets_copies(settings, layout, least):
    with model(layout, **settings) as llm:
        expected = facts(llm)
        for victims in ([1], [0, 1]):
            for rank in victims:
                os.kill(llm._pool.pid(rank), signal.SIGKILL)
            assert facts(llm) == expected
            record_of(llm)
            held = [llm._runner.held[rank] for rank in victims]
            for each in held:
                assert sum(each.bytes_from.values()) == each.weight_bytes
                assert each.seconds_from[Origin.READ] > 0
            shares = [each.bytes_from.get(Origin.COPIED, 0) / each.weight_bytes for each in held]
            if len(victims) == 1:
                assert shares[0] >= least
            else:  # of a whole tensor-parallel group no rank is left
                assert [share > 0 for share in shares] == [layout != "tp=2,pp=2"] * 2
