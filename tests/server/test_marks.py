"""Reasoning and calls of tools: text by pieces is taken apart as the whole is."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import telling
from engine.stub_runner import StubEngine, letters
from expertlane.errors import UserError
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.server.answers import GenerationTask, Piece
from expertlane.server.call_forms import CALL_FORMS, THOUGHT_FORMS
from expertlane.server.completions import ChatAnswer, ChatParts
from expertlane.server.marks import MarkedText, Marks
from expertlane.server.requests import ChatRequest
from expertlane.server.setup import ServedModel
from expertlane.text.chat_template import ChatTemplate
from server.running import ServerInThread

BOTH = Marks(THOUGHT_FORMS["think"], CALL_FORMS["hermes"])
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "ö"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "run", "arguments": {}}</tool_call>'
SCHEMAS = {"look": {"properties": {"at": {"type": "string"}, "n": {"type": "integer"}}}}


def parts(text, prompt="", marks=BOTH, takes_calls=True, cuts=()):
    """Fields of a message, whose text comes in pieces; calls as names and arguments."""
    found, calls = {}, []
    marked = MarkedText(marks, prompt, takes_calls=takes_calls, schemas=SCHEMAS)
    chat = ChatParts(marked, "{:024x}".format)
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[i:j] for i, j in pairwise(places)]
    for number, piece in enumerate(pieces, 1):
        delta = chat.feed(piece, is_last=number == len(pieces))
        for call in delta.pop("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], ""])
            assert call["index"] == len(calls) - 1
            calls[-1][1] += call["function"]["arguments"]
        for name, value in delta.items():
            found[name] = found.get(name, "") + value
    return found | ({"calls": calls} if calls else {})


LOOK = ["look", '{"at": "ö"}']
RUN = ["run", "{}"]
CASES = [
    ("plain", "", {"content": "plain"}),
    ("", "", {}),
    ("<think>why</think>so", "", {"reasoning_content": "why", "content": "so"}),
    ("\n<think>why", "", {"reasoning_content": "why"}),
    ("why</think>so", "…<think>\n", {"reasoning_content": "why", "content": "so"}),
    ("a <think>b</think>", "", {"content": "a <think>b</think>"}),
    ("<thin", "", {"content": "<thin"}),
    (CALL, "", {"calls": [LOOK]}),
    (f"so: {CALL}", "", {"content": "so: ", "calls": [LOOK]}),
    (f"{CALL}\n{SECOND}\n", "", {"calls": [LOOK, RUN]}),
    (f"<think>a<b</think>{SECOND}", "", {"reasoning_content": "a<b", "calls": [RUN]}),
    ("<tool_call>no json</tool_call>", "", {"content": "<tool_call>no json</tool_call>"}),
    ("<tool_call>[1]</tool_call>", "", {"content": "<tool_call>[1]</tool_call>"}),
    ('<tool_call>{"name": "cut', "", {"content": '<tool_call>{"name": "cut'}),
    ('<tool_call>{"name": "cut", "arguments": {"a', "", {"calls": [["cut", '{"a']]}),
    ('<tool_call>{"name": "look"}</tool_call>', "", {"calls": [["look", "{}"]]}),
    (
        '<tool_call>{"arguments": {"at": "}\\""}, "name": "look"}</tool_call>',
        "",
        {"calls": [["look", '{"at": "}\\""}']]},
    ),
    ("a <tool", "", {"content": "a <tool"}),
]
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
BOTH_CALLS = {"content": "so", "calls": [LOOK, ["run", "{}"]]}
# A text with two calls, as each form writes it.
TEXTS = {
    "hermes": f"so{CALL}\n{SECOND}",
    "deepseek_v3": "so"
    + DEEPSEEK.format(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{"
        '"at": "ö"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>run\n```json\n{}\n```<｜tool▁call▁end｜>"
    ),
    "deepseek_v31": "so"
    + DEEPSEEK.format(
        '<｜tool▁call▁begin｜>look<｜tool▁sep｜>{"at": "ö"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>run<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    ),
    "kimi_k2": "so"
    + KIMI.format(
        '<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{"at": "ö"}'
        "<|tool_call_end|><|tool_call_begin|>functions.run:1<|tool_call_argument_begin|>{}"
        "<|tool_call_end|>"
    ),
    "mistral": 'so[TOOL_CALLS][{"name": "look", "arguments": {"at": "ö"}}, '
    '{"name": "run", "arguments": {}}]',
    "mistral_args": 'so[TOOL_CALLS]look[ARGS]{"at": "ö"}[TOOL_CALLS]run[ARGS]{}',
    "llama3_json": '<|python_tag|>{"name": "look", "parameters": {"at": "ö"}}; '
    '{"name": "run", "parameters": {}}',
    "qwen3_coder": "so<tool_call>\n<function=look>\n<parameter=at>\nö\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=run>\n</function>\n</tool_call>",
    "glm45": "so<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>ö</arg_value>\n</tool_call>\n"
    "<tool_call>run\n</tool_call>",
    "minimax": 'so<tool_calls>\n{"name": "look", "arguments": {"at": "ö"}}\n'
    '{"name": "run", "arguments": {}}\n</tool_calls>',
    "minimax_m2": 'so<minimax:tool_call>\n<invoke name="look">\n<parameter name="at">ö'
    '</parameter>\n</invoke>\n<invoke name="run">\n</invoke>\n</minimax:tool_call>',
    "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
    "<|message|>so<|end|><|start|>assistant<|channel|>commentary to=functions.look "
    '<|constrain|>json<|message|>{"at": "ö"}<|call|><|start|>assistant<|channel|>commentary '
    "to=functions.run<|message|>{}",
}


def marks_of(name):
    return Marks(THOUGHT_FORMS["harmony"] if name == "harmony" else None, CALL_FORMS[name])


def expected_of(name):
    more = {"reasoning_content": "hm"} if name == "harmony" else {}
    found = BOTH_CALLS | more
    return {key: value for key, value in found.items() if (name, key) != ("llama3_json", "content")}


@pytest.mark.parametrize(("text", "prompt", "expected"), CASES)
def test_an_answer_is_taken_apart(text, prompt, expected):
    assert parts(text, prompt) == expected


@pytest.mark.parametrize("name", CALL_FORMS)
def test_calls_of_every_form(name):
    assert parts(TEXTS[name], marks=marks_of(name)) == expected_of(name)


@given(st.data())
def test_pieces_give_what_the_whole_gives(data):
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    text, prompt, marks = TEXTS[name], "", marks_of(name)
    if data.draw(st.booleans()):
        text, prompt, _ = data.draw(st.sampled_from(CASES))
        marks = BOTH
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    whole = parts(text, prompt, marks)
    assert parts(text, prompt, marks, cuts=cuts) == whole
    assert parts(text, prompt, marks, cuts=range(len(text))) == whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("glm45", "<tool_call>look\n<arg_key>n</arg_key>\n<arg_value>5</arg_value>\n</tool_call>"),
        (
            "qwen3_coder",
            "<tool_call>\n<function=look>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_the_schema_says_what_is_a_text(name, text):
    assert parts(text, marks=marks_of(name)) == {"calls": [["look", '{"n": 5}']]}
    as_text = text.replace("5", "five")
    assert parts(as_text, marks=marks_of(name)) == {"calls": [["look", '{"n": "five"}']]}
    other = text.replace("<parameter=n", "<parameter=at").replace(">n<", ">at<").replace("5", '"')
    assert parts(other, marks=marks_of(name)) == {"calls": [["look", '{"at": "\\""}']]}


def test_without_tools_a_call_is_text():
    assert parts(CALL, takes_calls=False) == {"content": CALL}
    assert parts(CALL, marks=Marks()) == {"content": CALL}
    assert parts("<think>a</think>", marks=Marks()) == {"content": "<think>a</think>"}


@pytest.mark.parametrize(
    ("source", "thoughts", "calls"),
    [
        ("{{ messages }}", None, None),
        ("… </think> …", "think", None),
        ('… <tool_call> {"name": …, "arguments": …}', None, "hermes"),
        ("… <tool_call> <function=…>", None, "qwen3_coder"),
        ("<tool_call>{{ name }} <arg_key>", None, "glm45"),
        ("<｜tool▁calls▁begin｜> ```json", None, "deepseek_v3"),
        ("<｜tool▁calls▁begin｜> </think>", "think", "deepseek_v31"),
        ("<|tool_calls_section_begin|>", None, "kimi_k2"),
        ("[TOOL_CALLS] [THINK] [/THINK] [ARGS]", "mistral", "mistral_args"),
        ("[TOOL_CALLS]", None, "mistral"),
        ("<|channel|>analysis<|message|>", "harmony", "harmony"),
        ('<|start_header_id|> {"name": "x", "parameters": {}}', None, "llama3_json"),
        ("<minimax:tool_call> </think>", "think", "minimax_m2"),
        ("<tool_calls>", None, "minimax"),
    ],
)
def test_the_template_tells_the_marks(source, thoughts, calls):
    assert Marks.of_template(source) == Marks(THOUGHT_FORMS.get(thoughts), CALL_FORMS.get(calls))


def test_the_marks_by_name():
    named = Marks.of_template("", calls="kimi_k2", thoughts="none")
    assert named == Marks(None, CALL_FORMS["kimi_k2"])
    with pytest.raises(UserError, match=telling("--tool-call-parser x hermes none")):
        Marks.of_template("", calls="x")


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
    with server.openai() as client:
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
    answer = served.server.post(body, "/v1/chat/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def answer_of(server, text, *, stream=False):
    """The choice, or what a stream has of it, of a model that says a text."""
    request = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "stream": stream}
    )
    prepared = GenerationTask(request, [[0]], [request.params({}, max_tokens=5)], ["a"])
    answer = ChatAnswer(server.service, prepared)
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
