"""Outputs that must be something, by a server on real ranks: every one is."""

import asyncio
import json
import re

import httpx
import jsonschema
import pytest

from engine.model.chat_checkpoint import save_chat_checkpoint
from expertlane.engine.llm import LLM
from expertlane.server.setup import ServerOptions
from expertlane.text.chat_template import ChatTemplate
from server.drawn_schemas import drawn_schema
from server.running import PATIENCE_S, serving
from server.test_tools import TOOLS, check

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER  # times by rfc3339-validator


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    """A server whose requests may be long: random weights write much white space."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    folder = save_chat_checkpoint(tmp_path_factory.mktemp("structured"), template)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    with LLM(folder, layout="dp=2,ep=2", dtype="float32", num_blocks=2048) as llm:
        template = ChatTemplate.from_folder(folder)
        options = ServerOptions(tool_call_parser="hermes")
        with serving(llm, llm.tokenizer, template, options=options) as server:
            yield server


def texts_of(server, bodies):
    """Of many requests together: the texts of their choices."""

    async def all_of_them():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=20 * PATIENCE_S, limits=limits
        ) as client:
            posts = [client.post(path, json=body) for path, body in bodies]
            return await asyncio.gather(*posts)

    answers = []
    for answer in asyncio.run(all_of_them()):
        assert answer.status_code == 200, answer.text
        for choice in answer.json()["choices"]:
            assert choice["finish_reason"] == "stop", choice
            answers.append(choice["text"] if "text" in choice else choice["message"]["content"])
    return answers


def check_schemas(server, seeds):
    """Every answer parses and validates, with any sampling."""
    schemas = [drawn_schema(seed) for seed in seeds]
    endless = {"prompt": " \n\t0123456789"}
    tokens = httpx.post(f"{server.url}/tokenize", json=endless).json()["tokens"]
    brief = {str(token): -4 for token in tokens}  # else random weights write endless fractions
    bodies = []
    for seed, schema in zip(seeds, schemas, strict=True):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {
            "max_tokens": 4000,
            "seed": seed,
            "temperature": (1.0, 0.7, 2.0, 0.0)[seed % 4],
            "top_p": (1.0, 0.9)[seed % 2],
            "frequency_penalty": 0.5,  # a greedy model would never leave a number or a text
            "logit_bias": brief,
            "min_tokens": seed % 3,
            "ignore_eos": seed % 5 == 0,
        }
        if seed % 2:
            bodies.append((CHAT, body | {"messages": MESSAGES, "response_format": form}))
        else:
            bodies.append((COMPLETIONS, body | {"prompt": "a", "guided_json": schema}))
    texts = texts_of(server, bodies)
    for schema, text in zip(schemas, texts, strict=True):
        jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_five_hundred_drawn_schemas(structured):
    for start in range(0, 500, 50):
        check_schemas(structured, range(start, start + 50))


FORMS = [
    ({"guided_regex": "ab+c{3}"}, "ab+c{3}"),
    ({"regex": r"\d{2}:\d{2}"}, r"\d{2}:\d{2}"),
    ({"guided_choice": ["ja", "nein, ü"]}, "ja|nein, ü"),
    ({"guided_grammar": 'start: "x" | "y" start'}, "y*x"),
    ({"grammar": 'root ::= "a" | "b" root'}, "b*a"),
    ({"structured_outputs": {"regex": "[ab]{5}"}}, "[ab]{5}"),
    ({"structured_outputs": {"choice": ["one"]}}, "one"),
    ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
    ({"guided_json": '{"enum": [5]}'}, "5"),
]


@pytest.mark.parametrize(("field", "pattern"), FORMS)
def test_all_forms_with_all_that_may_be_beside_them(structured, field, pattern):
    body = field | {"max_tokens": 200, "n": 2, "seed": 1, "logprobs": 1, "min_tokens": 2}
    chat = body | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    for text in texts_of(structured, [(COMPLETIONS, body | {"prompt": "a"}), (CHAT, chat)]):
        assert re.fullmatch(pattern, text)


@pytest.mark.full
def test_compact_json(structured):
    """vLLM's field, with the schema in it or in another one."""
    person = {"type": "object", "properties": {"a b": {"type": "array", "items": {"type": "null"}}}}
    person |= {"required": ["a b"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": person}}
    compact = {"disable_any_whitespace": True}
    bodies = [
        {"structured_outputs": compact | {"json": person}},
        {"structured_outputs": compact, "guided_json": person},
        {"structured_outputs": compact, "response_format": form},
    ]
    bodies = [body | {"prompt": "a", "max_tokens": 4000, "n": 4, "seed": 1} for body in bodies]
    texts = texts_of(structured, [(COMPLETIONS, body) for body in bodies])
    assert len(texts) == 12
    for text in texts:
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
    free = {"guided_json": person, "prompt": "a", "max_tokens": 4000, "n": 4, "seed": 1}
    assert any(
        "\n" in text or '": ' in text for text in texts_of(structured, [(COMPLETIONS, free)])
    )


def test_a_stream_and_a_stop_string(structured):
    with structured.openai() as client:
        chunks = client.completions.create(
            model="tiny", prompt="a", stream=True, extra_body={"regex": "a{3}b{3}c{3}"}
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == "aaabbbccc"
        more = {"regex": "a{3}b{3}c{3}", "include_stop_str_in_output": True}
        answer = client.completions.create(model="tiny", prompt="a", stop="bb", extra_body=more)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("aaabb", "stop")
        answer = client.completions.create(
            model="tiny", prompt="a", max_tokens=4, extra_body={"regex": "a{3}b{3}c{3}"}
        )
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("aaab", "length")


def test_a_model_that_the_client_parses(structured):
    """The `openai` package's own way to structured outputs: a pydantic model."""
    from pydantic import BaseModel

    class Person(BaseModel):
        is_tall: bool
        kind: int | None

    with structured.openai() as client:
        answer = client.beta.chat.completions.parse(
            model="tiny",
            messages=MESSAGES,
            response_format=Person,
            max_tokens=2000,
            temperature=1.2,
            seed=5,
        )
        assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("choice", ["required", "look"])
def test_calls_of_tools_in_deltas(structured, choice):
    if choice != "required":
        choice = {"type": "function", "function": {"name": choice}}
    with structured.openai() as client:
        asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
        asked |= {"seed": 3, "max_tokens": 4000, "parallel_tool_calls": False}
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        check([call.model_dump() for call in whole.message.tool_calls])
        deltas = list(client.chat.completions.create(**asked, stream=True))
        calls = [call for each in deltas for call in each.choices[0].delta.tool_calls or ()]
        pieces = [call.function.arguments or "" for call in calls]
        assert "".join(pieces) == whole.message.tool_calls[0].function.arguments
        assert calls[0].function.name == whole.message.tool_calls[0].function.name
        assert choice == "required" or len(pieces) > 3  # as they come
        assert not any(each.choices[0].delta.content for each in deltas)


@pytest.mark.full
def test_constrained_requests_leave_others_as_they_are(structured):
    """Their tokens are those that they get alone, and constrained ones get the same ones too."""
    free = {"prompt": "the thing", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    held = free | {"regex": "[a-z]{30}", "ignore_eos": False, "max_tokens": 40}

    def ids(bodies):
        async def run():
            async with httpx.AsyncClient(base_url=structured.url, timeout=PATIENCE_S) as client:
                posts = [client.post(COMPLETIONS, json=each) for each in bodies]
                return [each.json()["choices"][0]["text"] for each in await asyncio.gather(*posts)]

        return asyncio.run(run())

    (alone,), (held_alone,) = ids([free]), ids([held])
    assert re.fullmatch("[a-z]{30}", held_alone)
    assert ids([free, held] * 4) == [alone, held_alone] * 4
