"""A line a request, without what was asked or answered."""

import io
import json
import threading

import httpx
import pytest

from engine.ranks.processes import wait_until
from engine.stub_runner import letters, spell
from expertlane.server.logs import RequestLog
from expertlane.server.setup import ServerOptions
from server.running import PATIENCE_S, StubServer


class Logged:
    """A server that writes into memory."""

    def __init__(self, stub_server, form="json", *, decode=None, **engine):
        self.stream = io.StringIO()
        self.log = RequestLog(form, "stub", decode=decode, stream=self.stream)
        options = ServerOptions(observe=self.log, on_event=self.log.event)
        self.server: StubServer = stub_server(options, **engine)
        self.url = self.server.url

    def lines(self):
        """Those of all requests; a line follows its answer."""
        assert wait_until(lambda: not self.server.running.server.server_state.tasks)
        self.log.close()
        return self.stream.getvalue().splitlines()


def post(url, *, headers=None, **body):
    given = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0} | body
    return httpx.post(f"{url}/v1/completions", json=given, headers=headers, timeout=PATIENCE_S)


def test_a_line_of_json_a_request(stub_server):
    logged = Logged(stub_server)
    answer = post(logged.url, headers={"x-request-id": "mine"}).json()
    post(logged.url, n=2, stream=True)
    post(logged.url, max_tokens=0.5)
    httpx.get(f"{logged.url}/nowhere")
    httpx.get(f"{logged.url}/health")  # probes leave no line
    rows = list(map(json.loads, logged.lines()))
    assert [row["status"] for row in rows] == [200, 200, 400, 404]
    assert [row["path"] for row in rows] == [*["/v1/completions"] * 3, "none"]
    whole, streamed, refused, _ = rows
    assert whole["request_id"] == answer["id"]
    assert whole["client_request_id"] == "mine"
    usage = answer["usage"]
    assert whole["prompt_tokens"] == usage["prompt_tokens"] == 3
    assert whole["completion_tokens"] == usage["completion_tokens"] == 5
    assert whole["finish_reasons"] == ["length"]
    assert whole["tpot_s"] == pytest.approx(1.0)  # the stub's clock counts steps
    assert whole["stream"] is False
    assert streamed["stream"] is True
    assert streamed["completion_tokens"] == 10
    assert streamed["finish_reasons"] == ["length"] * 2
    assert "request_id" not in refused
    for row in rows:
        assert {"time", "level", "event", "duration_s", "client"} <= set(row)
        assert not {"prompts", "outputs", "headers"} & set(row)


def test_prompts_are_written_where_asked_for(stub_server):
    logged = Logged(stub_server, decode=letters().decode)
    answer = post(logged.url, prompt="abc").json()
    (row,) = map(json.loads, logged.lines())
    assert row["prompts"] == ["abc"] == [spell([0, 1, 2])]
    assert row["outputs"] == [answer["choices"][0]["text"]]


def test_text_stays_on_its_line(stub_server):
    logged = Logged(stub_server, "text", decode=lambda tokens: "a\nb\x1b[31m")
    post(logged.url)
    (line,) = logged.lines()
    assert "POST /v1/completions 200" in line
    assert "3 + 5 tokens" in line
    assert "\x1b" not in line


def test_a_client_that_went_is_an_abort(stub_server):
    logged = Logged(stub_server)
    logged.server.gate.clear()
    with (
        httpx.Client(base_url=logged.url) as client,
        client.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}),
    ):
        assert wait_until(lambda: logged.server.engine.scheduler.has_unfinished)
    logged.server.gate.set()
    assert wait_until(lambda: logged.server.engine.is_idle)
    assert wait_until(lambda: logged.stream.getvalue())
    (row,) = map(json.loads, logged.lines())
    assert row["finish_reasons"] == ["abort"]


def test_events_are_lines_too(stub_server):
    logged = Logged(stub_server)
    logged.server.stop()
    rows = list(map(json.loads, logged.lines()))
    assert [row["event"] for row in rows] == ["drain"]


def test_a_reader_that_stands_still_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("expertlane.server.logs._MOST_WAITING", 3)
    go_on, stream = threading.Event(), io.StringIO()

    class Stuck(io.StringIO):
        def write(self, text):
            assert go_on.wait(PATIENCE_S)
            return stream.write(text)

    log = RequestLog("json", "stub", stream=Stuck())
    for i in range(50):
        log.event("error", f"{i}")
    go_on.set()
    assert wait_until(lambda: stream.getvalue() and log._lines.empty())
    log.event("error", "last")
    log.close()
    rows = list(map(json.loads, stream.getvalue().splitlines()))
    assert len(rows) < 50
    assert rows[-1]["text"] == "last"
    assert len(rows) + sum(row.get("num_lines_lost", 0) for row in rows) == 51
