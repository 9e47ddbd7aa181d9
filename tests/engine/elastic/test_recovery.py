"""Real ranks are killed or stopped at chosen moments: no request is lost, and no token changes."""

import io
import os
import signal
import sys
from unittest import mock

import pytest

from cli.screen import tells
from engine.elastic.recovering import facts, harmed, model, move_experts, pids, reading, record_of
from engine.ranks.processes import wait_until
from expertlane import SamplingParams
from expertlane.balance.placement import WHOLE
from expertlane.engine.elastic.rebalancing import MovePace
from expertlane.engine.elastic.recovery_record import State
from expertlane.engine.ranks.commands import FinishMoves, Redeploy, RunStep, StartMoves
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.request import FinishReason
from expertlane.spec.deployment import Options

ROTATING = {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}
MOVING = {"rebalance_steps": 3, "num_redundant_experts": 2}


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "options", "transport"),
    [
        ("tp=2", {}, "gloo"),
        pytest.param("tp=2", {}, "shared memory", marks=pytest.mark.full),
        ("pp=2", ROTATING, "shared memory"),
        pytest.param("pp=2", ROTATING, "gloo", marks=pytest.mark.full),
        ("dp=2,ep=2", MOVING, "shared memory"),
        pytest.param("dp=2,ep=2", MOVING, "gloo", marks=pytest.mark.full),
        pytest.param("replicas=2", {}, "shared memory", marks=pytest.mark.full),
        ("replicas=2", {}, "gloo"),
    ],
)
def test_a_rank_is_killed(layout, options, transport, monkeypatch, capfd):
    """In a prompt's step, in decode, while experts move; the same ranks, again and again."""
    if transport == "gloo":
        monkeypatch.setenv("EXPERTLANE_TRANSPORT", "gloo")
    monkeypatch.setattr(MovePace, "most", 9 * WHOLE)  # moves end soon, however busy the machine
    with model(layout, options=Options(**options)) as llm:
        moments = [(0, RunStep, 1), (1, RunStep, 9), (0, RunStep, 12)]
        if llm._runner.rebalancer is not None:
            move_experts(llm)
            moments += [(1, StartMoves, 1), (0, StartMoves, 2), (1, FinishMoves, 1)]
        expected = facts(llm)
        for number, (rank, command, nth) in enumerate(moments, start=1):
            before = pids(llm)
            with harmed(rank, command, nth) as killed:
                assert facts(llm) == expected
            assert killed == [before[rank]]
            record = record_of(llm)
            assert llm.engine.recovery.num_recoveries == number
            assert record.ranks == [rank]
            assert tells(record.line, f"rank {rank} killed SIGKILL")
            after = pids(llm)
            assert after[rank] != before[rank]
            assert after[1 - rank] == before[1 - rank]
            with pytest.raises(ProcessLookupError):
                os.kill(before[rank], 0)
        assert llm.engine.scheduler.num_recovered > 0
        if llm._runner.rebalancer is not None:
            assert any(each.switched is not None for each in llm._runner.rebalancer.decisions)
        assert facts(llm) == expected
    assert capfd.readouterr().err.count("recovered in") == len(moments)


@pytest.mark.full
def test_a_rank_is_lost_while_another_is_replaced():
    with model("dp=2,tp=2,ep=4") as llm:
        expected = facts(llm)
        with harmed(3, RunStep, 7) as first, harmed(0, Redeploy, 1) as second:
            assert facts(llm) == expected
        assert len(first + second) == 2
        assert llm.engine.recovery.num_recoveries == 1
        record = record_of(llm)
        assert record.ranks == [0, 3]
        assert len(record.causes) == 2
        # Ctrl-C in the midst of it, and requests after that.
        redeploy = llm._runner.redeploy

        def interrupt(*given):
            llm._runner.redeploy = redeploy
            raise KeyboardInterrupt

        llm._runner.redeploy = interrupt
        with harmed(2, RunStep, 5), pytest.raises(KeyboardInterrupt):
            facts(llm)
        assert llm.engine.recovery.state is State.LOADING
        assert facts(llm) == expected
        assert record_of(llm).ranks == [2]


def test_nobody_reads_what_it_says(monkeypatch):
    """A closed pipe, or a full disk, behind stderr."""
    with model("dp=2,ep=2") as llm:
        expected = facts(llm)
        full = io.StringIO()
        full.write = mock.Mock(side_effect=OSError(28, "No space left on device"))
        monkeypatch.setattr(sys, "stderr", full)
        with harmed(1, RunStep, 5):
            assert facts(llm) == expected
        assert full.write.called
        assert record_of(llm).ranks == [1]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["replicas=2", "tp=2"])
def test_a_request_that_ends_ranks_is_ended_at_last(layout, monkeypatch):
    """Others go on, with the tokens that they would have had."""
    submit_each = RankPool.submit_each
    victims = []

    def submit_and_kill(pool, commands):
        struck = [
            pool.pid(ranks[0])
            for command, ranks in commands
            if isinstance(command, RunStep) and is_struck(command.step)
        ][:1]
        for pid in struck:  # before it could finish the step
            os.kill(pid, signal.SIGSTOP)
        ticket = submit_each(pool, commands)
        for pid in struck:
            os.kill(pid, signal.SIGKILL)
        victims.extend(struck)
        return ticket

    def is_struck(step):
        batches = [micro_batch.own for micro_batch in step.micro_batches]
        return any((batch.token_ids == 250).any() for batch in batches)

    monkeypatch.setattr(RankPool, "submit_each", submit_and_kill)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [[n, 1, 2] for n in range(4)]
    with model(layout) as llm:
        engine = llm.engine
        expected = [output.token_ids for output in llm.generate(prompts, params)]
        outputs = [engine.add(str(n), prompt, params) for n, prompt in enumerate(prompts)]
        for _ in range(6):
            engine.step()
        outputs.append(engine.add("deadly", [5, 250], params))
        chunks = []
        while engine.has_unfinished:
            chunks += engine.step()
        assert len(victims) == 4
        assert [output.token_ids for output in outputs] == [*expected, []]
        assert outputs[-1].finish_reason is FinishReason.ERROR
        (last,) = [chunk for chunk in chunks if chunk.request_id == "deadly"]
        assert tells(last.error, "lost rank")
        assert engine.recovery.state is State.SERVING
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected


def is_replaced(llm, rank, pid):
    llm.check_ranks()
    return pids(llm)[rank] != pid


@pytest.mark.full
def test_a_rank_is_lost_while_nothing_runs_and_no_count_falls():
    with model("dp=2,ep=2") as llm:
        llm.watch()
        expected = facts(llm)
        before = reading(llm)
        for rank in (1, 0, 1, 0):
            pid = pids(llm)[rank]
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda pid=pid, rank=rank: is_replaced(llm, rank, pid))
            assert record_of(llm).ranks == [rank]
        assert llm.engine.recovery.num_recoveries == 4  # more than may follow in vain
        with harmed(1, RunStep, 9):
            assert facts(llm) == expected
        after = reading(llm)
        assert (after.num_tokens >= before.num_tokens).all()
        assert (after.spent_s >= before.spent_s).all()
        assert (after.num_steps > before.num_steps).all()
        assert (after.rank_tokens.sum(axis=0) > before.rank_tokens.sum(axis=0)).all()
