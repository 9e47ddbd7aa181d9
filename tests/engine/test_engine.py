"""Requests through the engine, on a runner without a model: outputs, ends, cancels, refusals."""

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import tells
from engine.stub_runner import StubEngine, expected, letters, of_request, run, spell
from expertlane.errors import UserError
from expertlane.schedule.request import Chunk, FinishReason
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams, Structured
from schedule.paged import check_empty

GREEDY = SamplingParams(temperature=0, max_tokens=5)
SAMPLED = SamplingParams(seed=3, max_tokens=5)
PROMPT = [7, 4, 11, 11, 14]
OUTPUT = expected(PROMPT, 12)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_request_gets_its_tokens_one_a_step(params):
    engine = StubEngine()
    output = engine.add("a", PROMPT, params)
    assert engine.has_unfinished
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("a", None, PROMPT)
    assert (output.token_ids, output.finish_reason, output.ttft_s) == ([], None, None)
    for number, token in enumerate(OUTPUT[:5], start=1):
        reason = FinishReason.LENGTH if number == 5 else None
        assert engine.step() == [Chunk("a", token, "", reason)]
        assert output.token_ids == OUTPUT[:number]
        assert output.finish_reason is reason
    assert not engine.has_unfinished
    came_s = [output.arrival_s + each for each in output.token_times_s]
    assert came_s == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])  # the stub's clock counts steps
    assert (output.ttft_s, output.e2e_s) == (output.token_times_s[0], output.token_times_s[4])
    assert output.tpot_s == pytest.approx(1.0)
    assert (output.text, output.logprobs, output.num_preemptions) == ("", [], 0)


def test_one_token_has_no_time_per_token():
    engine = StubEngine()
    output = engine.add("a", PROMPT, replace(GREEDY, max_tokens=1))
    assert engine.step() == [Chunk("a", OUTPUT[0], "", FinishReason.LENGTH)]
    assert output.tpot_s is None


def test_preempted_requests_are_as_if_they_were_not():
    engine = StubEngine(num_blocks=9, block_size=2, prefix_caching=False)
    outputs = [engine.add(str(i), [i, i], replace(SAMPLED, max_tokens=10)) for i in range(6)]
    run(engine)
    assert sum(output.num_preemptions for output in outputs) > 0
    assert engine.scheduler.num_preemptions == sum(output.num_preemptions for output in outputs)
    for i, output in enumerate(outputs):
        assert output.token_ids == expected([i, i], 10)
    # The ranks forget those that are done with the next plan.
    engine.add("last", PROMPT, GREEDY)
    run(engine)
    assert engine.runner.states == {}


@pytest.mark.parametrize(
    ("changes", "eos", "num_tokens", "reason"),
    [
        ({}, [], 5, "length"),
        ({"stop_token_ids": [OUTPUT[2]]}, [], 3, "stop"),
        ({"stop_token_ids": [OUTPUT[2], OUTPUT[1]]}, [], 2, "stop"),
        ({}, [OUTPUT[3]], 4, "stop"),
        ({"ignore_eos": True}, [OUTPUT[3]], 5, "length"),
        ({"ignore_eos": True, "stop_token_ids": [OUTPUT[3]]}, [OUTPUT[3]], 4, "stop"),
        ({"stop_token_ids": [9]}, [8], 5, "length"),
        ({"max_tokens": 1}, [], 1, "length"),
        ({"max_tokens": 1}, [OUTPUT[0]], 1, "stop"),
        ({"max_tokens": 1000}, [], 60, "length"),  # 64 positions, and one token is never fed
    ],
)
def test_what_ends_an_output(changes, eos, num_tokens, reason):
    engine = StubEngine(eos_token_ids=eos)
    output = engine.add("a", PROMPT, replace(GREEDY, **changes))
    chunks = run(engine)
    assert output.token_ids == expected(PROMPT, num_tokens)
    assert output.finish_reason == reason
    assert [chunk.token_id for chunk in chunks] == output.token_ids


def test_logprobs_for_those_that_asked():
    engine = StubEngine()
    asked = engine.add("asked", PROMPT, replace(GREEDY, logprobs=2))
    chosen_only = engine.add("chosen only", PROMPT[1:], replace(SAMPLED, logprobs=0))
    none = engine.add("none", PROMPT, SAMPLED)
    run(engine)
    assert [found.token_id for found in asked.logprobs] == asked.token_ids
    assert [len(found.top) for found in asked.logprobs] == [2] * 5
    assert [found.logprob for found in chosen_only.logprobs] == [
        -float(token) for token in expected(PROMPT[1:], 5)
    ]
    assert [len(found.top) for found in chosen_only.logprobs] == [0] * 5
    assert none.logprobs == []


class TestText:
    """Prompts and stop strings, with a tokenizer whose tokens are letters."""

    def test_text_in_and_out(self):
        engine = StubEngine(tokenizer=letters())
        output = engine.add("a", "hello", GREEDY)
        as_tokens = engine.add("b", PROMPT, GREEDY)
        chunks = run(engine)
        assert (output.prompt, output.prompt_token_ids) == ("hello", PROMPT)
        assert output.text == as_tokens.text == spell(OUTPUT[:5])
        assert as_tokens.prompt is None
        assert "".join(chunk.text for chunk in of_request(chunks, "a")) == output.text

    def test_a_stop_string_is_cut_and_ends_the_request(self):
        stop = spell(OUTPUT[2:4])
        engine = StubEngine(tokenizer=letters())
        output = engine.add("a", "hello", replace(GREEDY, max_tokens=12, stop=stop))
        other = engine.add("b", "other", replace(GREEDY, max_tokens=12))
        chunks = of_request(run(engine), "a")
        assert output.text == spell(OUTPUT[:2])
        assert output.token_ids == OUTPUT[:4]
        assert output.finish_reason is FinishReason.STOP
        # What may begin a stop string is held back.
        assert [chunk.text for chunk in chunks] == [spell(OUTPUT[:1]), spell(OUTPUT[1:2]), "", ""]
        assert [chunk.finish_reason for chunk in chunks] == [None] * 3 + [FinishReason.STOP]
        assert other.token_ids == expected(other.prompt_token_ids, 12)

    @pytest.mark.parametrize("lookahead", [False, True])
    def test_the_scheduler_lets_go_of_a_stopped_request_at_once(self, lookahead):
        engine = StubEngine(tokenizer=letters(), lookahead=lookahead)
        engine.add("a", "hello", replace(GREEDY, max_tokens=60, stop=spell(OUTPUT[1:2])))
        engine.step()
        assert engine.step()[0].finish_reason is FinishReason.STOP
        assert not engine.has_unfinished
        for _ in range(1 + lookahead):  # steps that it was already in
            assert engine.num_blocks_used() > 0
            assert engine.step() == []
        check_empty(engine.scheduler)
        assert engine.runner.num_steps == 3 + lookahead

    def test_the_token_that_stops_has_no_text(self):
        engine = StubEngine(tokenizer=letters())
        output = engine.add("a", "hello", replace(GREEDY, stop_token_ids=[OUTPUT[2]]))
        run(engine)
        assert output.text == spell(OUTPUT[:2])
        assert output.token_ids == OUTPUT[:3]

    def test_a_cancelled_request_gives_what_was_held_back(self):
        engine = StubEngine(tokenizer=letters())
        output = engine.add("a", "hello", replace(GREEDY, stop=spell(OUTPUT[:3])))
        assert engine.step()[0].text == ""
        assert engine.cancel("a")
        assert run(engine) == [Chunk("a", None, spell(OUTPUT[:1]), FinishReason.CANCELLED)]
        assert output.text == spell(OUTPUT[:1])

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(
        st.text(alphabet="abcxyz", min_size=1, max_size=8),
        st.lists(
            st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=2), max_size=4
        ),
        st.integers(1, 30),
    )
    def test_any_stop_strings(self, prompt, stop, max_tokens):
        tokenizer = letters()
        engine = StubEngine(tokenizer=tokenizer)
        output = engine.add("a", prompt, replace(GREEDY, stop=stop, max_tokens=max_tokens))
        chunks = run(engine)
        whole = spell(expected(tokenizer.encode(prompt), max_tokens))
        ends = sorted((whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole)
        assert output.text == "".join(chunk.text for chunk in chunks)
        assert output.text == (whole[: ends[0][1]] if ends else whole)
        assert len(output.token_ids) == (ends[0][0] if ends else max_tokens)
        assert output.finish_reason == ("stop" if ends else "length")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(["tp=1", "dp=2", "pp=3", "replicas=2,pp=2,dp=2"]),
    st.sampled_from([(1, "drained"), (2, "drained"), (3, "rotating")]),
    st.integers(1, 5),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_steps_that_end_in_any_order(
    layout, schedule, block_size, budget, lookahead, sampled, seed
):
    random = np.random.default_rng(seed)
    engine = StubEngine(
        layout,
        Options(False, *schedule),
        lookahead=lookahead and "pp" not in layout,
        choose=lambda plans: plans[random.integers(len(plans))],
        block_size=block_size,
        max_num_batched_tokens=budget,
        num_blocks=40,
    )
    asked = {}
    for number in range(12):
        prompt = random.integers(0, 3, random.integers(1, 12)).tolist()
        num_tokens = int(random.integers(1, 9))
        params = replace(SAMPLED if sampled else GREEDY, max_tokens=num_tokens)
        asked[str(number)] = engine.add(str(number), prompt, params), expected(prompt, num_tokens)
        engine.step()
    run(engine)
    for output, tokens in asked.values():
        assert output.token_ids == tokens


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

    def test_its_id_may_be_used_again_at_once(self, engine, other):
        engine.add("a", [1, 2], SAMPLED)
        engine.step()
        engine.cancel("a")
        again = engine.add("a", [3, 4], SAMPLED)
        run(engine)
        assert again.token_ids == expected([3, 4], 5)
        assert other.token_ids == OUTPUT


# Prompt, sampling parameters, what the message says; the engine has a request "there" already.
BAD_REQUESTS = {
    "empty": ([], {}, "a prompt empty 1"),
    "too long": ([1] * 65, {}, "a prompt 65 64 1"),
    "unknown token": ([1, 26, 2], {}, "a token 26 0 25"),
    "negative token": ([1, -1], {}, "a token -1 0 25"),
    "enormous token": ([2**63], {}, "a token 9223372036854775808 0 25"),
    "fractions": ([1.5], {}, "a prompt list whole numbers"),
    "nested": ([[1, 2], [3]], {}, "a prompt list whole numbers"),
    "text": ("hello", {}, "a text tokenizer ids"),
    "stop strings": (PROMPT, {"stop": "x"}, "a stop tokenizer stop_token_ids"),
    "max_tokens": (PROMPT, {"max_tokens": -5}, "max_tokens -5 1"),
    "more than the cache": ([1] * 61, {}, "a prompt 61 15 60"),
    "duplicate": (PROMPT, {}, "there id"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_one_line_and_changes_nothing(kind):
    prompt, changes, words = BAD_REQUESTS[kind]
    name = "there" if kind == "duplicate" else "a"
    engine = StubEngine(num_blocks=15)
    good = [engine.add(str(i), PROMPT[i:], replace(SAMPLED, max_tokens=12)) for i in range(3)]
    good.append(engine.add("there", PROMPT[3:], replace(SAMPLED, max_tokens=12)))

    def state():
        scheduler = engine.scheduler
        return scheduler.num_waiting, scheduler.num_running, engine.num_blocks_used()

    for _ in range(4):  # before, between and after steps
        before = state()
        with pytest.raises(UserError) as caught:
            engine.add(name, prompt, replace(GREEDY, **changes))
        assert tells(str(caught.value), words)
        assert "\n" not in str(caught.value)
        assert state() == before
        engine.step()
    chunks = run(engine)
    assert {chunk.request_id for chunk in chunks} == {output.request_id for output in good}
    for i, output in enumerate(good):
        assert output.token_ids == expected(PROMPT[i:], 12)
    again = engine.add(name, PROMPT, GREEDY)  # the id is free
    run(engine)
    assert again.token_ids == OUTPUT[:5]


def test_a_prompt_is_copied():
    engine, prompt = StubEngine(), np.array(PROMPT)
    output = engine.add("a", prompt, GREEDY)
    prompt[:] = 0
    run(engine)
    assert output.token_ids == OUTPUT[:5]


class CountingGrammars:
    """Grammars that allow every token, and end an output after so many, or fail."""

    def __init__(self, num_tokens, error=None):
        self._num_tokens, self._error = num_tokens, error

    def begin(self, params, stop_token_ids):
        return SimpleNamespace(
            mask=np.full(4, 255, dtype=np.uint8), is_ended=False, error=None, num_taken=0
        )

    def advance(self, tokens):
        for constraint, _ in tokens:
            constraint.num_taken += 1
            if constraint.num_taken == self._num_tokens:
                constraint.is_ended, constraint.error = self._error is None, self._error
        done = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("stop", [(), (spell(OUTPUT[2:4]) + "0",)])  # whose beginning is held back
@pytest.mark.parametrize("error", [None, "too costly"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6])  # max_tokens is 5
def test_the_end_of_a_grammar_does_not_go_by_when_masks_come(monkeypatch, num_tokens, error, stop):
    def chunks(comes_in_time):
        engine = StubEngine(tokenizer=letters())
        engine.grammars = CountingGrammars(num_tokens, error)
        take = engine._take_masks
        monkeypatch.setattr(
            engine,
            "_take_masks",
            lambda timeout_s: take(None) if comes_in_time or timeout_s is None else None,
        )
        params = replace(GREEDY, structured=Structured(regex="any"), stop=stop)
        output = engine.add("a", PROMPT, params)
        found = run(engine)
        assert output.text == "".join(chunk.text for chunk in found) == spell(output.token_ids)
        return found

    *tokens, last = found = chunks(True)
    assert chunks(False) == found
    assert [chunk.token_id for chunk in tokens] == OUTPUT[: min(num_tokens, 5 - (num_tokens >= 5))]
    assert {chunk.finish_reason for chunk in tokens} == {None}
    if num_tokens >= 5:  # its last token has reached its length
        assert (last.token_id, last.finish_reason) == (OUTPUT[4], FinishReason.LENGTH)
        return
    assert last.token_id is None
    assert last.finish_reason is (FinishReason.STOP if error is None else FinishReason.GRAMMAR)
    assert last.text == (spell(OUTPUT[2:4]) if stop and num_tokens == 4 else "")
