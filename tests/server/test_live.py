"""`/live`: what its page may load, and the frames that it draws."""

import json
import re
import socket
import time
from base64 import b64decode, b64encode
from contextlib import contextmanager
from hashlib import sha256
from itertools import combinations

import httpx
import numpy as np
import pytest

from cli.screen import tells
from engine.ranks.processes import wait_until
from expertlane.engine.comm.progress import Position
from expertlane.engine.rank_watch import RankWatch
from expertlane.engine.ranks.losses import Silence
from expertlane.report.charts.colours import PALETTE
from expertlane.server import live
from expertlane.server.setup import ServerOptions
from expertlane.spec.names import Stage
from report.colour_vision import SEEN_BY, difference, lab
from server.running import PATIENCE_S


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(live, "_FRAME_S", 0.05)


@contextmanager
def feed(server, **headers):
    """An iterator over what the stream says."""
    url = f"{server.url}/live/feed"
    with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in answer.iter_lines() if line)
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def numbers(text, *shape):
    return np.frombuffer(b64decode(text), dtype="<u4").reshape(shape)


def test_the_page_loads_nothing_from_elsewhere(stub_server):
    answer = httpx.get(f"{stub_server().url}/live")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.status_code == 200
    assert not re.search(r"""(src|href)=["'](?!#|data:,|metrics)""", page)
    assert "//" not in page.replace("// ", "")
    assert "innerHTML" not in page
    assert not re.search(r"""<[^>]+\s(style|on\w+)=""", page.split("<script>")[0])
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("seen_by", SEEN_BY)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_lanes_and_the_scale_are_told_apart_by_everybody(scheme, seen_by):
    scale = ["--below", "--page", "--above"]
    for together, least in ((["--page", *live.COLOURS.values()], 10), (scale, 20)):
        for one, other in combinations(together, 2):
            seen = (lab(PALETTE[each][scheme], seen_by) for each in (one, other))
            assert difference(*seen) >= least, (one, other)


def test_frames_say_what_the_clients_did(stub_server):
    server = stub_server(layout="dp=2")
    server.ask(max_tokens=5)
    with feed(server) as frames:
        start = next(frames)
        assert start["kind"] == "start"
        assert start["model"] == "stub"
        assert start["layers"] == start["ranks"] == []  # nobody watches them
        first, second = next(frames), next(frames)
        assert first["num_generation_tokens"] == 5
        assert first["state"] == "running"
        assert first["alerts"] == []
        assert sum(first["dummy_steps"]) == 5
        assert second["at"] > first["at"]
        assert wait_until(lambda: server.live.num_viewers == 1)
    assert wait_until(lambda: server.live.num_viewers == 0)


def test_frames_of_real_ranks(served):
    size = 4, 8  # layers and experts of the checkpoint
    with feed(served.server) as frames:
        start = next(frames)
        assert [each["dp"] for each in start["ranks"]] == [0, 1]
        assert start["layers"] == list(range(size[0]))
        assert start["num_experts"] == size[1]
        for of_layer in start["placements"][0]:
            assert sorted(expert for held in of_layer for expert in held) == list(range(size[1]))
        before = next(frames)["totals"]
        served.client.completions.create(
            model="tiny", prompt="the thing", max_tokens=20, extra_body={"ignore_eos": True}
        )
        for frame in frames:
            totals = frame["totals"]
            tokens = numbers(totals["tokens"], *size) - numbers(before["tokens"], *size)
            if tokens.sum() >= 2 * 20 * size[0]:
                break
        assert len(set(tokens.sum(axis=1))) == 1  # each layer has all tokens
        by_rank = numbers(totals["rank_tokens"], size[0], 2)
        np.testing.assert_array_equal(
            by_rank.sum(axis=1), numbers(totals["tokens"], *size).sum(axis=1)
        )
        spent = np.array(totals["ms"]) - np.array(before["ms"])
        assert (spent >= 0).all()
        assert spent.shape == (2, len(start["stages"]))
        assert spent[:, start["stages"].index("waiting")].sum() > 0
        assert len(frame["now"]) == 2
        assert frame["ttft"]["num"] > 0
        assert 0 < frame["ttft"]["p50"] <= frame["ttft"]["p99"]


def test_the_key_comes_in_a_header(stub_server):
    server = stub_server(ServerOptions(api_keys=("secret",)))
    assert httpx.get(f"{server.url}/live").status_code == 200
    assert httpx.get(f"{server.url}/live/feed").status_code == 401
    assert httpx.get(f"{server.url}/live/feed?key=secret").status_code == 401
    with feed(server, Authorization="Bearer secret") as frames:
        assert next(frames)["kind"] == "start"


def test_the_number_of_viewers_is_bounded(stub_server, monkeypatch):
    monkeypatch.setattr(live, "MOST_VIEWERS", 2)
    server = stub_server()
    with feed(server) as first, feed(server) as second:
        assert next(first)["kind"] == next(second)["kind"] == "start"
        answer = httpx.get(f"{server.url}/live/feed")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "too_many_viewers"
    assert wait_until(lambda: server.live.num_viewers == 0)
    with feed(server) as frames:
        assert next(frames)["kind"] == "start"


def test_a_viewer_that_reads_nothing_holds_nobody_up(stub_server, monkeypatch):
    monkeypatch.setattr(live, "_STUCK_S", 0.5)
    server = stub_server()
    state = server.live.state
    for i in range(200):
        state.add("error", f"{i}" * 20_000)  # frames of 2 MB
    stuck = socket.create_connection(("127.0.0.1", server.port))
    with stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(b"GET /live/feed HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stuck.recv(1)  # and no more
        with feed(server) as frames:
            assert [next(frames)["kind"] for _ in range(3)] == ["start", "frame", "frame"]
            while server.live.num_viewers != 1:  # until it is let go; this one reads on
                assert next(frames)["kind"] == "frame"


def test_an_end_is_the_last_frame(stub_server):
    server = stub_server()
    with feed(server) as frames:
        next(frames)
        server.tell_to_end()
        rest = list(frames)
    assert rest[-1]["state"] == "draining"
    assert [each["kind"] for each in rest[-1]["events"]] == ["drain"]
    server.join()


def test_dead_ranks_are_the_last_frame(stub_server):
    server = stub_server()

    def die():
        raise RuntimeError("rank 1 was killed <b>")

    server.engine.runner.before = die
    with feed(server) as frames:
        next(frames)
        httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, timeout=PATIENCE_S)
        rest = list(frames)
    assert rest[-1]["state"] == "ended"
    assert rest[-1]["alerts"][0]["level"] == "red"
    assert rest[-1]["alerts"][0]["text"] == rest[-1]["events"][-1]["text"]
    assert "rank 1 was killed" in rest[-1]["alerts"][0]["text"]
    server.join()


def test_a_silent_rank_is_red_and_a_full_one_amber(served, monkeypatch):
    state = served.server.live.state
    old = Position(7, 2, Stage.EXPERTS, False, 1, time.monotonic() - 60)
    monkeypatch.setattr(RankWatch, "silence", lambda self: Silence(60.0, 1, old, False))
    monkeypatch.setattr(RankWatch, "imbalance", lambda self, seconds: {1: 1.2, 3: 2.5})
    silent, uneven = state.alerts()
    assert (silent.level, uneven.level) == ("red", "amber")
    assert tells(silent.text, "Rank 1 60 step 7 layer 2 stage experts")
    assert tells(uneven.text, "Layer 3 2.5")
    assert "--rebalance-steps" in uneven.advice


def test_a_full_queue_is_red_and_preemptions_are_events(stub_server):
    server = stub_server(ServerOptions(max_num_queued=2), num_blocks=8, max_model_len=32)
    prompts = [[i] * 4 for i in range(4)]
    server.ask(prompt=prompts, max_tokens=25)
    assert server.engine.scheduler.num_preemptions > 0
    state = server.live.state
    assert wait_until(lambda: any(each.kind == "preemption" for each in list(state.events)))
    assert [each.level for each in state.alerts()] == ["amber"]
    server.gate.clear()
    with httpx.Client(base_url=server.url) as client:
        sent = client.build_request(
            "POST", "/v1/completions", json={"prompt": prompts * 3, "stream": True}
        )
        answer = client.send(sent, stream=True)
        assert wait_until(lambda: server.service.num_queued >= 2)
        assert next(state.alerts()).level == "red"
        server.gate.set()
        answer.close()
