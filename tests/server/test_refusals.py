"""Wrong requests: each gets a 4xx and an error that names the field; the server goes on."""

import json
import re
import socket

import pytest

from cli.screen import tells
from expertlane.server.bodies import MOST_BODY_BYTES
from expertlane.server.requests import MOST_CHOICES, MOST_PROMPTS
from server.running import MESSAGES, PATIENCE_S, events_in
from text.test_grammars import COSTLY_LATER, TOO_COSTLY

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 2},
    CHAT: {"messages": [*MESSAGES], "max_tokens": 2},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
CALL = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "a"}}
NAMED = {"type": "function", "function": {"name": "nobody"}}
HARD = {"type": "integer", "multipleOf": 1_000_003, "minimum": 7}
DEEP: dict = {}
for _ in range(70):
    DEEP = {"items": DEEP}
OF_BOTH = [
    ({"unknown_field": 1}, "unknown_field"),
    ({"model": 5}, "model"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"270": 1}}, "logit_bias"),
    ({"logit_bias": [5, 1]}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"n": 0}, "n"),
    ({"n": MOST_CHOICES + 1}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_token_ids": [270]}, "stop_token_ids"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"max_tokens": 256}, "max_tokens"),  # with the prompt, more than there is room for
    ({"max_tokens": "16"}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"wrong": True}}, "stream_options.wrong"),
    ({"priority": 1.5}, "priority"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"user": 5}, "user"),
    ({"metadata": "x"}, "metadata"),
    ({"store": True}, "store"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"guided_json": {"type": "unheard of"}}, "guided_json"),
    ({"guided_json": {"not": {"type": "string"}}}, "guided_json"),
    ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "guided_json"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": "{cut"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": DEEP}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 2**18]}}, "guided_json"),
    ({"guided_json": {"properties": {f"p{i}": HARD for i in range(200)}}}, "guided_json"),
    ({"guided_regex": "(("}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a\\1"}, "guided_regex"),
    ({"guided_regex": "(" * 9000 + ")" * 9000}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [5]}, "guided_choice[0]"),
    ({"guided_choice": ["a"] * 4097}, "guided_choice"),
    ({"guided_grammar": "start: nobody"}, "guided_grammar"),
    ({"guided_grammar": "root ::= nobody"}, "guided_grammar"),
    ({"grammar": "("}, "grammar"),
    ({"grammar": "start: " + "(" * 9000 + "a" + ")" * 9000}, "grammar"),
    ({"regex": "a", "grammar": "start: a"}, "grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    (
        {"structured_outputs": {"disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
    ),
    (
        {"regex": "a", "structured_outputs": {"disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
    ),
    ({"structured_outputs": {"disable_any_whitespace": False}}, "structured_outputs"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
]
CASES = [
    *((path, change, param) for path in (COMPLETIONS, CHAT) for change, param in OF_BOTH),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [[5], []]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, {"prompt": [5, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [5, -1]}, "prompt"),
    (COMPLETIONS, {"prompt": [270]}, "prompt"),
    (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * (MOST_PROMPTS + 1)}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * MOST_PROMPTS, "n": 2}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 256}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 255}, "max_tokens"),  # too long by one token
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": [5] * 257, "echo": True, "max_tokens": 0}, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 30_000}, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 5_000_000}, "prompt"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 5_000_000}]}, "messages"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"messages": []}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "god", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "odd": 1}]}, "messages[0].odd"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "messages[0].content[0].type",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        "messages[0].tool_calls[0]",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages"),
    (CHAT, {"logprobs": 5}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 3}, "max_tokens"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"tools": [TOOL | {"type": "code"}]}, "tools[0].type"),
    (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
    ),
    (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "a", "strict": "yes"}}]},
        "tools[0].function.strict",
    ),
    (CHAT, {"tools": [TOOL] * 129}, "tools"),
    (CHAT, {"tools": [TOOL], "parallel_tool_calls": 0}, "parallel_tool_calls"),
    (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"reasoning_effort": "deep"}, "reasoning_effort"),
    (
        *(CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": 1}}),
        "reasoning_effort",
    ),
    (CHAT, {"verbosity": "high"}, "verbosity"),  # no variable of the template
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"messages": [*MESSAGES]}, "prompt"),
    ("/tokenize", {"odd": 5}, "odd"),
    ("/detokenize", {"tokens": [270]}, "tokens"),
    ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
]


@pytest.mark.parametrize(
    ("path", "change", "param"),
    CASES,
    ids=[f"{path}-{str(change)[:50]}" for path, change, _ in CASES],
)
def test_the_field_is_named(served, path, change, param):
    answer = served.http.post(path, json=GOOD[path] | change)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_a_grammar_that_costs_too_much(served):
    """Its field is named, and the next grammar is compiled; `tests/text` tries many others."""
    answer = served.server.post(GOOD[COMPLETIONS] | {"guided_regex": "(a?){1000}a{1000}"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "guided_regex"
    assert re.match(f"guided_regex: .*({TOO_COSTLY})", error["message"])
    answer = served.server.post(GOOD[COMPLETIONS] | {"guided_regex": "a{2}b?"})
    assert answer.json()["choices"][0]["text"] == "aa"


def test_a_grammar_that_costs_too_much_later(served):
    body = {"prompt": "a", "max_tokens": 60, "guided_grammar": COSTLY_LATER}
    answer = served.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "grammar_too_costly"
    assert tells(answer.json()["error"]["message"], "output token 22 grammar costly items")
    *chunks, last = events_in(served.http.post(COMPLETIONS, json=body | {"stream": True}).text)
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks)) <= 21
    assert last["error"]["code"] == "grammar_too_costly"
    assert served.http.post(COMPLETIONS, json=GOOD[COMPLETIONS]).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b'{"prompt": "a"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
    ],
    ids=lambda body: str(body[:24]),
)
def test_broken_bodies(served, body):
    headers = {"Content-Type": "application/json"}
    answer = served.http.post(COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] or (error["code"] == "invalid_json" and "the body" in error["message"])


def test_no_json_by_its_type(served):
    answer = served.http.post(COMPLETIONS, data={"prompt": "a"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_no_words_of_pydantic(served):
    bad = GOOD[CHAT] | {"messages": []}
    message = served.http.post(CHAT, json=bad).json()["error"]["message"]
    assert tells(message, "messages 1 0")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/images/generations", 404),
        ("POST", "/v1/responses", 404),
        ("PUT", COMPLETIONS, 405),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_other_routes(served, method, path, status):
    answer = served.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_another_model(served, path):
    answer = served.http.post(path, json=GOOD[path] | {"model": "/etc/passwd"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert answer.json()["error"]["code"] == "model_not_found"


def answer_of(connection):
    """All that comes until the server closes the connection."""
    connection.settimeout(PATIENCE_S)
    answer = b""
    while part := connection.recv(4096):
        answer += part
    return answer


@pytest.mark.parametrize(
    "head",
    [b"\x16\x03\x01\r\n\r\n", b"GET /health HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade"],
    ids=["tls", "upgrade"],
)
def test_odd_bytes_write_no_log(served, caplog, head):
    with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
        connection.sendall(head + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer_of(connection)
    assert caplog.records == []


@pytest.mark.parametrize("says_so", [True, False])
def test_a_large_body(served, says_so):
    """Refused by its header, or once it turns out to be large."""
    size = b"Content-Length: 100000000" if says_so else b"Transfer-Encoding: chunked"
    with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % size)
        for _ in range(0 if says_so else MOST_BODY_BYTES // 2**20):
            connection.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        connection.sendall(b"" if says_so else b"1\r\n \r\n")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_one_bad_prompt_of_several_queues_none(served):
    answer = served.http.post(COMPLETIONS, json={"prompt": [[5], [270]], "max_tokens": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("prompt[1]: token id 270")
    assert served.server.service.num_queued == 0


def test_a_long_message_is_cut(served):
    answer = served.http.post(COMPLETIONS, json={"prompt": "a", "x" * 10_000: 1})
    assert answer.status_code == 400
    assert len(json.dumps(answer.json())) < 2000
