"""The layout of a server changes under its clients, by its API and by the command."""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cli.screen import tells
from engine.elastic.recovering import PARAMS, PROMPTS
from engine.ranks.processes import wait_until
from expertlane import LLM
from expertlane.cli.main import main
from expertlane.errors import CapacityError
from expertlane.server.setup import ServerOptions
from expertlane.spec.names import Stage
from server.running import PATIENCE_S, serving
from server.test_live import feed
from server.test_metrics import scrape
from server.test_recovery import complete

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def server():
    settings = {"dtype": "float32", "on_failure": "replace", "oversubscribe": True}
    with LLM("paper-tiny", layout="dp=2,ep=2", **settings) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        with serving(llm, watch=llm.watch(), scaling=llm.scaling) as server:
            server.expected = expected
            yield server


def scale(server, layout, **more):
    return server.post({"layout": layout} | more, "/scale")


def test_it_changes_under_clients(server):
    with feed(server) as frames, ThreadPoolExecutor(len(PROMPTS)) as clients:
        before = scrape(server)[0]
        found = [clients.submit(complete, server, number) for number in range(len(PROMPTS))]
        answer = scale(server, "dp=3,ep=3")
        assert answer.status_code == 200, answer.text
        assert answer.json()["num_ranks"] == 3
        assert [each.result() for each in found] == server.expected
        start = next(frame for frame in frames if frame.get("layout") == "dp=3,ep=3")
        assert len(start["ranks"]) == 3
        frame = next(frame for frame in frames if frame["kind"] == "frame")
        assert len(frame["now"]) == len(frame["dummy_steps"]) == 3
        frame = next(frame for frame in frames if frame.get("events"))
    facts = httpx.get(f"{server.url}/scale").json()
    assert (facts["layout"], facts["under_way"], facts["state"]) == ("dp=3,ep=3", None, "serving")
    (change,) = facts["changes"]
    assert (change["from"], change["to"], change["is_over"]) == ("dp=2,ep=2", "dp=3,ep=3", True)
    assert change["num_requests_computed_again"] == 0  # both ranks stay as they were
    weights = change["weight_bytes_from"]
    assert weights["kept"] > 0
    assert weights["ahead"] > 20 * weights["read"]
    assert len(change["ranks"]) == 3
    assert change["seconds_ahead"] > 0
    assert [each["kind"] for each in frame["events"]] == ["scaling"]
    values, _ = scrape(server)
    assert values["expertlane:layout_changes_total",] == 1
    assert values["expertlane:recoveries_total",] == 0
    fallen = [
        name
        for name, value in before.items()
        if name[0].endswith("_total") and name in values and values[name] < value
    ]
    assert not fallen


def test_one_at_a_time(server):
    held = []
    scaling = server.llm.scaling
    advance = scaling.advance

    def advance_and_ask():
        if not held:
            held.append(scale(server, "tp=1"))
            held.append(httpx.get(f"{server.url}/scale").json())
            held.append(list(server.live.state.alerts()))
        return advance()

    scaling.advance = advance_and_ask
    assert scale(server, "tp=2").status_code == 200
    refused, facts, alerts = held
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "scaling"
    assert (facts["under_way"], facts["state"], facts["layout"]) == (
        "tp=2",
        "preparing",
        "dp=2,ep=2",
    )
    none = {"share": 0, "weight_bytes": 0}
    ranks = {"0": none, "1": none}
    assert facts["preparing"] == {"layout": "tp=2", **none, "ranks": ranks}
    assert any("tp=2" in alert.text and "0%" in alert.text for alert in alerts)
    assert complete(server, 0) == server.expected[0]


def cancel(server):
    return httpx.delete(f"{server.url}/scale", timeout=PATIENCE_S)


def code_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def prepares_for_ever(server):
    """Ranks prepare, and are never ready; gives the states of ranks that pages then showed."""
    scaling, shown = server.llm.scaling, []
    advance = scaling.advance

    def advance_only():
        position = server.llm._pool.position(0)._replace(stage=Stage.SETUP)
        shown.append(server.live.state._stage(position))
        advance()
        return False

    scaling.advance = advance_only
    return shown


def test_a_change_is_cancelled(server, prepares_for_ever):
    pids = list(map(server.llm._pool.pid, range(2)))
    assert code_of(cancel(server)) == (409, "not_scaling")
    with ThreadPoolExecutor(3) as clients:
        changing = clients.submit(scale, server, "dp=3,ep=3")
        tokens = clients.submit(complete, server, 0)
        assert wait_until(lambda: 2 in server.llm._pool.ahead, seconds=PATIENCE_S)
        cancelled = clients.submit(cancel, server).result()
        assert code_of(changing.result()) == (409, "cancelled")
        assert tokens.result() == server.expected[0]
    assert cancelled.status_code == 200
    event = server.live.state.events[-1]
    assert event.kind == "scaling"
    assert re.search(r"dp=3,ep=3 cancelled .*\d\.\d s", event.text)
    facts = cancelled.json()
    assert (facts["layout"], facts["under_way"], facts["preparing"]) == ("dp=2,ep=2", None, None)
    assert not server.llm._pool.ahead | server.llm._pool.starting
    assert list(map(server.llm._pool.pid, range(2))) == pids
    assert {*prepares_for_ever} == {"preparing"}
    del server.llm.scaling.advance
    assert scale(server, "dp=3,ep=3").status_code == 200
    assert complete(server, 0) == server.expected[0]


def test_it_is_too_late_to_cancel(server):
    scaling, answers = server.llm.scaling, []
    switch = scaling.scale

    def scale_and_cancel(layout):
        answers.append(cancel(server))
        switch(layout)

    scaling.scale = scale_and_cancel
    assert scale(server, "tp=2").json()["layout"] == "tp=2"
    assert code_of(answers[0]) == (409, "too_late")
    assert code_of(cancel(server)) == (409, "not_scaling")


def test_a_dry_run_changes_nothing(server):
    answer = scale(server, "tp=2", dry_run=True)
    assert (answer.status_code, answer.json()["layout"]) == (200, "dp=2,ep=2")
    assert code_of(scale(server, "pp=100", dry_run=True))[0] == 400
    assert answer.json()["changes"] == []
    assert server.llm.scaling.ahead is None


def test_ranks_that_cannot_be_prepared(server):
    scaling = server.llm.scaling

    def fail():
        scaling.give_up()
        raise CapacityError("new ranks ended 3 times")

    scaling.advance = fail
    answer = scale(server, "dp=3,ep=3")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_prepared")
    del scaling.advance
    facts = httpx.get(f"{server.url}/scale").json()
    assert (facts["layout"], facts["under_way"], facts["state"]) == ("dp=2,ep=2", None, "serving")
    assert facts["preparing"] is None
    assert complete(server, 0) == server.expected[0]


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"layout": "dp=2,ep=3"}, "ep=3 divide"),
        ({"layout": "pp=100"}, "pp=100 stages"),
        ({"layout": 3}, "layout"),
        ({}, "layout"),
        ({"layout": "tp=1", "now": True}, "now"),
    ],
)
def test_what_is_refused(server, body, message):
    answer = server.post(body, "/scale")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert tells(error["message"], message)
    assert error["param"] in ("layout", "now")
    assert str(server.llm.layout) == "dp=2,ep=2"


def test_without_ranks_it_cannot(stub_server):
    server = stub_server(options=ServerOptions(api_keys=("secret",)))
    assert scale(server, "tp=1").status_code == 401
    assert httpx.get(f"{server.url}/scale").status_code == 401
    answer = server.post({"layout": "tp=1"}, "/scale", **KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_scalable")
    assert not httpx.get(f"{server.url}/scale", headers=KEY).json()["can_scale"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["expertlane", "scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_by_the_command(server, monkeypatch, capsys):
    with ThreadPoolExecutor(1) as clients:
        found = clients.submit(complete, server, 0)
        assert run(monkeypatch, server.url, "--layout", "dp=1", "--watch-s", "0.2") == 0
        assert found.result() == server.expected[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tp=1 on 1 rank, after ")
    assert lines[1].split() == ["from", "dp=2,ep=2"]
    rate = r"(none|\S+ \(\S+ to \S+\))"
    assert re.fullmatch(rf"tokens/s +{rate} before, {rate} after", lines[-1])
    assert lines[2].split()[:2] == ["time", "preparing"]
    assert all(f"MB {origin}" in lines[3] for origin in ("kept", "ahead", "copied", "read"))
    assert max(map(len, lines)) <= 80
    assert run(monkeypatch, server.url, "--layout", "dp=1", "--watch-s", "0.1") == 0
    captured = capsys.readouterr()
    same, rates = captured.out.splitlines()
    assert tells(same, "tp=1 1 rank nothing")
    assert rates.split() == ["tokens/s", "none", "before,", "none", "after"]
    assert captured.err == ""
    assert run(monkeypatch, server.url, "--layout", "dp=2", "--watch-s", "0", "--full") == 0
    *_, heading, first, second, note = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["rank", "kept", "ahead"]
    assert [each.split()[0] for each in (first, second)] == ["0", "1"]
    assert "seconds" in note
    assert run(monkeypatch, server.url, "--layout", "tp=1", "--watch-s", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["tokens_per_s_after"]) == ("tp=1", None)
    for layout, message in (("tp=3", "tp=3 divide"), ("x=2", "unknown x")):
        began_s = time.monotonic()
        assert run(monkeypatch, server.url, "--layout", layout, "--watch-s", "200") == 2
        assert time.monotonic() - began_s < PATIENCE_S  # before it measures
        error = capsys.readouterr().err
        assert tells(error, message)
        assert len(error.splitlines()) == 1
    assert run(monkeypatch, "http://127.0.0.1:9", "--layout", "tp=1") == 2
    assert "connection refused" in capsys.readouterr().err
    for wrong in ([], ["--layout", "tp=1", "--cancel"]):
        assert run(monkeypatch, server.url, *wrong) == 2
        assert tells(capsys.readouterr().err, "--layout --cancel")


def test_the_command_cancels(server, prepares_for_ever, monkeypatch, capsys):
    assert run(monkeypatch, server.url, "--cancel") == 1
    assert tells(capsys.readouterr().err, "no change layout")
    with ThreadPoolExecutor(1) as clients:
        changing = clients.submit(scale, server, "tp=2")
        assert wait_until(lambda: prepares_for_ever, seconds=PATIENCE_S)
        assert run(monkeypatch, server.url, "--cancel") == 0
        assert code_of(changing.result()) == (409, "cancelled")
    assert tells(capsys.readouterr().out, "cancelled layout dp=2,ep=2")
