"""Real ranks are killed where the others go on in a smaller layout: no token changes."""

from functools import partial

import pytest

from cli.screen import tells
from engine.elastic.recovering import facts, harmed, move_experts, pids
from engine.elastic.recovering import model as model_on
from engine.ranks.processes import wait_until
from expertlane.balance.placement import WHOLE
from expertlane.engine.elastic.rebalancing import MovePace
from expertlane.engine.elastic.recovery_record import RecoveryKind, State
from expertlane.engine.ranks.commands import Prepare, Redeploy, RunStep
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Members
from expertlane.spec.names import Origin

MOVING = {"rebalance_steps": 3, "num_redundant_experts": 2}


model = partial(model_on, on_failure="shrink")


def is_whole(llm):
    llm.check_ranks()
    return llm.engine.recovery.state is State.SERVING


def is_smaller(llm):
    """Also where a rank was killed so late that its last step had been collected."""
    llm.check_ranks()
    return llm.engine.recovery.state is State.SHRUNK


def grow_back(llm):
    """Until what was lost serves again."""
    assert wait_until(lambda: is_whole(llm))
    assert llm.engine.recovery.shrunk_at is None
    assert None not in pids(llm)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "options", "transport", "kills"),
    [
        ("dp=2,ep=2", {}, "gloo", [(0, "tp=1", (1,)), (1, "tp=1", (0,))]),
        ("dp=3,ep=3", {"num_redundant_experts": 32}, "shared memory", [(0, "dp=2,ep=2", (2, 1))]),
        ("dp=2,tp=2,ep=4", {}, "shared memory", [(1, "tp=2,ep=2", (2, 3))]),
        ("replicas=2,dp=2,ep=2", {}, "gloo", [(1, "dp=2,ep=2", (2, 3))]),
        pytest.param("pp=2,dp=2,ep=2", {}, "gloo", [(3, "pp=2", (0, 2))], marks=pytest.mark.full),
        pytest.param("dp=4,ep=2", {}, "gloo", [(1, "dp=2", (2, 3))], marks=pytest.mark.full),
    ],
)
def test_the_others_go_on_and_what_was_lost_comes_back(
    layout, options, transport, kills, monkeypatch, capfd
):
    if transport == "gloo":
        monkeypatch.setenv("EXPERTLANE_TRANSPORT", "gloo")
    with model(layout, options=Options(**options)) as llm:
        start, recovery = llm._pool.start, llm.engine.recovery
        expected = facts(llm)
        for rank, smaller, numbers in kills:
            llm._pool.start = lambda ranks: None  # not yet
            with harmed(rank, RunStep, 9) as killed:
                assert facts(llm) == expected
            assert len(killed) == 1
            assert wait_until(lambda: is_smaller(llm))
            assert (str(recovery.members.layout), recovery.members.numbers) == (smaller, numbers)
            assert facts(llm) == expected
            held = [each.bytes_from for each in llm._runner.held]
            if options or "replicas" in layout:  # every expert has a copy left
                assert all(set(each) == {Origin.KEPT} for each in held)
            llm._pool.start = start
            grow_back(llm)
            assert facts(llm) == expected
            assert recovery.members == recovery.whole
            # What serves reads nothing to grow back; what comes back has read it before.
            for number, each in enumerate(llm._runner.held):
                assert Origin.READ not in each.bytes_from, number
        assert [record.kind for record in recovery.records] == [
            RecoveryKind.RECOVERY,
            RecoveryKind.GROWTH,
        ] * len(kills)
        text = capfd.readouterr().err
        assert text.count("data-parallel ranks; ") == text.count("grew back in") == len(kills)


@pytest.mark.full
def test_experts_move_meanwhile_and_all_is_checked(monkeypatch):
    monkeypatch.setattr(MovePace, "most", 9 * WHOLE)  # moves end soon, however busy the machine
    with model("dp=3,ep=3", options=Options(**MOVING), check="full") as llm:
        move_experts(llm)
        watch = llm.watch()
        expected = facts(llm)
        start, decisions = llm._pool.start, llm._runner.rebalancer.decisions
        for rank in (1, 0):
            llm._pool.start = lambda ranks: None
            before = len(decisions)
            with harmed(rank, RunStep, 9):
                assert facts(llm) == expected
            assert facts(llm) == expected
            assert any(each.switched is not None for each in decisions[before:])
            assert len(watch.readings[-1].num_steps) == 2
            llm._pool.start = start
            grow_back(llm)
            assert facts(llm) == expected
        assert llm.engine.recovery.num_recoveries == llm.engine.recovery.num_growths == 2


@pytest.mark.full
def test_more_are_lost_down_to_the_last_and_while_it_grows():
    with model("dp=3,ep=3") as llm:
        start, recovery = llm._pool.start, llm.engine.recovery
        expected = facts(llm)
        llm._pool.start = lambda ranks: None
        found = []
        for rank in (2, 0, 1):
            with harmed(rank, RunStep, 9):
                assert facts(llm) == expected
            found.append((recovery.state, len(recovery.members.numbers)))
        assert found == [(State.SHRUNK, 2), (State.SHRUNK, 1), (State.SERVING, 3)]
        with harmed(1, RunStep, 9):
            assert facts(llm) == expected
        assert recovery.state is State.SHRUNK
        with pytest.raises(UserError, match="2 of 3 data-parallel ranks serve"):
            llm.scale("dp=2,ep=2")
        llm._pool.start = start
        with harmed(1, Prepare, 1) as first, harmed(0, Redeploy, 1) as second:
            assert wait_until(lambda: is_whole(llm) and len(first + second) == 2)
            assert facts(llm) == expected
        growth = next(each for each in recovery.records if each.kind is RecoveryKind.GROWTH)
        assert growth.ranks == [0]
        grow_back(llm)
        assert facts(llm) == expected
        llm.scale("dp=2,ep=2")
        assert recovery.whole == Members(llm.layout)
        with harmed(0, RunStep, 9):
            assert facts(llm) == expected
        grow_back(llm)


@pytest.mark.full
def test_without_room_or_a_whole_data_parallel_rank_lost_ranks_are_replaced(monkeypatch, capfd):
    with model("tp=2") as llm:
        expected = facts(llm)
        with harmed(1, RunStep, 9):
            assert facts(llm) == expected
        assert llm.engine.recovery.state is State.SERVING
    assert tells(capfd.readouterr().err, "data-parallel rank")
    with model("dp=2,ep=2") as llm:
        expected = facts(llm)
        monkeypatch.setattr("expertlane.engine.elastic.scaling.host.memory_bytes", lambda: (0, 0))
        with harmed(1, RunStep, 9):
            assert facts(llm) == expected
        assert llm.engine.recovery.state is State.SERVING
        assert [str(each) for each in llm.engine.recovery.members.numbers] == ["0", "1"]
    assert tells(capfd.readouterr().err, "layout shrink requests wait tp=1")
