"""Every quantity that a client controls has a bound, which docs/security.md lists."""

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import tells
from engine.ranks.processes import wait_until
from expertlane.server import answers, bodies, fields, live, requests, service
from expertlane.server import run as server_run
from expertlane.server.answers import as_json, json_parts
from expertlane.server.app import make_app
from expertlane.server.bodies import JsonCounts
from expertlane.server.journal import keeper
from expertlane.server.journal.file import JournalFile
from expertlane.server.setup import ServerOptions
from expertlane.spec import sampling
from server.hostile import CHATS, COMPLETIONS, TOO_MUCH
from server.running import LONG, is_idle

ROOT = Path(__file__).parents[2]


def test_every_field_of_a_request_has_a_bound(stub_server):
    server = stub_server()
    described = make_app(server.service, server.live, is_local=True).openapi()
    parts = described["components"]["schemas"]
    bodies_of = [
        body["requestBody"]["content"]["application/json"]["schema"]
        for routes in described["paths"].values()
        for body in routes.values()
        if "requestBody" in body
    ]
    assert len(bodies_of) == 5
    seen = set()
    unbounded = {place for body in bodies_of for place in unbounded_in(body, "", parts, seen)}
    assert unbounded == set()
    assert {"Message", "ToolCall", "Tool", "ResponseFormat"} <= seen


def unbounded_in(schema, place, parts, seen) -> Iterator[str]:
    """Places whose length, count or size nothing bounds; free JSON has the body's own bounds."""
    if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in seen:
        seen.add(name)
        yield from unbounded_in(parts[name], name, parts, seen)
    for inner in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from unbounded_in(inner, place, parts, seen)
    bound_of = {
        "string": {"maxLength"},
        "array": {"maxItems"},
        "integer": {"maximum", "exclusiveMaximum"},
        "number": {"maximum", "exclusiveMaximum"},
        "object": {"maxProperties", "properties"},
    }
    bounds = bound_of.get(schema.get("type"))
    if bounds is not None and not ({"enum", "const"} | bounds) & schema.keys():
        yield f"{place}: {schema}"
    for field, inner in schema.get("properties", {}).items():
        yield from unbounded_in(inner, f"{place}.{field}", parts, seen)
    for word in ("items", "additionalProperties", "propertyNames"):
        if isinstance(inner := schema.get(word), dict):
            yield from unbounded_in(inner, f"{place}[]", parts, seen)


BOUNDS = {
    "connections": server_run.MOST_CONNECTIONS,
    "log-probabilities that a request may give": service.MOST_LOGPROBS,
    "bytes of a body": bodies.MOST_BODY_BYTES,
    "values in a body": bodies.MOST_VALUES,
    "keys in a body": bodies.MOST_KEYS,
    "bytes of all bodies under way": bodies.MOST_BYTES_AT_ONCE,
    "bytes of headers": server_run.MOST_HEAD_BYTES,
    "bytes of trailers and chunk extensions": server_run.MOST_HEAD_BYTES,
    "seconds for headers": server_run.HEAD_S,
    "seconds for a body, and bytes per second after that": bodies.LEAST_BYTES_PER_S,
    "fields of an object whose fields are known": fields._MOST_FIELDS,
    "keys at the top of arbitrary JSON": fields._MOST_OF_OBJECT,
    "characters of an id or a name": fields._MOST_NAME,
    "messages, parts of a message": fields.MOST_PARTS,
    "calls in a message": fields.MOST_CALLS,
    "tools": requests.MOST_TOOLS,
    "pairs of metadata": fields._MOST_METADATA,
    "characters of metadata": fields._MOST_METADATA_CHARACTERS,
    "variables of a template": fields._MOST_VARIABLES,
    "prompts × choices": fields.MOST_PROMPTS,
    "choices per prompt": requests.MOST_CHOICES,
    "stop strings, stop tokens": fields.MOST_STOPS,
    "characters of a stop string": fields.MOST_STOP_CHARACTERS,
    "tokens with a bias": fields._MOST_BIASES,
    "characters of a JSON schema": sampling.MOST_SCHEMA_CHARACTERS,
    "properties of a JSON schema": sampling.MOST_PROPERTIES,
    "characters of one text in a JSON schema": sampling.MOST_LITERAL_CHARACTERS,
    "depth of a JSON schema": sampling.MOST_DEPTH,
    "characters of a regex": sampling.MOST_REGEX_CHARACTERS,
    "characters of a grammar": sampling.MOST_GRAMMAR_CHARACTERS,
    "choices of an output": sampling.MOST_CHOICE_TEXTS,
    "characters of these choices": sampling.MOST_CHOICE_CHARACTERS,
    "bytes of a journal's requests in memory, without their outputs": keeper._MOST_BYTES,
    "bytes of a journal's finished answers": keeper._MOST_FINISHED_BYTES,
    "events of a journal's finished answers": keeper._MOST_FINISHED_CHUNKS,
    "viewers of the live page": live.MOST_VIEWERS,
}


def test_the_table_of_bounds_is_true():
    page = (ROOT / "docs/security.md").read_text()
    _, _, table = page.partition("## Bounds of what clients send")
    said = dict(re.findall(r"^- (.+): (.+)$", table, re.MULTILINE))
    assert BOUNDS.keys() <= said.keys()
    for name, number in BOUNDS.items():
        assert f"{number:,.0f}" in said[name].split(), name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('a,:[{"\\}]é\n')),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.sampled_from('b,:"\\{')), inner, max_size=4)
    ),
    max_leaves=20,
)


def count(value):
    """(values, keys) of it."""
    if isinstance(value, list | dict):
        inner = [count(each) for each in (value.values() if isinstance(value, dict) else value)]
        num_keys = len(value) if isinstance(value, dict) else 0
        return 1 + sum(v for v, _ in inner), num_keys + sum(k for _, k in inner)
    return 1, 0


@given(value=json_values, cuts=st.lists(st.integers(0, 400), max_size=5))
def test_values_and_keys_are_counted_in_any_pieces(value, cuts):
    data = json.dumps(value, ensure_ascii=False).encode()
    counts, places = JsonCounts(), sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(places):
        counts.feed(data[begin:end])
    num_values, num_keys = count(value)
    assert counts.num_keys == num_keys
    assert num_values <= counts.num_values <= 2 * num_values


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused(stub_server, name):
    server = stub_server(max_model_len=4096, num_blocks=2**12)
    path, make, status = TOO_MUCH[name]
    answer = server.post(make(), path)
    assert answer.status_code == status, answer.text
    assert len(answer.text) < 2000
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert server.post(LONG).status_code == 200
    assert wait_until(lambda: is_idle(server))


@pytest.mark.parametrize(
    "body",
    [
        LONG | {"stop": ["a" * fields.MOST_STOP_CHARACTERS] * fields.MOST_STOPS},
        LONG | {"metadata": {f"{n}": "b" * 900 for n in range(16)}},
        LONG | {"prompt": [[1]] * 100, "max_tokens": 1},
        LONG | {"user": ",:[{" * 128},
        LONG | {"prompt": list(range(3, 25)) * 180, "max_tokens": 1},  # made in another thread
        LONG | {"prompt": "a" * 3000, "max_tokens": 1, "metadata": {"a": "b" * 16_000}},
    ],
)
def test_as_much_as_is_taken(stub_server, body):
    server = stub_server(max_model_len=4096, num_blocks=2**12)
    answer = server.post(body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("size", [10, 100_000, 2_000_000])  # of which each is parsed in its own way
@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ('{"prompt": [1,2', "invalid_json", "not valid JSON"),
        ('{"prompt": "\xff"}', "invalid_json", "JSON"),
        ("[]", "invalid_json", "object"),
        ('{"prompt": 5}', "invalid_value", "prompt"),
        ('{"prompt": "\\ud800"}', "invalid_json", "surrogate"),
        ('{"prompt": [1], "metadata": {"a": ["\\ud83d\\ude00 \\uDE00"]}}', "invalid_json", ""),
        ('{"prompt": [1], "\\udfff": 1}', "invalid_json", "surrogate"),
        ('{"prompt": [1], "x": 1}', "unknown_parameter", "unknown field x"),
        ('{"prompt": [1], "temperature": NaN}', None, None),
    ],
)
def test_bodies_of_all_sizes_are_refused_alike(stub_server, size, text, code, word):
    server = stub_server()
    answer = server.post((text + " " * size).encode("latin-1"))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert code is None or (error["code"] == code and tells(error["message"], word))


@pytest.mark.parametrize("size", [10, 100_000, 2_000_000])
def test_bodies_of_all_sizes_are_taken_alike(stub_server, size):
    server = stub_server()
    text = '{"prompt": [1], "max_tokens": 1, "user": "\\ud83d\\ude00 \\\\ud800 \\u00e9 \xe9"}'
    assert server.post((text + " " * size).encode()).status_code == 200


def test_a_journal_keeps_no_more_than_its_bounds(stub_server, monkeypatch, tmp_path):
    file = JournalFile(tmp_path / "journal")
    file.identify({})
    server = stub_server(ServerOptions(journal=file), max_model_len=2**12, num_blocks=2**12)
    kept = server.service.journal.requests

    def ask(number):
        body = LONG | {"user": "u" * 400, "max_tokens": 1}
        return server.post(body, **{"X-Request-Id": f"{number}"})

    monkeypatch.setattr(keeper, "_MOST_FINISHED_BYTES", 3000)
    for number in range(1, 10):
        assert ask(number).status_code == 200
    assert 1 <= len(kept) <= 4
    assert {name for _, name in kept} == {f"{9 - place}" for place in range(len(kept))}
    server.gate.clear()
    monkeypatch.setattr(keeper, "_MOST_BYTES", 2000)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(10, 18)]
        assert wait_until(lambda: sum(each.done() for each in asked) >= 4)
        server.gate.set()
        statuses = Counter(each.result().status_code for each in asked)
    assert statuses.keys() == {200, 429}
    assert statuses[429] >= 4


def test_connections_are_bounded(stub_server, monkeypatch):
    monkeypatch.setattr(server_run, "MOST_CONNECTIONS", 3)
    server = stub_server()
    address = "127.0.0.1", server.port
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        assert connections[-1].recv(4096).startswith(b"HTTP/1.1 503 ")
        connections[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connections[0].recv(4096).startswith(b"HTTP/1.1 200 ")
    assert wait_until(lambda: not server.running.server.server_state.connections)
    assert server.post(LONG).status_code == 200


def test_log_probabilities_of_a_request(stub_server, monkeypatch):
    server = stub_server()
    body = LONG | {"prompt": [[1, 2, 3]] * 2, "n": 2, "max_tokens": 5, "logprobs": 3}
    body |= {"prompt_logprobs": 1}
    num_asked = 2 * 2 * (5 * (3 + 1) + 3 * (1 + 1))
    for most, status in ((num_asked, 200), (num_asked - 1, 400)):
        monkeypatch.setattr(service, "MOST_LOGPROBS", most)
        assert server.post(body).status_code == status


def test_bodies_of_all_requests_together(stub_server, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_BYTES_AT_ONCE", 1000)
    server = stub_server()
    server.gate.clear()
    body = LONG | {"user": "a" * 500}
    first = threading.Thread(target=server.post, args=(body,))
    first.start()
    assert wait_until(lambda: server.service.num_open == 1)
    refused = server.post(body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
    assert refused.headers["Retry-After"] == "1"
    server.gate.set()
    first.join()
    assert server.post(body).status_code == 200


def test_parts_of_an_answer_are_made_as_they_are_needed():
    num_made = 0

    def entries():
        nonlocal num_made
        for num_made in range(1, 100_001):
            yield {"number": num_made, "text": "a" * 50}

    def body(entries):
        return {"id": 'a"', "none": {}, "choices": [1, {}], "inner": {"all": entries, "b": None}}

    parts = json_parts(body(entries()))
    first = next(parts)
    assert 0 < num_made < 2000
    whole = b"".join([first, *parts])
    assert num_made == 100_000
    assert whole == json.dumps(body(list(entries())), separators=(",", ":")).encode()
    assert whole == as_json(body(entries()))


@pytest.mark.parametrize("values", [[], [1], [None, {"a": 1}], [{"a": iter("bc")}] * 1, ["é"] * 99])
def test_iterators_become_lists(values):
    parts = list(json_parts(iter(values)))
    assert all(parts)
    expected = [{"a": ["b", "c"]}] if values and isinstance(values[0], dict) else values
    assert json.loads(b"".join(parts)) == expected


ASKED = LONG | {"prompt": [[1, 2, 3], [4, 5, 6, 7]], "max_tokens": 5, "seed": 3, "temperature": 1.0}
CHAT = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 5, "seed": 3}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, ASKED | {"n": 2, "logprobs": 3}),
        (COMPLETIONS, ASKED | {"logprobs": 2, "echo": True, "return_token_ids": True}),
        (COMPLETIONS, ASKED | {"prompt_logprobs": 2, "max_tokens": 0}),
        (CHATS, CHAT | {"n": 3, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}),
    ],
)
def test_large_answers_are_as_small_ones(served, monkeypatch, path, body):
    server, found = served.server, []
    for most in (answers._MOST_AT_ONCE, 0):
        monkeypatch.setattr(answers, "_MOST_AT_ONCE", most)
        answer = server.post(body, path)
        assert answer.status_code == 200, answer.text
        assert ("content-length" in answer.headers) == (most > 0)
        found.append(answer.json() | {"id": "", "created": 0})
    assert found[0] == found[1]


def test_a_request_of_many_choices_is_written_once(stub_server, tmp_path):
    file = JournalFile(tmp_path / "journal")
    file.identify({})
    server = stub_server(ServerOptions(journal=file), num_blocks=2**12)
    most = fields.MOST_PROMPTS
    body = LONG | {"prompt": [[1, 2]] * (most // 2), "n": 2, "max_tokens": 1}
    body |= {"stop": ["a" * 4000] * 8, "logit_bias": {f"{n}": 1.0 for n in range(20)}}
    for more in ({}, {"seed": 2**63 - 1}):
        before = file.num_bytes
        answer = server.post(body | more, **{"X-Request-Id": f"many{len(more)}"})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == most
        assert file.num_bytes - before < 10**6
    kept = [each.prepared.params for each in server.service.journal.requests.values()]
    for params in kept:
        assert len(params) == most
        assert len({id(each.stop) for each in params}) == 1
        assert len({id(each.logit_bias) for each in params}) == 1
    drawn, given = kept
    assert len({each.seed for each in drawn}) == most
    assert [each.seed for each in given[:2]] == [2**63 - 1, 2**63]
    server.stop()
    found = JournalFile(tmp_path / "journal").found.values()
    assert [each.begun.params() for each in found] == kept
