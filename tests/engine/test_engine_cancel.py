"""Cancellations at every moment of a request's life."""

from dataclasses import replace

import pytest

from engine.stub_runner import StubEngine, expected, of_request, run
from expertlane.schedule.request import Chunk, FinishReason
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)
SAMPLED = SamplingParams(seed=3, max_tokens=5)
PROMPT = [7, 4, 11, 11, 14]
OUTPUT = expected(PROMPT, 12)


class TestCancel:
    """Another request runs beside it, to the same tokens as ever."""

    @pytest.fixture
    def lookahead(self):
        return True

    @pytest.fixture
    def engine(self, lookahead):
        return StubEngine(lookahead=lookahead)

    @pytest.fixture
    def other(self, engine):
        return engine.add("other", PROMPT, replace(GREEDY, max_tokens=12))

    def test_before_its_first_step(self, engine, other):
        output = engine.add("a", [1, 2], GREEDY)
        assert engine.cancel("a")
        assert output.finish_reason is FinishReason.CANCELLED
        chunks = run(engine)
        assert of_request(chunks, "a") == [Chunk("a", None, "", FinishReason.CANCELLED)]
        assert chunks[0].request_id == "a"  # told with the next step
        assert output.token_ids == []
        assert other.token_ids == OUTPUT

    def test_while_it_waits_for_a_row(self):
        engine = StubEngine(max_num_seqs=1)
        other = engine.add("other", PROMPT, replace(GREEDY, max_tokens=12))
        output = engine.add("a", [1, 2], GREEDY)
        engine.step()
        assert engine.scheduler.num_waiting == 1
        assert engine.cancel("a")
        assert engine.scheduler.num_waiting == 0
        run(engine)
        assert output.token_ids == []
        assert other.token_ids == OUTPUT

    @pytest.mark.parametrize("lookahead", [False, True])
    def test_in_flight(self, engine, other, lookahead):
        output = engine.add("a", [1, 2], GREEDY)
        engine.step()
        engine.step()
        assert engine.cancel("a")
        chunks = []
        for _ in range(1 + lookahead):  # steps that it was already in: ranks still write its blocks
            assert engine.scheduler.num_running == 2
            chunks += engine.step()
        assert engine.scheduler.num_running == 1
        assert of_request(chunks, "a") == [Chunk("a", None, "", FinishReason.CANCELLED)]
        assert of_request(run(engine), "a") == []
        assert output.token_ids == expected([1, 2], 2)
        assert len(output.token_times_s) == 2
        assert other.token_ids == OUTPUT

    def test_running_but_not_in_flight(self):
        engine = StubEngine(options=Options(False, 2, "rotating"))  # they take turns
        other = engine.add("other", [3], replace(GREEDY, max_tokens=12))
        output = engine.add("a", [1], GREEDY)
        while not output.token_ids:
            engine.step()
        while engine.scheduler.tables[0][0].in_flight[1]:
            engine.step()
        assert engine.scheduler.num_running == 2
        used = engine.num_blocks_used()
        assert engine.cancel("a")
        assert engine.num_blocks_used() == used - 1
        num_tokens = len(output.token_ids)
        run(engine)
        assert output.token_ids == expected([1], num_tokens)
        assert other.token_ids == expected([3], 12)

    def test_after_it_has_finished(self, engine, other):
        output = engine.add("a", [1, 2], replace(GREEDY, max_tokens=1))
        engine.step()
        assert not engine.cancel("a")
        assert output.finish_reason is FinishReason.LENGTH
        assert of_request(run(engine), "a") == []
        assert other.token_ids == OUTPUT

    def test_twice_or_never_added(self, engine, other):
        engine.add("a", [1, 2], GREEDY)
        assert engine.cancel("a")
        assert not engine.cancel("a")
        assert not engine.cancel("nobody")
        assert len(of_request(run(engine), "a")) == 1
        assert other.token_ids == OUTPUT

    def test_the_only_request(self, engine):
        engine.add("a", [1, 2], SAMPLED)
        engine.step()
        assert engine.cancel("a")
        assert engine.has_unfinished  # its end is still to be told
        assert engine.step() == [Chunk("a", None, "", FinishReason.CANCELLED)]
        assert not engine.has_unfinished
        run(engine)

    def test_its_id_may_be_used_again_at_once(self, engine, other):
        engine.add("a", [1, 2], SAMPLED)
        engine.step()
        engine.cancel("a")
        again = engine.add("a", [3, 4], SAMPLED)
        run(engine)
        assert again.token_ids == expected([3, 4], 5)
        assert other.token_ids == OUTPUT
