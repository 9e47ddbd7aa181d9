"""`LLM`: on a runner without a model, and on real ranks."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from engine.stub_runner import expected
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM
from expertlane.errors import CapacityError, RankError, UserError
from expertlane.schedule.request import FinishReason
from expertlane.spec.model import PRESETS
from expertlane.spec.sampling import SamplingParams
from parity.contract import MIN_ROUTER_MARGIN, MIN_TOP2_GAP
from schedule.paged import check_empty

TINY = PRESETS["paper-tiny"]
GREEDY = SamplingParams(temperature=0, max_tokens=5)
PROMPTS = [[7, 4, 11, 11, 14], [3], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def check_idle(llm: LLM) -> None:
    """No request and no block is left; what may be left is a step of cancelled requests."""
    while llm.engine._loop.uncommitted:
        llm.engine.step()
    assert not llm.engine.has_unfinished
    check_empty(llm.engine.scheduler)


class TestGenerate:
    def test_outputs_are_in_the_prompts_order(self, stub_llm):
        params = [replace(GREEDY, max_tokens=n) for n in (9, 1, 4)]
        outputs = stub_llm.generate(PROMPTS, params)
        for output, prompt, of_prompt in zip(outputs, PROMPTS, params, strict=True):
            assert output.prompt_token_ids == prompt
            assert output.token_ids == expected(prompt, of_prompt.max_tokens)
            assert output.finish_reason is FinishReason.LENGTH
        assert stub_llm.runner.num_steps == 9
        check_idle(stub_llm)

    def test_one_kind_of_sampling_for_all_or_one_each(self, stub_llm):
        mixed = [GREEDY, SamplingParams(seed=1, max_tokens=3), replace(GREEDY, logprobs=1)]
        outputs = stub_llm.generate(PROMPTS, mixed)
        assert [len(output.token_ids) for output in outputs] == [5, 3, 5]
        assert [len(output.logprobs) for output in outputs] == [0, 0, 5]
        assert [len(o.token_ids) for o in stub_llm.generate(PROMPTS, GREEDY)] == [5, 5, 5]

    def test_the_default_sampling(self, stub_llm):
        (output,) = stub_llm.generate([PROMPTS[0]])
        # 64 positions end it before the default of 256 tokens does.
        assert len(output.token_ids) == 60
        (state,) = stub_llm.runner.states.values()
        assert (state.params.temperature, state.params.max_tokens) == (1.0, 256)

    @pytest.mark.parametrize("kind", [list, tuple, np.array])
    def test_one_prompt_by_itself_or_several_of_any_type(self, stub_llm, kind):
        (output,) = stub_llm.generate(kind(PROMPTS[0]), GREEDY)
        assert output.token_ids == expected(PROMPTS[0], 5)
        outputs = stub_llm.generate(kind([kind([1, 2]), kind([3, 4])]), GREEDY)
        assert [o.token_ids for o in outputs] == [expected([1, 2], 5), expected([3, 4], 5)]

    def test_no_prompt(self, stub_llm):
        assert stub_llm.generate([], GREEDY) == []
        assert list(stub_llm.stream([], GREEDY)) == []
        assert stub_llm.runner.num_steps == 0

    def test_requests_of_a_users_own_loop_go_on_beside(self, stub_llm):
        own = stub_llm.engine.add("mine", [5], replace(GREEDY, max_tokens=8))
        stub_llm.generate(PROMPTS, GREEDY)
        assert own.token_ids == expected([5], 5)
        while stub_llm.engine.has_unfinished:
            stub_llm.engine.step()
        assert own.token_ids == expected([5], 8)

    def test_an_interruption_cancels(self, stub_llm):
        def interrupt():
            if stub_llm.runner.num_steps == 2:
                raise KeyboardInterrupt

        stub_llm.runner.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            stub_llm.generate(PROMPTS, GREEDY)
        stub_llm.runner.before = lambda: None
        ends = [(chunk.token_id, chunk.finish_reason) for chunk in stub_llm.engine.step()]
        assert ends == [(None, FinishReason.CANCELLED)] * 3
        assert stub_llm.generate(PROMPTS[0], GREEDY)[0].token_ids == expected(PROMPTS[0], 5)
        check_idle(stub_llm)


class TestStream:
    def test_chunks_as_they_come(self, stub_llm):
        params = [replace(GREEDY, max_tokens=n) for n in (6, 1, 3)]
        got = {0: [], 1: [], 2: []}
        steps = []
        for place, chunk in stub_llm.stream(PROMPTS, params):
            got[place].append(chunk.token_id)
            steps.append(stub_llm.runner.num_steps)
            assert (chunk.finish_reason is None) == (len(got[place]) < params[place].max_tokens)
        assert got == {i: expected(PROMPTS[i], params[i].max_tokens) for i in range(3)}
        assert steps == [1, 1, 1, 2, 2, 3, 3, 4, 5, 6]
        check_idle(stub_llm)

    def test_closed_early_it_cancels(self, stub_llm):
        stream = stub_llm.stream(PROMPTS, replace(GREEDY, max_tokens=50))
        for _ in range(4):
            next(stream)
        stream.close()
        num_steps = stub_llm.runner.num_steps
        check_idle(stub_llm)
        assert stub_llm.runner.num_steps <= num_steps + 2  # those that were under way
        assert stub_llm.generate(PROMPTS[0], GREEDY)[0].token_ids == expected(PROMPTS[0], 5)

    def test_never_begun_it_leaves_nothing(self, stub_llm):
        stub_llm.stream(PROMPTS, GREEDY)
        assert not stub_llm.engine.has_unfinished

    def test_two_at_once_take_nothing_from_each_other(self, stub_llm):
        first = stub_llm.stream([[1], [2]], replace(GREEDY, max_tokens=9))
        second = stub_llm.stream([[3], [4]], replace(GREEDY, max_tokens=3))
        got = {(0, 0): [], (0, 1): [], (1, 0): [], (1, 1): []}
        streams = [first, second]
        for turn in range(1000):
            place_and_chunk = next(streams[turn % 2], None)
            if place_and_chunk is not None:
                place, chunk = place_and_chunk
                got[turn % 2, place].append(chunk.token_id)
        assert got == {
            (0, 0): expected([1], 9),
            (0, 1): expected([2], 9),
            (1, 0): expected([3], 3),
            (1, 1): expected([4], 3),
        }
        check_idle(stub_llm)


BAD_PROMPTS = {
    "empty": ([], "prompt 2 empty 1"),
    "too long": ([1] * 65, "prompt 2 65 64"),
    "unknown token": ([1, 26], "prompt 2 token 26 0 25"),
    "text": ("hello", "prompt 2 text tokenizer ids"),
}


class TestMistakes:
    @pytest.mark.parametrize("kind", BAD_PROMPTS)
    @pytest.mark.parametrize("how", ["generate", "stream"])
    def test_a_bad_prompt_keeps_all_of_its_call_out(self, stub_llm, how, kind):
        prompt, words = BAD_PROMPTS[kind]
        with pytest.raises(UserError, match=telling(words)):
            list(getattr(stub_llm, how)([PROMPTS[0], prompt, PROMPTS[1]], GREEDY))
        assert stub_llm.runner.num_steps == 0
        outputs = stub_llm.generate(PROMPTS, GREEDY)
        assert [o.token_ids for o in outputs] == [expected(prompt, 5) for prompt in PROMPTS]
        check_idle(stub_llm)

    def test_another_number_of_sampling_parameters(self, stub_llm):
        with pytest.raises(UserError, match=telling("3 prompts 2 sampling")):
            stub_llm.generate(PROMPTS, [GREEDY, GREEDY])
        assert not stub_llm.engine.has_unfinished

    def test_a_chat_without_a_tokenizer(self, stub_llm):
        with pytest.raises(UserError, match=telling("tokenizer chat")):
            stub_llm.chat([{"role": "user", "content": "hello"}])

    def test_a_closed_one(self, stub_llm):
        stub_llm.close()
        stub_llm.close()
        with pytest.raises(RankError, match=telling("ranks gone LLM")):
            stub_llm.generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def one_rank():
    with LLM("paper-tiny", dtype="float32", num_blocks=32, block_size=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def decided(references):
    """Prompts of several lengths and the reference's outputs; no token is a close call."""
    random = np.random.default_rng(0)
    found = []
    while len(found) < 6:
        prompt = random.integers(0, TINY.vocab_size, random.integers(1, 20))
        run = references.model(TINY, 0).generate(prompt[None], 8)
        top2 = np.partition(run.logits, -2, axis=-1)[..., -2:]
        gap = (top2[..., 1] - top2[..., 0]).min()
        if run.router_margins.min() >= MIN_ROUTER_MARGIN and gap > 8 * MIN_TOP2_GAP:
            found.append((prompt.tolist(), run.tokens[0].tolist()))
    return tuple(zip(*found, strict=True))


class TestRanks:
    def test_the_reference_s_tokens(self, one_rank, decided):
        prompts, tokens = decided
        for prompt, of_prompt in zip(prompts, tokens, strict=True):
            (output,) = one_rank.generate(prompt, replace(GREEDY, max_tokens=8))
            assert output.token_ids == of_prompt
        outputs = one_rank.generate(prompts, replace(GREEDY, max_tokens=8, logprobs=0))
        assert [output.token_ids for output in outputs] == list(tokens)
        for output in outputs:
            assert all(found.logprob < 0 for found in output.logprobs)
            assert [found.token_id for found in output.logprobs] == output.token_ids
        check_idle(one_rank)

    def test_sampling_is_the_seed_s_alone(self, one_rank):
        params = SamplingParams(seed=5, max_tokens=6, temperature=0.7)
        alone = one_rank.generate([1, 2, 3], params)[0].token_ids
        beside = one_rank.generate([[9], [1, 2, 3], [4, 4]], params)[1].token_ids
        assert beside == alone
        others = [
            one_rank.generate([1, 2, 3], replace(params, seed=seed))[0].token_ids
            for seed in (6, None, None)
        ]
        assert len({tuple(tokens) for tokens in [alone, *others]}) == 4

    def test_two_ranks_and_the_end_of_one(self, decided):
        """The same tokens; a killed rank is an error in bounded time, and the last word."""
        with LLM("paper-tiny", layout="dp=2,ep=2", dtype="float32", timeout_s=20) as llm:
            prompts, tokens = decided
            outputs = llm.generate(prompts, replace(GREEDY, max_tokens=8))
            assert [output.token_ids for output in outputs] == list(tokens)

            killed_s = []

            def kill():
                killed_s.append(time.monotonic())
                os.kill(llm._pool.pid(1), signal.SIGKILL)

            killer = threading.Timer(0.3, kill)
            killer.start()
            with pytest.raises(RankError) as caught:
                llm.generate([[1]] * 10_000, replace(GREEDY, max_tokens=60))  # minutes
            assert time.monotonic() - killed_s[0] < 10
            assert tells(str(caught.value), "rank 1 killed SIGKILL")
            assert llm._pool.is_closed
            with pytest.raises(RankError, match=telling("ranks gone LLM")):
                llm.generate([1], GREEDY)
            with pytest.raises(RankError, match=telling("ranks gone LLM")):
                next(llm.stream([1], GREEDY))

    def test_more_ranks_than_the_machine_should_run(self):
        with pytest.raises(CapacityError, match=telling("ranks cores")):
            LLM("paper-tiny", layout="replicas=10000")

    def test_more_ranks_if_asked_for(self, monkeypatch):
        asked = []
        monkeypatch.setattr(llm_module, "start_pool", asked.append)
        with pytest.raises(SystemExit):  # no pool: a rank of torchrun's has ended
            LLM("paper-tiny", layout="replicas=10000", oversubscribe=True)
        assert (asked[0].layout.world_size, asked[0].oversubscribe) == (10_000, True)
