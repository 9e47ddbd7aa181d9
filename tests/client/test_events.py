"""What is read of an answer, however it came in parts."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.fake_server import DONE, event, text, usage
from expertlane.client.connection import Answer, AnswerError, Url, read_answer
from expertlane.errors import UserError


def chat(delta, reason=None):
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


OPENING = chat({"role": "assistant", "content": ""})
# Events, and which of them bring tokens.
STREAMS = {
    "a token each": ([text("a"), text("b", "length"), usage(3, 2)], [0, 1]),
    "several in one": ([text("ab"), text("cd"), usage(3, 9)], [0, 1]),
    "no usage": ([text("a"), text("b"), text("", "stop")], [0, 1]),
    "an end without a token": ([text("a"), text("", "stop"), usage(3, 1)], [0]),
    "an end with a token": ([text("a"), text("", "stop"), usage(3, 2)], [0, 1]),
    "half a character": ([text(""), text("é"), text("b"), usage(3, 3)], [0, 1, 2]),
    "no tokenizer": ([text(""), text(""), text("", "length"), usage(3, 3)], [0, 1, 2]),
    "no tokenizer, no usage": ([text(""), text("", "length")], [0, 1]),
    "a chat": ([OPENING, chat({"content": "a"}), chat({}, "stop"), usage(3, 1)], [1]),
    "reasoning": ([OPENING, chat({"reasoning_content": "a"}), usage(3, 1)], [1]),
    "a call": ([OPENING, chat({"tool_calls": [{"function": {"arguments": "{"}}]})], [1]),
    "a comment": ([b": ping\n\n", text("a"), usage(3, 1)], [1]),
    "numbered": ([b"id: mine:1\n" + text("a"), b"id: mine:2\n" + usage(3, 1)], [0]),
    "quotes": ([text('{"error": "usage": {"choices": [{'), usage(3, 1)], [0]),
}


@pytest.mark.parametrize(("events", "counted"), STREAMS.values(), ids=STREAMS)
@given(data=st.data())
def test_any_parts_give_the_same_tokens(events, counted, data):
    body = b"".join([*events, b"id: mine:3\n", DONE])
    cuts = data.draw(st.lists(st.integers(1, len(body) - 1), unique=True, max_size=12))
    ends = [*sorted(cuts), len(body)]
    times_s = [float(number) for number in range(len(ends))]
    found = read_answer(
        Answer(200, "text/event-stream", bytearray(body), array("d", times_s), array("q", ends))
    )
    ends_of_events = [len(b"".join(events[: number + 1])) for number in range(len(events))]
    expected = [
        next(time_s for time_s, end in zip(times_s, ends, strict=True) if end >= ends_of_events[at])
        for at in counted
    ]
    assert found.times_s == expected
    is_counted = b'"completion_tokens"' in body
    assert (found.num_tokens is not None, found.num_prompt_tokens) == (
        is_counted,
        3 if is_counted else None,
    )


def test_what_the_server_had_in_its_cache():
    body = text() + usage(8, 1, prompt_tokens_details={"cached_tokens": 5}) + DONE
    assert read(body).num_cached_tokens == 5


def read(body, status=200, content_type="text/event-stream"):
    return read_answer(
        Answer(status, content_type, bytearray(body), array("d", [0.0]), array("q", [len(body)]))
    )


FAILURES = {
    "refused": (b'{"error": {"message": "full"}}', 429, "HTTP 429", "full"),
    "of fastapi": (b'{"detail": "Not Found"}', 404, "HTTP 404", "Not Found"),
    "no JSON": (b"<html>\nbad\xff gateway", 502, "HTTP 502", "<html> bad\ufffd gateway"),
    "in the stream": (
        text() + event({"error": {"message": "out of memory"}}) + DONE,
        200,
        "error in the stream",
        "out of memory",
    ),
    "cut": (text() + text(), 200, "stream ended early", "the connection closed before [DONE]"),
    "nothing": (DONE, 200, "no tokens", "the stream brought none"),
}


@pytest.mark.parametrize(("body", "status", "name", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_are_named(body, status, name, message):
    with pytest.raises(AnswerError) as caught:
        read(body, status)
    assert (caught.value.name, str(caught.value)) == (name, message)


def test_an_answer_that_is_no_stream():
    with pytest.raises(AnswerError, match="application/json") as caught:
        read(b"{}", content_type="application/json")
    assert caught.value.name == "no event stream"


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("http://h:1", "http://h:1"),
        ("h:1/v1/", "http://h:1"),
        ("https://h/base/v1", "https://h:443/base"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_urls(given_text, shown):
    assert str(Url.parse(given_text)) == shown


NO_URLS = [
    "",
    "ftp://h",
    "http://",
    "http://h:x",
    "http://h:99999",
    "http://u:p@h",
    "http://h/?a=1",
]
NO_URLS += ["http://h/a b", "http://h\r\nX: y", "http://h/é", "http://[::1"]


@pytest.mark.parametrize("wrong", NO_URLS)
def test_what_is_no_url(wrong):
    with pytest.raises(UserError, match="--url"):
        Url.parse(wrong)
