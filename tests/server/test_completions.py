"""`/v1/completions` by the openai package: what `LLM.generate` gives, whole and as a stream."""

import pytest

from server.running import DRAWN, GREEDY, PROMPTS

ASKED = {"model": "tiny", "temperature": 0, "max_tokens": GREEDY.max_tokens}
ASKED_DRAWN = {
    "model": "tiny",
    "temperature": DRAWN.temperature,
    "top_p": DRAWN.top_p,
    "seed": DRAWN.seed,
    "max_tokens": DRAWN.max_tokens,
}


@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_one_prompt(served, place):
    answer = served.client.completions.create(prompt=PROMPTS[place], **ASKED)
    expected = served.greedy[place]
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == len(expected.prompt_token_ids) + len(expected.token_ids)


def test_several_prompts_and_their_tokens(served):
    texts = [prompt for prompt in PROMPTS if isinstance(prompt, str)]
    answer = served.client.completions.create(
        prompt=texts, extra_body={"return_token_ids": True}, **ASKED
    )
    expected = [output for output in served.greedy if output.prompt is not None]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.token_ids for choice in answer.choices] == [o.token_ids for o in expected]
    assert [choice.prompt_token_ids for choice in answer.choices] == [
        output.prompt_token_ids for output in expected
    ]


@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_a_stream(served, place):
    chunks = list(
        served.client.completions.create(
            prompt=PROMPTS[place], stream=True, stream_options={"include_usage": True}, **ASKED
        )
    )
    expected = served.greedy[place]
    *parts, end = chunks
    assert "".join(part.choices[0].text for part in parts) == expected.text
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [expected.finish_reason]
    assert end.choices == []
    assert end.usage.completion_tokens == len(expected.token_ids)
    assert {part.id for part in chunks} == {end.id}


def test_a_stream_of_several_choices_with_usage_everywhere(served):
    prompts = [output.prompt_token_ids for output in served.greedy]
    chunks = served.client.completions.create(
        prompt=prompts,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        **ASKED,
    )
    texts, totals = [""] * len(prompts), []
    for chunk in chunks:
        totals.append(chunk.usage.completion_tokens)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [output.text for output in served.greedy]
    assert totals == sorted(totals)
    assert totals[-1] == sum(len(output.token_ids) for output in served.greedy)


def test_drawn_tokens_and_their_logprobs(served):
    for prompt, expected in zip(PROMPTS, served.drawn, strict=True):
        answer = served.client.completions.create(
            prompt=prompt,
            logprobs=2,
            extra_body={"return_tokens_as_token_ids": True},
            **ASKED_DRAWN,
        )
        (choice,) = answer.choices
        assert choice.text == expected.text
        assert choice.logprobs.token_logprobs == pytest.approx(
            [each.logprob for each in expected.logprobs], abs=1e-5
        )
        for top, each in zip(choice.logprobs.top_logprobs, expected.logprobs, strict=True):
            likely = dict(each.top) | {each.token_id: each.logprob}
            assert top == {
                f"token_id:{token}": pytest.approx(logprob, abs=1e-5)
                for token, logprob in likely.items()
            }
        assert choice.logprobs.text_offset[0] == 0
        tokens = [f"token_id:{token}" for token in expected.token_ids]
        assert choice.logprobs.tokens == tokens


def test_logprobs_of_a_stream_are_those_of_the_whole(served):
    whole = served.client.completions.create(prompt="a", logprobs=0, **ASKED_DRAWN).choices[0]
    parts = [
        chunk.choices[0].logprobs
        for chunk in served.client.completions.create(
            prompt="a", logprobs=0, stream=True, **ASKED_DRAWN
        )
    ]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [each for part in parts for each in getattr(part, name)]
        assert joined == pytest.approx(getattr(whole.logprobs, name)), name


@pytest.mark.parametrize("stream", [False, True])
def test_echo(served, stream):
    given = served.client.completions.create(prompt="a", echo=True, stream=stream, **ASKED)
    texts = [c.choices[0].text for c in given] if stream else [given.choices[0].text]
    assert "".join(texts) == "a" + served.greedy[1].text


def test_choices_of_a_prompt_differ_by_their_seed(served):
    answer = served.client.completions.create(prompt=["a", "the thing"], n=3, **ASKED_DRAWN)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.choices[0].text == served.drawn[1].text
    assert answer.choices[3].text == served.drawn[0].text
    assert len({choice.text for choice in answer.choices}) == 6


def test_a_stop_string_ends_it(served):
    text = served.greedy[0].text
    stop = text[3:5]
    answer = served.client.completions.create(prompt=PROMPTS[0], stop=stop, **ASKED)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_token_ends_it_but_not_before_min_tokens(served):
    token_ids = served.greedy[0].token_ids
    extra = {"stop_token_ids": [token_ids[2]], "return_token_ids": True}
    answer = served.client.completions.create(prompt=PROMPTS[0], extra_body=extra, **ASKED)
    assert answer.choices[0].token_ids == token_ids[: token_ids.index(token_ids[2]) + 1]
    assert answer.choices[0].finish_reason == "stop"
    extra["min_tokens"] = 8
    answer = served.client.completions.create(prompt=PROMPTS[0], extra_body=extra, **ASKED)
    found = answer.choices[0].token_ids
    assert len(found) >= 8
    assert token_ids[2] not in found[:7]


def test_a_bias_decides(served):
    answer = served.client.completions.create(
        prompt="a", logit_bias={"9": 100}, extra_body={"return_token_ids": True}, **ASKED
    )
    assert answer.choices[0].token_ids == [9] * GREEDY.max_tokens


def test_without_a_number_of_tokens_it_is_16(served):
    answer = served.client.completions.create(
        model="tiny", prompt="a", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16


def test_null_is_as_many_as_fit(served):
    given = {"prompt": [5] * 250, "temperature": 0, "max_tokens": None, "ignore_eos": True}
    answer = served.http.post("/v1/completions", json=given).json()
    assert answer["usage"]["completion_tokens"] == 256 - 250


@pytest.mark.parametrize(
    "more",
    [
        {"user": "me", "metadata": {"a": 1}, "store": False, "service_tier": "auto", "n": 1},
        {"best_of": 1, "use_beam_search": False, "skip_special_tokens": True, "suffix": None},
        {"repetition_penalty": 1.0, "logprobs": None, "stop": None, "top_k": -1, "min_p": 0.0},
        {"ignore_eos": True, "length_penalty": 1, "priority": 3, "seed": -1, "timeout_s": 60},
        {
            "prompt": ["thing"],
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "seed": None,
            "top_p": 1,
        },
        {"best_of": 1, "stream": True, "temperature": 0.0, "ignore_eos": True},
    ],
)
def test_what_clients_send_without_effect_is_taken(served, more):
    given = {"prompt": "a", "temperature": 0, "max_tokens": 2} | more
    answer = served.http.post("/v1/completions", json=given)
    assert answer.status_code == 200, answer.text
