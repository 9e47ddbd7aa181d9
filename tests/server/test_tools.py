"""Grammars of calls: whatever they let a model write, the reader finds calls that fit."""

import json
import random
from functools import cache

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cli.screen import telling
from expertlane.server.call_forms import CALL_FORMS, HARMONY_MARKS, THOUGHT_FORMS
from expertlane.server.completions import ChatParts
from expertlane.server.errors import ApiError
from expertlane.server.marks import MarkedText, Marks
from expertlane.server.requests import ChatRequest
from expertlane.server.tools import structured_chat
from expertlane.text.grammars import Grammars
from expertlane.text.tokenizer import Tokenizer

LOOK = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "maxLength": 3},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "how": {"enum": ["fast", "slow"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
    },
    "required": ["n", "how"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
}
LOOK["$defs"]["part"] |= {"required": ["x"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": LOOK, "strict": True}},
    {"type": "function", "function": {"name": "run"}},
]
SCHEMAS = {"look": LOOK, "run": {"type": "object", "maxProperties": 0}}
EOS = "<end>"


@cache
def tokenizer(name, are_special):
    """Bytes, and the marks of a form: control tokens, or no tokens at all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS])
    form = CALL_FORMS[name]
    marks = [form.opener, form.next_opener, form.name_end.strip(), *form.closers, *HARMONY_MARKS]
    marks += [THOUGHT_FORMS["think"].end]
    if are_special:
        core.add_special_tokens([each for each in marks if each[:2] in ("<|", "<｜", "[T", "[A")])
    return Tokenizer(core, [core.token_to_id(EOS)])


def write(name, request, *, are_special, seed, prompt="", thoughts=None, most=4000):
    """What a model of no opinion writes, and its text as the server sees it."""
    own = tokenizer(name, are_special)
    marks = Marks(thoughts, CALL_FORMS[name])
    structured, _ = structured_chat(request, marks, prompt, own)
    grammars = Grammars(own, own.vocab_size, own.eos_token_ids)
    matcher = grammars.compile(structured).start.deep_copy()
    mask, draw, tokens = grammars.compile(structured).mask, random.Random(seed), []
    (eos,) = own.eos_token_ids
    form = marks.calls
    urges = [form.value_end, form.opener, THOUGHT_FORMS["think"].end, "}", '"']
    urges = [own.encode(each, add_special_tokens=False) for each in urges if each]
    while not matcher.is_stopped():
        assert len(tokens) < most, "it never ends"
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        written = [draw.choice(allowed)]
        if len(allowed) > 100 and draw.random() < 0.2:  # random bytes would hardly ever be a mark
            written = draw.choice(urges)
        if written[0] == eos:
            break
        num_taken = matcher.try_consume_tokens(written)
        assert num_taken or written[0] not in allowed
        tokens += written[:num_taken]
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        assert not matcher.is_error(), matcher.get_error()
    shown = marks.shown_token_ids(own)
    seen = [each for each in tokens if each < 256 or each in shown]
    text = own.decode(seen, skip_special_tokens=False)
    marked = MarkedText(marks, prompt, takes_calls=True, schemas={"look": LOOK})
    parts = ChatParts(marked, "{:024x}".format)
    return text, parts.feed(text, is_last=True)


def asked(**more):
    return ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS} | more
    )


def check(calls, most=99):
    assert 1 <= len(calls) <= most
    for call in calls:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        jsonschema.validate(arguments, SCHEMAS[function["name"]])


CASES = [(name, special) for name in CALL_FORMS for special in (False, True)]


@pytest.mark.smoke(16)
@pytest.mark.parametrize(("name", "are_special"), CASES)
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_call_that_has_to_be(name, are_special, choice):
    named = {"type": "function", "function": {"name": "look"}}
    request = asked(tool_choice=named if choice == "named" else choice)
    for seed in range(3):
        text, found = write(name, request, are_special=are_special, seed=seed)
        assert found.keys() == {"tool_calls"}, text
        check(found["tool_calls"], 1 if choice == "named" else 99)
        if choice == "named":
            assert found["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.smoke(3)
@pytest.mark.parametrize(("name", "are_special"), CASES)
def test_strict_tools_where_the_model_chooses(name, are_special):
    request = asked(tool_choice="auto", parallel_tool_calls=False)
    kinds = set()
    for seed in range(8):
        text, found = write(name, request, are_special=are_special, seed=seed)
        kinds |= found.keys()
        if calls := found.get("tool_calls"):
            assert len(calls) == 1, text
            if calls[0]["function"]["name"] == "look":
                check(calls)
    assert kinds


@pytest.mark.parametrize("name", ["hermes", "deepseek_v31"])
def test_reasoning_comes_first(name):
    think = THOUGHT_FORMS["think"]
    for prompt, may_skip in (("<think>\n", False), ("", True), ("<think></think>", True)):
        text, found = write(
            name,
            asked(tool_choice="required"),
            are_special=False,
            seed=1,
            prompt=prompt,
            thoughts=think,
        )
        check(found["tool_calls"])
        assert may_skip or think.end in text


@pytest.mark.full
def test_an_answer_is_json_or_a_call():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOK}}
    kinds = set()
    for seed in range(12):
        text, found = write("hermes", asked(response_format=form), are_special=False, seed=seed)
        kinds |= found.keys()
        if "content" in found:
            jsonschema.validate(json.loads(text), LOOK)
    assert kinds == {"content", "tool_calls"}
    compact = {"structured_outputs": {"disable_any_whitespace": True}, "response_format": form}
    for seed in range(12):
        text, found = write("hermes", asked(**compact), are_special=False, seed=seed)
        if "content" in found:
            assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    # Where it has to be a call, a format of the text says nothing: instructor sends both.
    request = asked(tool_choice="required", response_format=form)
    _, found = write("hermes", request, are_special=False, seed=0)
    assert found.keys() == {"tool_calls"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"regex": "a"}, "regex"),
        ({"regex": "a", "tool_choice": "required"}, "regex"),
    ],
)
def test_what_does_not_go_together(more, param):
    marks = Marks(None, CALL_FORMS["hermes"])
    with pytest.raises(ApiError) as refused:
        structured_chat(asked(**more), marks, "", tokenizer("hermes", False))
    assert refused.value.param == param


def test_limits_of_texts_between_marks():
    """What cannot be promised is refused; without strict, the text is free."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^b$"}}}
    for strict in (True, False):
        function = {"name": "f", "parameters": schema, "strict": strict}
        tools = [{"type": "function", "function": function}]
        given = asked(tools=tools, tool_choice="required"), Marks(None, CALL_FORMS["glm45"]), ""
        if strict:
            with pytest.raises(ApiError, match=telling("f strict a pattern")):
                structured_chat(*given, tokenizer("glm45", False))
        else:
            assert structured_chat(*given, tokenizer("glm45", False))[1] == "tools"


def test_without_a_reason_there_is_no_grammar():
    request = asked(tools=[TOOLS[1]])
    marks = Marks(None, CALL_FORMS["hermes"])
    assert structured_chat(request, marks, "", tokenizer("hermes", False)) == (None, "")
