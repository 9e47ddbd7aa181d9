"""Reasoning and calls of tools: text by pieces is taken apart as the whole is."""

import json
from itertools import pairwise

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.stub_runner import StubEngine, letters
from expertlane.engine.chat_template import ChatTemplate
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.server.answers import ChatAnswer, Piece
from expertlane.server.marks import ChatParts, MarkedText, Marks
from expertlane.server.requests import ChatRequest
from expertlane.server.service import ServedModel
from server.running import PATIENCE_S, ServerInThread

BOTH = Marks(has_reasoning=True, has_calls=True)
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "ö"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "run", "arguments": {}}</tool_call>'


def parts(text, prompt="", marks=BOTH, takes_calls=True, cuts=()):
    """Fields of a message, whose text comes in pieces; without the ids of calls."""
    found = {}
    chat = ChatParts(MarkedText(marks, prompt, takes_calls=takes_calls))
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[i:j] for i, j in pairwise(places)]
    for number, piece in enumerate(pieces, 1):
        for name, value in chat.feed(piece, is_last=number == len(pieces)).items():
            empty = [] if isinstance(value, list) else ""
            found[name] = found.get(name, empty) + value
    for call in found.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
    return found


def call(index, name, **arguments):
    function = {
        "name": name,
        "arguments": json.dumps(arguments, ensure_ascii=False, separators=(",", ":")),
    }
    return {"index": index, "type": "function", "function": function}


CASES = [
    ("plain", "", {"content": "plain"}),
    ("", "", {}),
    ("<think>why</think>so", "", {"reasoning_content": "why", "content": "so"}),
    ("\n<think>why", "", {"reasoning_content": "why"}),
    ("why</think>so", "…<think>\n", {"reasoning_content": "why", "content": "so"}),
    ("a <think>b</think>", "", {"content": "a <think>b</think>"}),
    ("<thin", "", {"content": "<thin"}),
    (CALL, "", {"tool_calls": [call(0, "look", at="ö")]}),
    (f"so: {CALL}", "", {"content": "so: ", "tool_calls": [call(0, "look", at="ö")]}),
    (f"{CALL}\n{SECOND}\n", "", {"tool_calls": [call(0, "look", at="ö"), call(1, "run")]}),
    (
        f"<think>a<b</think>{SECOND}",
        "",
        {"reasoning_content": "a<b", "tool_calls": [call(0, "run")]},
    ),
    ("<tool_call>no json</tool_call>", "", {"content": "<tool_call>no json</tool_call>"}),
    ("<tool_call>[1]</tool_call>", "", {"content": "<tool_call>[1]</tool_call>"}),
    ('<tool_call>{"name": "cut', "", {"content": '<tool_call>{"name": "cut'}),
    ("a <tool", "", {"content": "a <tool"}),
]


@pytest.mark.parametrize(("text", "prompt", "expected"), CASES)
def test_a_text_at_once_and_letter_by_letter(text, prompt, expected):
    assert parts(text, prompt) == expected
    assert parts(text, prompt, cuts=range(1, len(text))) == expected


@given(st.data())
def test_pieces_do_not_matter(data):
    words = st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "x", "\n"])
    text = "".join(data.draw(st.lists(words | st.just('{"name": "a", "arguments": {}}'))))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert parts(text, cuts=cuts) == parts(text)


def test_without_tools_a_call_is_text():
    assert parts(CALL, takes_calls=False) == {"content": CALL}
    assert parts(CALL, marks=Marks()) == {"content": CALL}
    assert parts("<think>a</think>", marks=Marks()) == {"content": "<think>a</think>"}


@pytest.mark.parametrize(
    ("source", "marks"),
    [
        ("{{ messages }}", Marks()),
        ("… </think> …", Marks(has_reasoning=True)),
        ('… <tool_call> {"name": …, "arguments": …}', Marks(has_calls=True)),
        ("… <tool_call> <function=…>", Marks()),
    ],
)
def test_the_template_tells_the_marks(source, marks):
    assert Marks.of_template(source) == marks


TEMPLATE = """{# <tool_call> {"name": "", "arguments": {}} </think> #}
{%- for tool in tools or [] %}{{ tool.function.name }}{% endfor %}
{%- for m in messages %}{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.arguments.at }}{% endfor %}{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server():
    engine = StubEngine(tokenizer=letters())
    template = ChatTemplate(TEMPLATE, {}, "test")
    server = ServerInThread(ServedModel("stub", engine, engine.limits, letters(), template))
    yield server
    server.stop()


def test_tools_and_calls_reach_the_template(server):
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"at": "b"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "c"},
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="stub", messages=messages, tools=[TOOL], tool_choice="auto", max_tokens=1
        )
        without = client.chat.completions.create(
            model="stub", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=1
        )
    assert answer.usage.prompt_tokens == len("look" + "abc")
    assert without.usage.prompt_tokens == len("abc")


def test_tools_of_a_model_without_are_refused(served):
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}
    answer = httpx.post(f"{served.server.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def answer_of(server, text, *, stream=False):
    """The choice, or what a stream has of it, of a model that says a text."""
    request = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "stream": stream}
    )
    answer = ChatAnswer(server.service, request, [[0]], [request.params({}, 5, 0)], "a")
    output = RequestOutput("0", None, [0], 0.0, [1, 2])
    if not stream:
        return answer.choice(Piece(0, output, 0, 2, text, FinishReason.STOP))
    half = len(text) // 2
    return [
        answer.delta(Piece(0, output, 0, 1, text[:half], None)),
        answer.delta(Piece(0, output, 1, 2, text[half:], FinishReason.STOP)),
    ]


def test_a_message_with_all_fields(server):
    choice = answer_of(server, f"<think>a</think>{SECOND}")
    message = choice["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == "a"
    (made,) = message["tool_calls"]
    assert made["function"] == {"name": "run", "arguments": "{}"}
    assert "index" not in made
    assert choice["finish_reason"] == "tool_calls"
    assert answer_of(server, "plain")["finish_reason"] == "stop"


def test_a_stream_with_all_fields(server):
    first, last = answer_of(server, f"<think>aaaaaaaaaaaa</think>{SECOND}", stream=True)
    assert first["delta"]["role"] == "assistant"
    assert first["delta"]["reasoning_content"].startswith("a")
    assert first["finish_reason"] is None
    assert last["delta"]["tool_calls"][0]["index"] == 0
    assert last["finish_reason"] == "tool_calls"
