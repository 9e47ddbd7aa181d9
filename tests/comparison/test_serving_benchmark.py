"""The load loop on a clock that only moves when the engine works or the loop sleeps."""

import numpy as np
import pytest

from expertlane.comparison.serving_benchmark import TimedOutput, measure, run_loads, serve
from expertlane.progress import Progress
from expertlane.results.estimate import Estimate, Summary
from expertlane.schedule.request import Chunk, FinishReason, RequestOutput
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load, TimedRequest, draw_requests

FOUR = LengthRange(4, 4)


def spread(*values):
    """Mean, median, 95 and 99 %."""
    return Summary(*map(Estimate, values))


class FakeEngine:
    """Gives every request a token a step; a step takes a second, a prompt one more."""

    def __init__(self):
        self.now_s = 100.0
        self.slept = []
        self.running = {}
        self.most_running = 0
        self.params = []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now_s += seconds

    @property
    def has_unfinished(self):
        return bool(self.running)

    def add(self, request_id, prompt, params):
        assert request_id not in self.running
        output = RequestOutput(request_id, None, list(prompt), self.now_s)
        self.running[request_id] = (output, params.max_tokens)
        self.most_running = max(self.most_running, len(self.running))
        self.params.append(params)
        return output

    def step(self):
        assert self.running
        is_prefill = any(not output.token_ids for output, _ in self.running.values())
        self.now_s += 2 if is_prefill else 1
        chunks = []
        for request_id, (output, max_tokens) in list(self.running.items()):
            output.token_ids.append(0)
            output.token_times_s.append(self.now_s - output.arrival_s)
            if len(output.token_ids) == max_tokens:
                output.finish_reason = FinishReason.LENGTH
                del self.running[request_id]
            chunks.append(Chunk(request_id, 0, "", output.finish_reason))
        return chunks


def timed(*of_requests):
    return [TimedRequest([1, 2], output_len, due_s) for output_len, due_s in of_requests]


def run(requests, max_unfinished=None):
    engine, finished = FakeEngine(), []
    served = serve(
        engine,
        requests,
        max_unfinished,
        on_finished=lambda: finished.append(engine.now_s),
        clock=engine.clock,
        sleep=engine.sleep,
    )
    assert len(finished) == len(served)
    return engine, served


def test_a_closed_loop_keeps_as_many_unfinished():
    engine, served = run(timed((1, 0), (3, 0), (2, 0), (1, 0)), 2)
    assert engine.most_running == 2
    assert engine.slept == []
    # 102: both have one, the third comes; 104: its first; 105: second and third end; 107: the last
    assert [each.due_s for each in served] == [100, 100, 102, 105]
    assert [each.token_times_s for each in served] == [[102], [102, 104, 105], [104, 105], [107]]


def test_an_open_loop_adds_what_is_due_and_sleeps_when_idle():
    engine, served = run(timed((3, 0), (1, 0.5), (1, 10)))
    # The second is due at 100.5, in the first step, and can only be added after it.
    assert [each.due_s for each in served] == [100, 100.5, 110]
    assert [each.output.arrival_s for each in served] == [100, 102, 110]
    assert [each.token_times_s for each in served] == [[102, 104, 105], [104], [112]]
    assert [each.output.token_times_s for each in served] == [[2, 4, 5], [2], [2]]
    assert engine.slept == [5]
    assert engine.most_running == 2
    point = measure(Load(3, FOUR, FOUR, rate=1.0), served)
    assert point.ttft_s.mean.value == pytest.approx((2 + 3.5 + 2) / 3)  # from due times
    assert point.prefill_tps is None
    assert point.wall_s.value == 12


def test_requests_are_greedy_and_go_on_beyond_the_end_of_a_sequence():
    engine, _ = run(timed((3, 0)))
    (params,) = engine.params
    assert params.is_greedy
    assert params.ignore_eos
    assert params.max_tokens == 3


def test_no_requests():
    assert run([])[1] == []


def test_the_numbers_of_a_closed_loop():
    _, served = run(timed((3, 0), (1, 0)), 2)
    point = measure(Load(2, FOUR, FOUR, batch=2), served)
    # Both have a first token at 102; the first request goes on at 103 and 104.
    assert (point.batch, point.rate) == (2, None)
    assert (point.num_requests, point.num_prompt_tokens, point.num_output_tokens) == (2, 4, 4)
    assert point.wall_s.value == 4
    assert (point.output_tps.value, point.total_tps.value) == (1, 2)
    assert point.requests_per_s == Estimate(0.5)
    assert point.prefill_tps == Estimate(2)
    assert point.ttft_s == spread(2, 2, 2, 2)
    assert point.tpot_s == point.itl_s == spread(1, 1, 1, 1)
    assert point.e2e_s.mean.value == 3
    assert point.e2e_s.median.value == 3
    assert point.e2e_s.p99.value == pytest.approx(3.98)


def test_one_token_has_no_time_between_tokens():
    _, served = run(timed((1, 0)), 1)
    point = measure(Load(1, FOUR, FOUR, batch=1), served)
    assert (point.tpot_s, point.itl_s) == (None, None)
    assert point.ttft_s == point.e2e_s == spread(2, 2, 2, 2)


def test_prefill_needs_all_requests_at_once():
    _, served = run(timed((1, 0), (1, 0)), 1)
    assert measure(Load(2, FOUR, FOUR, batch=1), served).prefill_tps is None


def test_tpot_is_of_requests_and_itl_of_tokens():
    slow = RequestOutput("0", None, [1], 0.0, [0] * 2, token_times_s=[1.0, 11.0])
    fast = RequestOutput("1", None, [1], 0.0, [0] * 11, token_times_s=[1.0 + i for i in range(11)])
    fast.num_preemptions = 3
    point = measure(Load(2, FOUR, FOUR, rate=1.0), [TimedOutput(0.0, slow), TimedOutput(0.0, fast)])
    assert point.tpot_s.mean.value == pytest.approx(5.5)
    assert point.itl_s.mean.value == pytest.approx(20 / 11)
    assert point.itl_s.median.value == 1
    assert point.num_preemptions == 3


def test_drawn_requests_are_as_asked_for():
    load = Load(2000, LengthRange(3, 9), LengthRange(1, 4), rate=5.0)
    requests = draw_requests(load, 50, [7, 0])
    prompt_lens = [len(request.prompt_token_ids) for request in requests]
    assert set(prompt_lens) == set(range(3, 10))
    assert {request.output_len for request in requests} == {1, 2, 3, 4}
    tokens = {token for request in requests for token in request.prompt_token_ids}
    assert tokens == set(range(50))
    gaps = np.diff([request.due_s for request in requests])
    assert requests[0].due_s == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.1)  # as exponential ones have it
    assert all(type(request.output_len) is int for request in requests)


def test_equal_seeds_draw_equally_and_others_do_not():
    load = Load(4, LengthRange(1, 9), LengthRange(1, 9), batch=4)

    def drawn(*seed):
        return [
            (each.prompt_token_ids, each.output_len) for each in draw_requests(load, 1000, seed)
        ]

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(1, 1)
    assert drawn(1, 0) != drawn(2, 0)
    assert [each.due_s for each in draw_requests(load, 1000, [1])] == [0.0] * 4


def test_each_point_is_warmed_up_with_prompts_of_its_own():
    from cli.stub_llm import StubLLM
    from expertlane.spec.model import PRESETS

    llm = StubLLM(PRESETS["paper-tiny"])
    told = []

    class Told(Progress):
        def task(self, description, total):
            told.append((description, total))

        def advance(self, amount=1):
            told.append(amount)

    loads = [
        Load(3, LengthRange(20, 20), LengthRange(5, 5), batch=2),
        Load(10, LengthRange(20, 20), LengthRange(1, 5), rate=1e6),
    ]
    with llm:
        closed, opened = run_loads(llm, Layout(tp=2), loads, 0, Told())
    assert (closed.num_requests, closed.num_output_tokens) == (3, 15)
    assert (opened.num_requests, opened.rate) == (10, 1e6)
    assert 10 <= opened.num_output_tokens <= 50
    assert told == [("tp=2, batch 2", 3), 1, 1, 1, ("tp=2, 1e+06 req/s", 10), *[1] * 10]
    assert len(llm.prompts) == 2 + 3 + 8 + 10
    assert len(set(map(tuple, llm.prompts))) == len(llm.prompts)
