"""The layout changes while requests run: none is lost, and no token changes."""

import gc
import os
import threading
from itertools import pairwise

import psutil
import pytest

from cli.screen import telling
from engine.elastic.recovering import (
    PARAMS,
    PROMPTS,
    facts,
    model,
    move_experts,
    pids,
    reading,
)
from expertlane import SamplingParams
from expertlane.engine.elastic.recovery_record import State
from expertlane.errors import UserError
from expertlane.spec.deployment import Options


def tokens(outputs):
    return [(output.token_ids, output.finish_reason) for output in outputs]


def scaled_under_load(llm, layouts, num_steps=5):
    """Outputs of `PROMPTS`, with a change of the layout after every few steps."""
    engine, to_come = llm.engine, list(layouts)
    outputs = [
        engine.add(str(number), prompt, params)
        for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    chunks, was_busy = [], []
    while engine.has_unfinished:
        for _ in range(num_steps):
            chunks += engine.step()
        if to_come:
            was_busy.append(engine.scheduler.num_running)
            llm.scale(to_come.pop(0))
    assert not to_come
    assert all(was_busy)
    for number, output in enumerate(outputs):  # each token was told of once, in its order
        of_request = [each for each in chunks if each.request_id == str(number)]
        assert [each.token_id for each in of_request] == output.token_ids
        assert of_request[-1].finish_reason == output.finish_reason
    return tokens(outputs)


def open_descriptors():
    gc.collect()  # a board stays mapped, and its file open, as long as its pool
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.full
@pytest.mark.parametrize(
    "layouts",
    [
        ["dp=2,ep=2", "dp=4,ep=4", "dp=8,ep=8", "dp=3,ep=3", "dp=16,ep=16"],
        ["dp=2,ep=2", "dp=2,tp=2,ep=4", "pp=2,dp=2,ep=2", "tp=2", "replicas=2,dp=2,ep=2", "tp=1"],
    ],
)
def test_ranks_come_and_go(layouts, capfd):
    with model(layouts[0], on_failure="stop") as llm:
        expected = tokens(llm.generate(PROMPTS, PARAMS))
    del llm
    before = open_descriptors()
    with model(layouts[0]) as llm:
        assert scaled_under_load(llm, layouts[1:], num_steps=3) == expected
        assert str(llm.layout) == layouts[-1]
        assert llm._pool.num_ranks == llm.layout.world_size == len(llm.machine)
        server = llm._pool._ranks._server.pid
        children = psutil.Process(server).children()
        assert sorted(child.pid for child in children) == sorted(pids(llm))
        recovery = llm.engine.recovery
        assert (recovery.num_scalings, recovery.num_recoveries) == (len(layouts) - 1, 0)
        assert recovery.state is State.SERVING
        assert llm.engine.scheduler.num_recovered == 0
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
    del llm, recovery
    assert open_descriptors() == before
    assert not any(child.is_running() for child in children)
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("layout ")]
    assert [line.partition(" in ")[0] for line in told] == [
        f"layout changed from {then} to {now}" for then, now in pairwise(layouts)
    ]


def test_what_stays_where_it_is():
    """Ranks whose caches stay keep their processes, weights and requests."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with model("dp=2,ep=2") as llm:
        engine = llm.engine
        expected = tokens(llm.generate([[1, 2, 3], [4, 5]], params))
        for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5])):
            engine.add(name, prompt, params)
        outputs = [live.output for live in engine._live.values()]
        for _ in range(6):
            engine.step()
        old, at = pids(llm), [live.request.dp_rank for live in engine._live.values()]
        assert at == [0, 1]
        for layout, num_again in (("dp=3,ep=3", 0), ("dp=1", 1), ("dp=2,ep=2", 0), ("tp=2", 2)):
            llm.scale(layout)
            assert engine.recovery.records[-1].num_requests == num_again
            assert pids(llm)[0] == old[0]
            for _ in range(3):
                engine.step()
        while engine.has_unfinished:
            engine.step()
        assert tokens(outputs) == expected
        assert engine.scheduler.num_preemptions == 0


@pytest.mark.full
def test_nothing_runs():
    with model("dp=2,ep=2", prefix_caching=False) as llm:
        expected = facts(llm)
        for layout in ("dp=4,ep=4", "dp=1", "dp=2,ep=2"):
            llm.scale(layout)
            assert llm.engine.recovery.state is State.SERVING
            llm.check_ranks()
        epoch = llm._pool.epoch
        llm.scale("dp=2,ep=2")  # as it is
        assert llm._pool.epoch == epoch
        assert facts(llm) == expected


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=3", "tp=3 divide"),
        ("pp=200", "pp=200 stages"),
        ("dp=4,ep=3", "ep=3 divide"),
        ("dp=7,ep=1,dcp=2", "dcp=2 divide"),
        ("dp=2000", "2000 ranks 1024"),
        ("hello", "layout"),
        ("dp=1,ep=1", "rebalance_steps 3 tp=1 ep=1"),
    ],
)
def test_what_is_refused_changes_nothing(layout, message, scaled):
    llm = scaled
    before, epoch = pids(llm), llm._pool.epoch
    with pytest.raises(UserError, match=telling(message)):
        llm.scale(layout)
    assert (pids(llm), llm._pool.epoch, str(llm.layout)) == (before, epoch, "dp=2,ep=2")
    assert not llm.engine.recovery.records
    assert len(llm.generate([[1, 2]], SamplingParams(max_tokens=2))[0].token_ids) == 2


@pytest.fixture(scope="module")
def scaled():
    with model("dp=2,ep=2", options=Options(rebalance_steps=3)) as llm:
        yield llm


def test_memory_is_checked(scaled, monkeypatch):
    monkeypatch.setattr("expertlane.engine.elastic.scaling.host.memory_bytes", lambda: (1 << 20, 1))
    with pytest.raises(UserError, match=r"layout dp=16.*needs .* per rank.*--num-blocks"):
        scaled.scale("dp=16,ep=16")
    assert scaled._pool.epoch == 0


def test_without_recovery_it_is_refused():
    with model("tp=1", on_failure="stop") as llm:
        with pytest.raises(UserError, match="--on-failure replace"):
            llm.scale("tp=2")
        assert llm.generate([[1]], SamplingParams(max_tokens=1))[0].token_ids


@pytest.mark.full
def test_experts_go_on_moving_and_counts_do_not_fall():
    options = Options(rebalance_steps=3, num_redundant_experts=4)
    with model("dp=2,ep=2", options=options) as llm:
        watch = llm.watch()
        move_experts(llm)
        expected = tokens(llm.generate(PROMPTS, PARAMS))
        rebalancer, after = llm._runner.rebalancer, reading(llm)
        for layout in ("dp=4,ep=4", "dp=2,tp=2,ep=4", "dp=2,ep=2"):
            num_decisions, saved_s = len(rebalancer.decisions), rebalancer.saved_s
            assert scaled_under_load(llm, [layout], num_steps=13) == expected
            before, after = after, reading(llm)
            assert (after.num_tokens >= before.num_tokens).all()
            assert after.num_tokens.sum() > before.num_tokens.sum()
            assert (after.link_bytes >= before.link_bytes).all()
            num = min(len(before.num_steps), len(after.num_steps))
            assert (after.num_steps[:num] >= before.num_steps[:num]).all()
            assert after.rank_tokens.shape[1] == llm.layout.world_size
            assert len(watch.positions) == llm.layout.world_size
            assert watch.imbalance(60.0).keys() <= set(watch.layers)
            # How many steps a move takes goes by its measured time, and steps after it may save.
            for _ in range(20):
                of_layout = rebalancer.decisions[num_decisions:]
                has_moved = any(each.switched is not None for each in of_layout)
                if has_moved and rebalancer.saved_s != saved_s:
                    break
                assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
            assert has_moved
            assert rebalancer.saved_s != saved_s


@pytest.mark.full
def test_other_threads_wait_for_it():
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * 2
    with model("dp=2,ep=2") as llm:
        expected = tokens(llm.generate([[1, 2], [3]], params))
        found = []
        thread = threading.Thread(
            target=lambda: found.extend(tokens(llm.generate([[1, 2], [3]], params)))
        )
        thread.start()
        llm.scale("dp=3,ep=3")
        llm.scale("dp=1")
        thread.join()
        assert found == expected
