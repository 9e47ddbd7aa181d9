"""A rank is killed under a server: clients see a pause, operators what happened."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cli.screen import tells
from engine.elastic.recovering import PARAMS, PROMPTS, harmed, pids
from engine.ranks.processes import wait_until
from expertlane import LLM
from expertlane.engine.elastic.recovery_record import State
from expertlane.engine.ranks.commands import RunStep
from expertlane.server.setup import ServerOptions
from server.running import serving
from server.test_live import feed
from server.test_metrics import scrape


@pytest.fixture
def events():
    return []


@pytest.fixture
def on_failure():
    return "replace"


@pytest.fixture
def server(events, on_failure):
    """On two data-parallel ranks, with the tokens that its LLM gave before as `expected`."""
    settings = {"dtype": "float32", "num_blocks": 64, "on_failure": on_failure}
    with LLM("paper-tiny", layout="dp=2,ep=2", **settings) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        options = ServerOptions(on_event=lambda *event: events.append(event))
        more = {"watch": llm.watch(), "scaling": llm.scaling}
        with serving(llm, options=options, **more) as server:
            server.expected = expected
            yield server


def complete(server, number):
    """The tokens of one of `PROMPTS`, as a client gets them."""
    params = PARAMS[number]
    body = {
        "prompt": PROMPTS[number],
        "return_token_ids": True,
        **{
            name: getattr(params, name)
            for name in ("temperature", "seed", "max_tokens", "repetition_penalty")
        },
        "presence_penalty": params.presence_penalty,
    }
    answer = server.post(body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


_STEPS_LEFT = 5


def busy_rank(server):
    """A rank with a request that goes on for some steps, however slow clients are; None without."""
    for rank, table in enumerate(server.llm.engine.scheduler.tables[0]):
        running = [request for request in table.requests if request is not None]
        if any(len(each.output_token_ids) + _STEPS_LEFT < each.max_tokens for each in running):
            return rank
    return None


def test_clients_see_no_more_than_a_pause(server, events):
    before = pids(server.llm)
    with (
        feed(server) as frames,
        harmed(lambda: busy_rank(server), RunStep, 6) as killed,
        ThreadPoolExecutor(len(PROMPTS)) as clients,
    ):
        found = list(clients.map(lambda number: complete(server, number), range(len(PROMPTS))))
        assert found == server.expected
        assert len(killed) == 1
        frame = next(frame for frame in frames if frame.get("num_recoveries"))
    assert frame["state"] == "running"
    assert frame["num_recovered"] > 0
    (change,), rank = frame["changes"], before.index(killed[0])
    record = server.llm.engine.recovery.records[0]
    assert frame["num_recovered"] == record.num_requests
    assert change == {
        "kind": "recovery",
        "began": record.at,
        "seconds": round(record.total_s, 3),
        "ranks": [rank],
    }
    (event,) = [each["text"] for each in frame["events"] if each["kind"] == "recovery"]
    assert tells(event, f"rank {rank} killed SIGKILL")
    assert [text for kind, text in events if kind == "recovery"] == [event]
    assert not [text for kind, text in events if kind in ("error", "end")]
    values, _ = scrape(server)
    assert values["expertlane:recoveries_total",] == 1
    assert values["expertlane:recovered_requests_total",] == frame["num_recovered"]
    # Nobody asks for anything.
    pid = pids(server.llm)[0]
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: server.llm.engine.recovery.num_recoveries == 2)
    assert server.llm.engine.recovery.state is State.SERVING
    assert complete(server, 0) == server.expected[0]
    # Told to end, as by systemd, which tells all: that is the launcher's matter.
    for pid in pids(server.llm):
        os.kill(pid, signal.SIGTERM)
    assert complete(server, 1) == server.expected[1]
    assert server.llm.engine.recovery.num_recoveries == 2


@pytest.mark.parametrize("on_failure", ["shrink"])
def test_the_others_serve_while_a_rank_is_replaced(server, events):
    pool = server.llm._pool
    start, pool.start = pool.start, lambda ranks: None  # not yet
    with (
        feed(server) as frames,
        harmed(0, RunStep, 6),
        ThreadPoolExecutor(len(PROMPTS)) as clients,
    ):
        found = list(clients.map(lambda number: complete(server, number), range(len(PROMPTS))))
        assert found == server.expected
        frame = next(frame for frame in frames if frame.get("state") == "shrunk")
        counts = {"serving": 1, "all": 2, "shrunk_at": server.llm.engine.recovery.shrunk_at}
        assert frame["dp_ranks"] == counts
        (text,) = [each["text"] for each in frame["alerts"] if "data-parallel" in each["text"]]
        assert tells(text, "1 2 data-parallel since")
        values, _ = scrape(server)
        assert values["expertlane:dp_ranks_serving",] == 1
        answer = httpx.post(f"{server.url}/scale", json={"layout": "dp=4,ep=4"})
        assert answer.status_code == 409
        message = answer.json()["error"]["message"]
        assert tells(message, "1 2 data-parallel layout")
        pool.start = start
        frame = next(frame for frame in frames if frame.get("state") == "running")
        assert frame["dp_ranks"] == {"serving": 2, "all": 2, "shrunk_at": None}
    assert complete(server, 0) == server.expected[0]
    values, _ = scrape(server)
    assert values["expertlane:growths_total",] == 1
    kinds = [kind for kind, _ in events]
    assert wait_until(lambda: [kind for kind, _ in events] == ["recovery", "growth"]), kinds
