"""Log-probabilities of prompts by HTTP: what `LLM.generate` gives of the same tokens."""

import pytest

from expertlane.text.tokenizer import TokenBytes
from server.running import PROMPTS

TEXT = PROMPTS[3]
SCORE = {"model": "tiny", "temperature": 0, "echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def scored(served):
    """Of each prompt, vLLM's field."""
    found = []
    for prompt in PROMPTS:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        answer = served.http.post("/v1/completions", json=body | {"prompt_logprobs": 2})
        found.append(answer.json()["choices"][0]["prompt_logprobs"])
    return found


def test_vllm_s_field(served, scored):
    for each, output in zip(scored, served.greedy, strict=True):
        assert len(each) == len(output.prompt_token_ids)
        assert each[0] is None
        for token_id, of_token in zip(output.prompt_token_ids[1:], each[1:], strict=True):
            assert str(token_id) in of_token
            assert len(of_token) in (2, 3)
            ranks = sorted(entry["rank"] for entry in of_token.values())
            assert ranks[:2] == [1, 2]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_what_lm_eval_sends(served, scored, max_tokens, stream):
    """`token_logprobs[context:-1]` are the prompt's; `top_logprobs` tell whether it is greedy."""
    prompts = [output.prompt_token_ids for output in served.greedy]
    given = served.client.completions.create(
        prompt=prompts, max_tokens=max_tokens, seed=1234, stream=stream, **SCORE
    )
    choices = [choice for part in given for choice in part.choices] if stream else given.choices
    for index, (prompt, of_vllm) in enumerate(zip(prompts, scored, strict=True)):
        found = [choice.logprobs for choice in choices if choice.index == index]
        logprobs = [value for each in found for value in each.token_logprobs]
        tops = [value for each in found for value in each.top_logprobs]
        assert len(logprobs) == len(tops) == len(prompt) + max_tokens
        assert logprobs[0] is None
        assert tops[0] is None
        for place in range(1, len(prompt)):
            own = of_vllm[place][str(prompt[place])]
            assert logprobs[place] == pytest.approx(own["logprob"], abs=1e-4)
            assert (logprobs[place] == max(tops[place].values())) == (own["rank"] == 1)


def test_without_output(served):
    answer = served.client.completions.create(prompt=TEXT, max_tokens=0, **SCORE)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert answer.usage.completion_tokens == 0
    assert [TEXT[i:] for i in choice.logprobs.text_offset] == [
        "".join(choice.logprobs.tokens[i:]) for i in range(len(choice.logprobs.tokens))
    ]
    plain = served.client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True)
    assert plain.choices[0].text == TEXT


def test_a_prompt_as_long_as_the_model_takes(served):
    answer = served.client.completions.create(prompt=[5] * 256, max_tokens=0, **SCORE)
    assert len(answer.choices[0].logprobs.tokens) == 256


def test_of_a_chat(served):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = served.http.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert all(len(of_token) == 1 for of_token in answer["prompt_logprobs"][1:])


def test_half_characters_have_their_bytes(served):
    """`ö` is two tokens here; neither is U+FFFD."""
    answer = served.client.completions.create(prompt="aöb", max_tokens=0, **SCORE)
    found = answer.choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xb6", "b"]
    assert found.text_offset == [0, 1, 1, 2]
    core = served.server.service.model.tokenizer._core
    own = TokenBytes(core, {})
    for text in ("aöb", " the thing\n", "日本"):
        assert b"".join(own[each] for each in core.encode(text).ids) == text.encode()
    assert own[0] == b"<u>"
    assert own[10**6] == b""
