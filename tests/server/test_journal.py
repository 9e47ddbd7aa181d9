"""A journal: what a killed server leaves, and that clients get the rest, nothing twice."""

import json
import shutil

import httpx
import pytest

from engine.processes import wait_until
from engine.stub_runner import expected
from expertlane.server.journal.file import JournalFile
from expertlane.server.service import ServerOptions
from server.running import LONG, PATIENCE_S, is_idle

STREAM = LONG | {"stream": True, "return_token_ids": True}
NAMED = {"X-Request-Id": "mine"}


@pytest.fixture
def journaled(stub_server, tmp_path):
    """Makes a server with a journal; `after` is a folder that a killed one has left."""
    numbers = iter(range(100))

    def make(after=None, reconnect_s=60.0, **options):
        folder = tmp_path / f"journal {next(numbers)}"
        if after is not None:
            shutil.copytree(after, folder)
        file = JournalFile(folder)
        file.identify({"model": "stub"})
        server = stub_server(ServerOptions(journal=file, reconnect_s=reconnect_s, **options))
        server.folder = folder
        return server

    return make


def events_of(text):
    """(id, data) of a stream."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line)
        if "data" in fields:
            found.append((fields.get("id"), fields["data"]))
    return found


def post(server, body, path="/v1/completions", **headers):
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=PATIENCE_S)


def rest(server, request_id, after=None):
    headers = {} if after is None else {"Last-Event-ID": f"{request_id}:{after}"}
    url = f"{server.url}/v1/requests/{request_id}/events"
    return httpx.get(url, headers=headers, timeout=PATIENCE_S)


def cut(server, body, num_events, path="/v1/completions", headers=NAMED):
    """What a client has that leaves after so many events."""
    with httpx.stream(
        "POST", f"{server.url}{path}", json=body, headers=headers, timeout=PATIENCE_S
    ) as answer:
        text = ""
        for part in answer.iter_text():
            text += part
            if text.count("\n\n") >= num_events:
                break
    return "".join(f"{block}\n\n" for block in text.split("\n\n")[:num_events])


def test_a_stream_goes_on_after_the_server_is_killed(journaled):
    before = journaled()
    whole = post(before, STREAM, **NAMED).text
    server = journaled()
    server.step_s = 0.005
    begun = cut(server, STREAM, 7)
    assert wait_until(lambda: len(server.service.journal.requests) == 1)
    server.gate.clear()
    after = journaled(after=server.folder)
    assert wait_until(lambda: is_idle(after))  # it needs no client
    answer = post(after, STREAM, **NAMED, **{"Last-Event-ID": "mine:7"})
    tokens = [
        token
        for _, data in events_of(begun + answer.text)[:-1]
        for token in json.loads(data)["choices"][0]["token_ids"]
    ]
    assert tokens == expected([1, 2, 3], 50)
    assert answer.headers["X-Request-Id"] == "mine"
    assert [each for each, _ in events_of(begun + answer.text)] == [
        f"mine:{number}" for number in range(1, 52)
    ]
    assert rest(after, "mine").text == begun + answer.text
    assert len(whole) == len(begun + answer.text)
    assert rest(after, "mine", 51).status_code == 204
    assert after.service.journal.num_resumed == 1
