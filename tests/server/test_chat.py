"""`/v1/chat/completions` by the openai package, and the other routes."""

import pytest

from server.running import MESSAGES

ASKED = {"model": "tiny", "messages": [*MESSAGES], "temperature": 0}


def test_an_answer(served):
    answer = served.client.chat.completions.create(max_completion_tokens=12, **ASKED)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == served.chat.text
    assert choice.finish_reason == served.chat.finish_reason
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(served.chat.prompt_token_ids)


def test_a_stream(served):
    chunks = list(served.client.chat.completions.create(stream=True, max_tokens=12, **ASKED))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content for delta in deltas) == served.chat.text
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert chunks[-1].choices[0].finish_reason == served.chat.finish_reason
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_accumulated_stream_of_the_client(served):
    text = served.chat.text
    stop = text[4]
    with served.client.chat.completions.stream(max_tokens=12, stop=stop, **ASKED) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].finish_reason == "stop"


def test_logprobs(served):
    answer = served.client.chat.completions.create(
        logprobs=True, top_logprobs=3, max_tokens=12, **ASKED
    )
    found = answer.choices[0].logprobs.content
    assert [each.logprob for each in found] == pytest.approx(
        [each.logprob for each in served.chat.logprobs], abs=1e-5
    )
    for entry, expected in zip(found, served.chat.logprobs, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [logprob for _, logprob in expected.top], abs=1e-5
        )
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_parts_of_text_are_joined(served):
    parts = [{"type": "text", "text": "thing"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    answer = served.client.chat.completions.create(max_tokens=12, **ASKED | {"messages": messages})
    assert answer.choices[0].message.content == served.chat.text


def test_a_call_with_arguments_that_are_no_json(served):
    """Clients send back what a model wrote."""
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"cut'}}
    said = {"role": "assistant", "content": "x", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "no JSON"}
    body = {"messages": [*MESSAGES, said, result], "max_tokens": 2}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.full
def test_without_a_number_of_tokens_it_is_as_many_as_fit(served):
    answer = served.client.chat.completions.create(extra_body={"ignore_eos": True}, **ASKED)
    assert answer.usage.total_tokens == 256


def test_named_variables_of_the_template(served):
    """`reasoning_effort` is one that it has; the usual `verbosity` says nothing new."""
    body = {"messages": [*MESSAGES], "max_tokens": 1, "return_token_ids": True}
    ways = {"reasoning_effort": "low"}, {"chat_template_kwargs": {"reasoning_effort": "low"}}
    prompts = []
    for way in ({"verbosity": "medium"}, *ways):
        answer = served.http.post("/v1/chat/completions", json=body | way)
        assert answer.status_code == 200, answer.text
        prompts.append(answer.json()["choices"][0]["prompt_token_ids"])
    assert prompts[0] == served.chat.prompt_token_ids
    assert prompts[1] == prompts[2] == tokens_of(served, messages=[*MESSAGES], **ways[1])["tokens"]
    assert len(prompts[1]) > len(prompts[0])


def test_the_template_decides(served):
    messages = [{"role": "developer", "content": "x"}]
    answer = served.http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "No developers." in answer.json()["error"]["message"]


def tokens_of(served, **body):
    return served.http.post("/tokenize", json=body).json()


def test_tokens_there_and_back(served):
    answer = tokens_of(served, prompt="the thing", return_token_strs=True)
    expected = served.greedy[0].prompt_token_ids
    assert answer["tokens"] == expected
    assert answer["count"] == len(expected)
    assert answer["max_model_len"] == 256
    assert len(answer["token_strs"]) == len(expected)
    back = served.http.post("/detokenize", json={"tokens": expected})
    assert back.json() == {"prompt": "the thing"}


def test_tokens_of_a_chat(served):
    answer = tokens_of(served, messages=[*MESSAGES])
    assert answer["tokens"] == served.chat.prompt_token_ids
    without = tokens_of(served, messages=[*MESSAGES], add_generation_prompt=False)
    assert without["tokens"] == served.chat.prompt_token_ids[:-1]
    loud = tokens_of(served, messages=[*MESSAGES], chat_template_kwargs={"shout": True})
    assert loud["count"] == answer["count"] + 2


def test_models(served):
    (model,) = served.client.models.list().data
    assert model.id == "tiny"
    assert model.max_model_len == 256
    assert served.client.models.retrieve("tiny") == model


def test_head_is_get_without_its_body(served):
    found = served.http.get("/v1/models")
    head = served.http.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == found.headers["Content-Length"]
    assert served.http.head("/v1/embeddings").status_code == 404


def test_cached_tokens_are_told(served):
    body = ASKED | {"messages": [{"role": "user", "content": "the thing is that " * 4}]}
    usage = [served.client.chat.completions.create(max_tokens=1, **body).usage for _ in range(2)]
    assert usage[1].prompt_tokens_details.cached_tokens >= 16
    assert usage[1].prompt_tokens == usage[0].prompt_tokens
    assert usage[1].completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("path", "status", "keys"),
    [
        ("/", 307, None),
        ("/health", 200, None),
        ("/ping", 200, None),
        ("/version", 200, {"version"}),
        ("/load", 200, {"server_load"}),
        ("/openapi.json", 200, {"openapi", "paths", "info", "components"}),
        # lm-eval uses `/tokenize` in place of a tokenizer where this is answered.
        ("/tokenizer_info", 200, {"eos_token", "bos_token", "pad_token", "chat_template"}),
    ],
)
def test_other_routes(served, path, status, keys):
    answer = served.http.get(path)
    assert answer.status_code == served.http.head(path).status_code == status
    assert answer.content == b"" if keys is None else keys <= answer.json().keys()
    assert answer.headers.get("location") == ("/live" if path == "/" else None)
