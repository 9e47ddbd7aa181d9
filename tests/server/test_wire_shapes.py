"""Requests as clients send them, seen on the wire: `docs/http_api.md` has their versions."""

import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "thing"}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SHAPES = [
    (
        "inspect-ai",
        CHAT,
        {"messages": [USER], "logprobs": True, "max_tokens": 8, "top_logprobs": 2},
    ),
    ("litellm", CHAT, {"messages": [USER], "max_tokens": 5} | STREAM),
    ("langchain-openai", CHAT, {"messages": [USER], "max_completion_tokens": 5, "stream": False}),
    (
        "langchain-openai",
        COMPLETIONS,
        {
            "prompt": ["thing"],
            "frequency_penalty": 0,
            "logprobs": None,
            "max_tokens": 5,
            "n": 1,
            "presence_penalty": 0,
            "seed": None,
            "temperature": 0.7,
            "top_p": 1,
        },
    ),
    ("pydantic-ai", CHAT, {"messages": [USER], "max_completion_tokens": 8} | STREAM),
    (
        "lm-eval",
        COMPLETIONS,
        {
            "prompt": [[5, 6, 7]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ),
    (
        "sglang.bench_serving",
        COMPLETIONS,
        {
            "prompt": "thing",
            "best_of": 1,
            "max_tokens": 8,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
        },
    ),
    (
        "vllm bench serve",
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "thing"}]}],
            "max_completion_tokens": 8,
            "ignore_eos": True,
        }
        | STREAM,
    ),
]


@pytest.mark.parametrize(
    ("path", "body"),
    [shape[1:] for shape in SHAPES],
    ids=[f"{name}-{path}" for name, path, _ in SHAPES],
)
def test_it_is_taken(served, path, body):
    answer = served.http.post(path, json={"model": "tiny"} | body)
    assert answer.status_code == 200, answer.text
    kind = answer.headers["Content-Type"].partition(";")[0]
    assert kind == ("text/event-stream" if body.get("stream") else "application/json")
