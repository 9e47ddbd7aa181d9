"""`AsyncEngine`: what `Engine` gives, in a loop; cancelling, mistakes, ends."""

import asyncio
import threading

import pytest

from cli.screen import telling
from engine.stub_runner import StubEngine, expected
from expertlane.engine.async_engine import AsyncEngine
from expertlane.errors import RankError, UserError
from expertlane.schedule.request import FinishReason
from expertlane.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def run(use, **options):
    """Run `use(engine, stub, chunks)` in a loop; gives the stub, on which nothing may be left."""
    stub = StubEngine("dp=2,ep=2")

    async def main():
        chunks = []
        engine = AsyncEngine(stub, on_chunk=lambda output, chunk: chunks.append(chunk), **options)
        try:
            await asyncio.wait_for(use(engine, stub, chunks), 30)
        finally:
            await engine.close()

    asyncio.run(main())
    return stub


async def taken(generation):
    found = []
    while arrived := await generation.take():
        found += arrived
    return found


def gate_after(num_steps, stub):
    """The event that the steps after the first `num_steps` wait for: a request can't end before."""
    gate = threading.Event()
    stub.runner.before = lambda: stub.runner.num_steps < num_steps or gate.wait(30)
    return gate


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_requests_at_once():
    async def use(engine, stub, chunks):
        prompts = [[i, i + 1] for i in range(20)]
        several = await asyncio.gather(*(engine.generate([prompt], [GREEDY]) for prompt in prompts))
        for prompt, generation in zip(prompts, several, strict=True):
            tokens = [chunk.token_id for _, chunk in await taken(generation)]
            assert tokens == expected(prompt, 6) == generation.outputs[0].token_ids
            assert generation.is_finished
        assert len(chunks) == 120
        await until(lambda: stub.is_idle)
        assert stub.num_blocks_used() == 0

    run(use)


def test_a_mistake_queues_none():
    async def use(engine, stub, chunks):
        with pytest.raises(UserError, match="prompt 2: token id 26"):
            await engine.generate([[1], [26]], [GREEDY] * 2)
        assert engine.num_unseen == 0
        await until(lambda: stub.is_idle)
        assert not chunks

    assert run(use).num_blocks_used() == 0


def test_cancelling():
    async def use(engine, stub, chunks):
        long = SamplingParams(temperature=0, max_tokens=60)
        gate = gate_after(1, stub)
        generation = await engine.generate([[1, 2, 3]], [long])
        await generation.take()
        generation.cancel()
        gate.set()
        await until(lambda: chunks[-1].finish_reason is FinishReason.CANCELLED)
        await until(lambda: stub.is_idle)
        assert stub.num_blocks_used() == 0
        again = await engine.generate([[1]], [GREEDY])
        assert [chunk.token_id for _, chunk in await taken(again)] == expected([1], 6)

    run(use)


def test_an_end_with_an_error():
    async def use(engine, stub, chunks):
        long = SamplingParams(temperature=0, max_tokens=60)
        gate = gate_after(0, stub)
        generation = await engine.generate([[1, 2, 3]], [long])
        generation.end(TimeoutError("late"))
        gate.set()
        with pytest.raises(TimeoutError, match="late"):
            await generation.take()
        await until(lambda: stub.is_idle)

    run(use)


def test_a_caller_that_is_cancelled_leaves_nothing():
    async def use(engine, stub, chunks):
        call = asyncio.ensure_future(engine.generate([[1, 2, 3]], [GREEDY]))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: engine.num_unseen == 0)
        await until(lambda: stub.is_idle)

    assert run(use).num_blocks_used() == 0


def test_ranks_that_die():
    ends = []

    async def use(engine, stub, chunks):
        def die():
            raise RankError("rank 1 died")

        stub.runner.before = die
        generation = await engine.generate([[1]], [GREEDY])
        with pytest.raises(RankError, match="rank 1 died"):
            await generation.take()
        with pytest.raises(RankError, match="rank 1 died"):
            await engine.generate([[1]], [GREEDY])
        assert str(engine.error) == "rank 1 died"

    run(use, on_end=ends.append)
    assert [str(each) for each in ends] == ["rank 1 died"]


def test_ranks_that_die_while_idle():
    def check():
        raise RankError("rank 0 died")

    async def use(engine, stub, chunks):
        await until(lambda: engine.error is not None)
        with pytest.raises(RankError, match="rank 0 died"):
            await engine.generate([[1]], [GREEDY])

    run(use, check_ranks=check)


def test_closing_ends_what_runs():
    async def use(engine, stub, chunks):
        long = SamplingParams(temperature=0, max_tokens=60)
        gate = gate_after(0, stub)
        generation = await engine.generate([[1, 2, 3]], [long])
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)  # the thread is told, and waited for
        gate.set()
        await closing
        with pytest.raises(RankError, match=telling("server ended")):
            await generation.take()

    run(use)


def test_arrival_is_when_it_was_asked_for_and_the_first_step_is_noted():
    async def use(engine, stub, chunks):
        generation = await engine.generate([[1, 2, 3]], [GREEDY])
        await taken(generation)
        (output,) = generation.outputs
        scheduled_s = output.arrival_s + output.scheduled_s
        assert scheduled_s == pytest.approx(1.0)  # the stub's clock counts steps

    run(use)


def test_what_comes_during_a_step_is_in_the_next_plan():
    """One step is under way meanwhile; a cancelled request is in no plan after that."""

    async def use(engine, stub, chunks):
        plans, gate = [], gate_after(2, stub)
        at_gate, hold = threading.Event(), stub.runner.before

        def note_and_hold():
            if stub.runner.num_steps == 2:
                at_gate.set()
            hold()

        stub.runner.before = note_and_hold
        submit = stub.runner.submit
        stub.runner.submit = lambda plan: plans.append(plan) or submit(plan)
        first = await engine.generate([[1]], [SamplingParams(temperature=0, max_tokens=40)])
        await until(at_gate.is_set)  # a step is there, another one is planned
        num_plans = len(plans)
        asked = asyncio.create_task(engine.generate([[2]], [GREEDY]))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        second = await asked
        await taken(second)
        seqs = [{*batch.seq_ids.tolist()} for batch in plans[num_plans].batches]
        assert set.union(*seqs) == {1}

    run(use)
