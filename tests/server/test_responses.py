"""`/v1/responses` by the openai package: whole, as events, one after the other, with tools."""

import json

import openai
import pytest

from cli.screen import telling
from expertlane.server.call_forms import CALL_FORMS, THOUGHT_FORMS
from expertlane.server.completions import ChatParts
from expertlane.server.marks import MarkedText, Marks
from expertlane.server.response_requests import ResponsesRequest
from expertlane.server.responses import ResponseItems
from expertlane.server.service import ResponseStore, StoredResponse
from server.running import MESSAGES

ASKED = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
INPUT = [MESSAGES[1]]
INSTRUCTIONS = MESSAGES[0]["content"]


def test_a_response_is_the_chat(served):
    answer = served.client.responses.create(input="thing", instructions=INSTRUCTIONS, **ASKED)
    assert answer.output_text == served.chat.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == len(served.chat.prompt_token_ids)
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert [item.type for item in answer.output] == ["message"]
    assert answer.instructions == INSTRUCTIONS


def test_the_stream_of_the_client(served):
    with served.client.responses.stream(input=INPUT, instructions=INSTRUCTIONS, **ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response() if events[-1].type == "response.completed" else None
    assert final is None  # it is incomplete: 12 tokens are fewer than the model would write
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == served.chat.text
    assert events[-1].response.output_text == served.chat.text


def test_a_stream_that_completes(served):
    stop = served.chat.text[4]
    more = {"extra_body": {"stop": stop}}
    with served.client.responses.stream(
        input=INPUT, instructions=INSTRUCTIONS, **ASKED, **more
    ) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == served.chat.text[: served.chat.text.index(stop)]


def test_logprobs(served):
    answer = served.client.responses.create(
        input=INPUT,
        instructions=INSTRUCTIONS,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        **ASKED,
    )
    found = answer.output[0].content[0].logprobs
    assert [each.logprob for each in found] == pytest.approx(
        [each.logprob for each in served.chat.logprobs], abs=1e-5
    )
    assert {len(each.top_logprobs) for each in found} == {3}


def test_the_format_of_the_text(served):
    schema = {"enum": ["yes", "no"]}
    form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    answer = served.client.responses.create(input=INPUT, text={"format": form}, **ASKED)
    assert json.loads(answer.output_text) in ("yes", "no")
    assert answer.text.format.schema_ == schema


def test_one_after_the_other(served):
    """A conversation by ids is that with all items."""
    create = served.client.responses.create
    first = create(input="a", **ASKED)
    second = create(input="thing", previous_response_id=first.id, **ASKED)
    said = [item.model_dump(exclude_none=True) for item in first.output]
    items = [{"role": "user", "content": "a"}, *said, {"role": "user", "content": "thing"}]
    whole = create(input=items, store=False, **ASKED)
    assert second.output_text == whole.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id
    assert served.client.responses.retrieve(first.id) == first
    with pytest.raises(openai.NotFoundError):
        served.client.responses.retrieve(whole.id)
    served.client.responses.delete(first.id)
    for gone in (first.id, "resp_0"):
        with pytest.raises(openai.NotFoundError, match=telling("previous_response_id no")):
            create(input="a", previous_response_id=gone, **ASKED)


def test_what_was_used_least_lately_goes():
    store = ResponseStore(2)
    for name in "abc":
        store.put(StoredResponse({"id": name}, []))
        if name == "b":
            store.get("a", "id")
    assert [*store._kept] == ["a", "c"]
    store.delete("a", "id")
    store.delete("c", "id")
    assert store._num_bytes == 0
    none = ResponseStore(0)
    none.put(StoredResponse({"id": "a"}, []))
    assert (none.is_open, none._num_bytes) == (False, 0)


MARKED = (
    "<think>why</think>so it is: "
    '<tool_call>{"name": "look", "arguments": {"at": "ö"}}</tool_call>\n'
    '<tool_call>{"name": "run", "arguments": {}}</tool_call>'
)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_items_of_reasoning_text_and_calls(size):
    """By the openai package's own accumulation of the events."""
    from openai.lib.streaming.responses._responses import ResponseStreamState

    parts = ChatParts(
        MarkedText(Marks(THOUGHT_FORMS["think"], CALL_FORMS["hermes"]), "", takes_calls=True),
        "{:024x}".format,
    )
    items = ResponseItems("{:024x}".format)
    pieces = [MARKED[i : i + size] for i in range(0, len(MARKED), size)]
    events = []
    for number, piece in enumerate(pieces, 1):
        events += items.feed(parts.feed(piece, is_last=number == len(pieces)), [])
    events += items.end("completed")
    kinds = [item["type"] for item in items.items]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert [item["status"] for item in items.items] == ["completed"] * 4
    assert items.items[0]["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert items.items[1]["content"][0]["text"] == "so it is: "
    assert json.loads(items.items[2]["arguments"]) == {"at": "ö"}

    base = {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": []}
    base |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    last = {"type": "response.completed", "response": base | {"output": items.items}}
    raw = [{"type": "response.created", "response": base}, *events, last]
    state = ResponseStreamState(input_tools=openai.NOT_GIVEN, text_format=openai.NOT_GIVEN)
    from openai._models import construct_type_unchecked
    from openai.types.responses import ResponseStreamEvent

    for number, event in enumerate(raw):
        typed = construct_type_unchecked(
            type_=ResponseStreamEvent, value=event | {"sequence_number": number}
        )
        state.handle_event(typed)
    final = state._completed_response
    shown = [each.model_dump(exclude_none=True, exclude={"parsed"}) for each in final.output]
    assert [each["type"] for each in shown] == kinds
    assert final.output_text == "so it is: "
    assert items.message() == {
        "role": "assistant",
        "content": "so it is: ",
        "reasoning_content": "why",
        "tool_calls": [
            {"id": i["call_id"], "function": {"name": i["name"], "arguments": i["arguments"]}}
            for i in items.items[2:]
        ],
    }


THOUGHT = {"type": "reasoning_text", "text": "why"}
OUTPUT = {"type": "input_text", "text": "2"}


def test_items_make_the_chat_that_they_were():
    given = {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "1", "summary": [], "content": [THOUGHT]},
            {
                "type": "message",
                "id": "2",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
                ],
            },
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}", "id": "3"},
            {"type": "function_call", "call_id": "d", "name": "run", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
            {"type": "function_call_output", "call_id": "d", "output": [OUTPUT]},
            {"role": "assistant", "content": "x"},
            {"role": "assistant", "content": "y"},
        ],
        "instructions": "be brief",
        "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
    }
    chat = ResponsesRequest.model_validate(given).as_chat([{"role": "user", "content": "0"}])
    shown = [message.model_dump(exclude_none=True) for message in chat.messages]
    assert [each["role"] for each in shown] == [
        *("system", "user", "user", "assistant", "tool", "tool", "assistant", "assistant")
    ]
    assert shown[3]["reasoning_content"] == "why"
    assert [call["function"]["name"] for call in shown[3]["tool_calls"]] == ["look", "run"]
    assert [each["content"] for each in shown[4:]] == ["1", "2", "x", "y"]
    assert chat.offered_tools == [
        {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    ]


USER = {"role": "user", "content": "a"}
BAD = [
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"role": "god", "content": "a"}]}, "input"),
    ({"input": [{"role": "user"}]}, "input"),
    ({"input": [USER | {"odd": 1}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "1"}]}, "input"),
    ({"input": [USER | {"content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"role": "developer", "content": "a"}]}, "input"),
    ({"input": "a" * 5_000_000}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 256}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": [USER]}, "messages"),
    ({"n": 2}, "n"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}}, "text.format"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"reasoning": {"effort": "deep"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "summary"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"store": "yes"}, "store"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a"}]}, "tools"),  # no marks in the template
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"stop_token_ids": [270]}, "stop_token_ids"),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[str(change)[:50] for change, _ in BAD])
def test_the_field_is_named(served, change, param):
    answer = served.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 2} | change)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param), error
    assert param.split("[")[0].split(".")[0] in error["message"]
