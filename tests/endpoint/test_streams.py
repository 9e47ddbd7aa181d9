"""Answers read while they come, and how one differs from the true one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.fake_server import DONE, event, text, usage
from expertlane.client.connection import Answer
from expertlane.endpoint.streams import Stream, StreamDifference, difference

TOKENS = st.lists(st.integers(0, 50), min_size=8, max_size=24, unique=True)


def stream(*events: bytes, size: int = 10**6) -> Stream:
    """Events that come in parts of a size."""
    answer = Answer(200, "text/event-stream")
    found, data = Stream(answer), b"".join(events)
    for number, begin in enumerate(range(0, len(data), size)):
        answer.body += data[begin : begin + size]
        answer.times_s.append(float(number))
        answer.ends.append(len(answer.body))
        found.read()
    return found


def ids(*token_ids: int, **more: object) -> bytes:
    return event({"choices": [{"text": "x", "token_ids": list(token_ids)} | more]})


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_tokens_are_read_however_they_are_parted(size):
    found = stream(b"id: a:1\n" + ids(1, 2), b": ping\n\n", ids(3), usage(4, 3), DONE, size=size)
    assert found.tokens == [1, 2, 3]
    assert found.num_tokens == found.num_counted == 3
    assert found.is_done
    assert found.finish_reason is None
    assert sorted(found.times_s) == found.times_s


def test_text_stands_for_tokens_where_there_are_no_ids():
    chat = event({"choices": [{"delta": {"content": "b"}, "finish_reason": None}]})
    opening = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    end = event({"choices": [{"delta": {}, "finish_reason": "length"}]})
    found = stream(opening, text("a"), chat, end)
    assert found.tokens == "ab"
    assert found.num_tokens == 2
    assert found.finish_reason == "length"
    assert not found.is_done


def test_an_error_in_the_stream_is_told():
    found = stream(ids(1), event({"error": {"message": "EngineCore died"}}))
    assert found.is_broken_off
    assert found.error == "EngineCore died"


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: []\n\n", b"data: \xff\n\n", b"x\n\n"])
def test_what_is_no_event_is_passed_over(data):
    assert stream(data, ids(1)).tokens == [1]


def test_margins_are_those_of_the_two_likeliest():
    of_completion = ids(1, logprobs={"top_logprobs": [{"a": -0.1, "b": -0.3, "c": -9.0}]})
    content = [{"top_logprobs": [{"logprob": -2.0}, {"logprob": -1.0}]}]
    of_chat = event({"choices": [{"delta": {"content": "b"}, "logprobs": {"content": content}}]})
    found = stream(of_completion, ids(2))
    assert found.margin_at(0) == pytest.approx(0.2)
    assert found.margin_at(1) is None
    assert stream(of_chat).margin_at(0) == 1.0


@given(TOKENS, st.data())
def test_a_chunk_that_comes_twice_is_repeated(truth, data):
    end = data.draw(st.integers(1, len(truth) - 3))
    size = data.draw(st.integers(1, end))
    found = truth[:end] + truth[end - size : end] + truth[end:]
    for answer in (found, found[: len(truth)]):
        if len(answer) - end >= 3:
            assert difference(truth, answer, is_whole=True) == StreamDifference(
                "repeated", end, size
            )


@given(TOKENS, st.data())
def test_a_chunk_that_does_not_come_is_left_out(truth, data):
    place = data.draw(st.integers(0, len(truth) - 1))
    size = data.draw(st.integers(1, len(truth) - place))
    found = truth[:place] + truth[place + size :]
    assert difference(truth, found, is_whole=True) == StreamDifference("dropped", place, size)


@given(TOKENS, st.data())
def test_another_token_is_a_change(truth, data):
    place = data.draw(st.integers(0, len(truth) - 1))
    found = [*truth[:place], 99, *truth[place + 1 :]]
    assert difference(truth, found, is_whole=True) == StreamDifference("changed", place)


@given(TOKENS, st.data())
def test_what_was_cut_off_may_be_the_beginning(truth, data):
    num = data.draw(st.integers(0, len(truth) - 1))
    assert difference(truth, truth[:num], is_whole=False) is None
    assert difference(truth, truth[:num], is_whole=True) is not None
    assert difference(truth, truth, is_whole=True) is None


def test_letters_are_compared_like_tokens():
    assert difference("abcdef", "abcbcdef", is_whole=True) == StreamDifference("repeated", 3, 2)
    assert difference("abcdef", "abef", is_whole=True) == StreamDifference("dropped", 2, 2)
    assert difference("", "", is_whole=True) is None
    assert json.dumps(difference("a", "", is_whole=True).how) == '"dropped"'
