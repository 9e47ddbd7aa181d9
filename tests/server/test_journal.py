"""A journal: what a killed server leaves, and that clients get the rest, nothing twice."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cli.screen import telling, tells
from documented.commands import program_of
from engine.ranks.processes import wait_until
from engine.stub_runner import expected, letters
from expertlane.errors import UserError
from expertlane.server.journal import file as journal_file
from expertlane.server.journal import keeper
from expertlane.server.journal.file import JournalError, JournalFile
from expertlane.server.setup import ServerOptions
from server.running import LONG, PATIENCE_S, Stream, held, is_idle

STREAM = LONG | {"stream": True, "return_token_ids": True}
NAMED = {"X-Request-Id": "mine"}


@pytest.fixture
def journaled(stub_server, tmp_path):
    """Makes a server with a journal; `after` is a folder that a killed one has left."""
    numbers = iter(range(100))

    def make(after=None, reconnect_s=60.0, is_held=False, port=0, **options):
        folder = tmp_path / f"journal {next(numbers)}"
        if after is not None:
            shutil.copytree(after, folder)
        file = JournalFile(folder)
        file.identify({"model": "stub"})
        options = ServerOptions(journal=file, reconnect_s=reconnect_s, **options)
        server = stub_server(options, is_held=is_held, port=port)
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


def tokens_of(text):
    """Of a stream of completions, that is whole."""
    events = [data for _, data in events_of(text)]
    assert events[-1] == "[DONE]"
    found = [json.loads(data)["choices"] for data in events[:-1]]
    return [token for choices in found for token in choices[0]["token_ids"]]


def begun(journaled, num_events=7, body=STREAM, headers=NAMED, **options):
    """A server that computes no further, and what the client of its one stream has."""
    server = journaled(**options)
    server.let(num_events + 2)
    came = cut(server, body, num_events, headers=headers)
    assert wait_until(server.is_held)
    assert wait_until(lambda: server.service.num_open == 0)
    return server, came


def test_a_stream_goes_on_after_the_server_is_killed(journaled):
    server, came = begun(journaled)
    after = journaled(after=server.folder)
    assert wait_until(lambda: is_idle(after))  # it needs no client
    answer = after.post(STREAM, **NAMED, **{"Last-Event-ID": "mine:7"})
    assert tokens_of(came + answer.text) == expected([1, 2, 3], 50)
    assert answer.headers["X-Request-Id"] == "mine"
    ids = [each for each, _ in events_of(came + answer.text)]
    assert ids == [f"mine:{number}" for number in range(1, 52)]
    assert rest(after, "mine").text == came + answer.text  # the same bytes
    assert rest(after, "mine", 51).status_code == 204
    assert after.service.journal.num_resumed == 1
    assert after.engine.runner.num_steps < 50  # what was there is not computed again


def test_the_client_of_the_guide_gets_every_token_once(journaled):
    """Its program as written, but for the address and the prompt, which the stub knows as ids."""
    server = journaled(drain_s=0.0)
    server.let(9)
    code = program_of("recovery.md", "Last-Event-ID")
    code = code.replace("http://127.0.0.1:8000", server.url)
    code = code.replace('"Once upon a time", "max_tokens": 200', '[1, 2, 3], "max_tokens": 50')
    printed = []
    names = {"print": lambda text, **_: printed.append(text)}
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(exec, code, names)
        assert wait_until(lambda: len(printed) >= 7)
        assert wait_until(server.is_held)
        server.end_held()
        num_before = len(printed)
        after = journaled(after=server.folder, port=server.port)
        client.result(timeout=PATIENCE_S)
    assert 7 <= num_before < 50
    assert "".join(printed) == letters().decode(expected([1, 2, 3], 50))
    assert after.service.journal.num_resumed == 1
    assert after.service.journal.num_reconnects >= 1


def test_a_client_comes_back_to_a_server_that_lives(journaled):
    server, came = begun(journaled)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.post, STREAM, **NAMED, **{"Last-Event-ID": "mine:7"})
        other = pool.submit(rest, server, "mine")
        assert wait_until(lambda: server.service.num_open == 2)
        server.gate.set()
        assert tokens_of(came + asked.result().text) == expected([1, 2, 3], 50)
        assert other.result().text == came + asked.result().text
    assert wait_until(lambda: is_idle(server))
    page = httpx.get(f"{server.url}/metrics").text
    assert 'expertlane:journal_reconnects_total{model_name="stub"} 2.0' in page
    assert 'expertlane:journal_requests{model_name="stub",state="finished"} 1.0' in page


def test_an_answer_without_stream_is_given_once_more(journaled):
    server = journaled()
    server.gate.clear()
    body = LONG | {"n": 2, "logprobs": 1}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(server.post, body, **NAMED) for _ in range(2)]
        assert wait_until(lambda: server.service.num_open == 2)
        server.gate.set()
        first, second = (each.result() for each in both)
    assert first.json() == second.json() == server.post(body, **NAMED).json()
    assert server.engine.runner.num_steps <= 52
    refused = server.post(body | {"seed": 1}, **NAMED)
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "X-Request-Id")
    assert rest(server, "mine").json()["error"]["param"] == "request_id"
    after = journaled(after=server.folder)
    assert after.post(body, **NAMED).json() == first.json()
    assert after.engine.runner.num_steps == 0


def test_without_a_name_a_closed_connection_ends_it(journaled):
    """Its client did not say that it comes back; the id in a stream is for a dead server."""
    server = journaled()
    connection = held(server)
    connection.close()
    assert wait_until(lambda: not server.service.journal.requests)
    server.gate.set()
    assert wait_until(lambda: is_idle(server))
    assert server.post(LONG).status_code == 200  # not a stream: nothing is kept of it
    assert not server.service.journal.requests
    server, _ = begun(journaled, headers={})
    server.gate.set()
    assert wait_until(lambda: is_idle(server))
    server.let(5)
    connection = Stream(server)
    text = connection.read_until(b"data: ").decode()
    name = text.partition("\nid: ")[2].partition(":")[0]
    assert wait_until(server.is_held)
    after = journaled(after=server.folder)
    connection.close()
    assert len(name) == 32
    assert len(events_of(rest(after, name).text)) == 51


@pytest.mark.smoke(2)
@pytest.mark.parametrize("seed", range(60))
def test_a_clock_that_is_set_back_and_forth(journaled, monkeypatch, seed):
    """By up to 35 days at every reading; only a resumed request compares dates."""
    draw, real = random.Random(seed), time.time
    monkeypatch.setattr(time, "time", lambda: real() + draw.uniform(-3e6, 3e6))
    server, came = begun(journaled, num_events=draw.randrange(1, 9), request_timeout_s=60)
    with ThreadPoolExecutor(2) as pool:
        limited = [pool.submit(server.post, LONG | {"timeout_s": 50}) for _ in range(2)]
        other = pool.submit(server.post, STREAM, **{"X-Request-Id": "other"})
        assert wait_until(lambda: server.service.num_open >= 2)
        shutil.copytree(server.folder, server.folder.with_name("left"))
        server.gate.set()
        assert [each.result().status_code for each in limited] == [200, 200]
        assert tokens_of(other.result().text) == expected([1, 2, 3], 50)
    assert tokens_of(rest(server, "mine").text) == expected([1, 2, 3], 50)
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    after = journaled(after=server.folder.with_name("left"))
    last = len(events_of(came)) if came.endswith("\n\n") else 0
    headers = {"Last-Event-ID": f"mine:{last}"} if last else {}
    more = after.post(STREAM, **NAMED, **headers).text
    assert tokens_of((came if last else "") + more) == expected([1, 2, 3], 50)


def test_who_does_not_come_back(journaled):
    server, _ = begun(journaled, reconnect_s=0.2)
    assert wait_until(lambda: not server.service.journal.requests)
    server.gate.set()
    assert wait_until(lambda: is_idle(server))
    assert server.service.journal.num_abandoned == 1
    gone = server.post(STREAM, **NAMED, **{"Last-Event-ID": "mine:7"})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "Last-Event-ID")
    assert tells(gone.json()["error"]["message"], "request mine")
    assert rest(server, "mine").json()["error"]["param"] == "request_id"
    assert journaled(after=server.folder).service.journal.requests == {}


def test_a_request_that_is_deleted(journaled):
    server, _ = begun(journaled)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(rest, server, "mine")
        assert wait_until(lambda: server.service.num_open == 1)
        url = f"{server.url}/v1/requests/mine"
        assert httpx.delete(url).json() == {"id": "mine", "object": "request", "deleted": True}
        events = [data for _, data in events_of(other.result().text)]
    assert json.loads(events[-2])["error"]["code"] == "cancelled"
    assert httpx.delete(url).status_code == 404
    server.gate.set()
    assert wait_until(lambda: is_idle(server))
    assert journaled(after=server.folder).service.journal.requests == {}


def test_keys_do_not_see_each_other(journaled):
    server = journaled(api_keys=("one", "other"))
    one, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "other"))
    assert server.post(STREAM, **NAMED, **one).status_code == 200
    url = f"{server.url}/v1/requests/mine/events"
    assert httpx.get(url, headers=one).status_code == 200
    assert httpx.get(url, headers=other).status_code == 404
    assert httpx.get(url).status_code == 401
    mine = server.post(STREAM | {"prompt": [4]}, **NAMED, **other)  # an id of their own
    assert tokens_of(mine.text) == expected([4], 50)
    after = journaled(after=server.folder, api_keys=("one", "other"))
    url = f"{after.url}/v1/requests/mine/events"
    assert tokens_of(httpx.get(url, headers=other).text) == expected([4], 50)
    assert tokens_of(httpx.get(url, headers=one).text) == expected([1, 2, 3], 50)
    assert b"one" not in b"".join(each.read_bytes() for each in after.folder.glob("*.journal"))


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Request-Id": "a b"}, "X-Request-Id"),
        ({"X-Request-Id": "x" * 129}, "X-Request-Id"),
        ({"X-Request-Id": "a", "Last-Event-ID": "b:1"}, "Last-Event-ID"),
        ({"Last-Event-ID": "7"}, "Last-Event-ID"),
        ({"Last-Event-ID": "a:-1"}, "Last-Event-ID"),
    ],
)
def test_headers_that_are_wrong(journaled, headers, param):
    refused = journaled().post(STREAM, **headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_without_a_journal_nothing_is_continued(stub_server):
    refused = stub_server().post(STREAM, **{"Last-Event-ID": "mine:7"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "Last-Event-ID")
    assert "--journal" in refused.json()["error"]["message"]


def test_a_deadline_goes_on_while_nobody_serves(journaled, monkeypatch):
    server = journaled(is_held=True)
    error, done = (data for _, data in events_of(cut(server, STREAM | {"timeout_s": 0.5}, 2)))
    assert (json.loads(error)["error"]["code"], done) == ("timeout", "[DONE]")
    assert journaled(after=server.folder).service.journal.requests == {}
    server, _ = begun(journaled, body=STREAM | {"timeout_s": 600})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 601)
    answer = rest(journaled(after=server.folder), "mine")  # killed in time, begun again too late
    assert "timeout" in answer.text


def test_told_to_end_it_leaves_the_rest_to_the_next(journaled):
    server = journaled(drain_s=0.1)
    server.let(9)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, STREAM, **NAMED)
        assert wait_until(server.is_held)
        server.end_held()
        came = asked.result().text
    assert server.error is None
    assert "[DONE]" not in came  # nor an error
    num = len(events_of(came))
    after = journaled(after=server.folder)
    answer = rest(after, "mine", num)
    assert tokens_of(came + answer.text) == expected([1, 2, 3], 50)


def running(server):
    """Names of the requests that the engine has, or is to begin with after its present step."""
    engine, kept = server.service.engine, server.service.journal.requests
    return {
        name
        for (_, name), each in list(kept.items())
        if each in engine._asked or engine._live.keys() & set(each.request_ids)
    }


def test_a_request_that_kills_every_server_is_set_aside_and_no_other(journaled):
    """Servers that die are those whose folder another goes on with; none makes a step."""
    first = journaled(is_held=True)
    with ThreadPoolExecutor(4) as pool:
        for name in ("pill", "other", "third"):
            pool.submit(cut, first, STREAM, 1, headers={"X-Request-Id": name})
            assert wait_until(lambda name=name: name in running(first))
        second = journaled(after=first.folder, is_held=True)
        assert wait_until(lambda: running(second) == {"pill", "other", "third"})
        third = journaled(after=second.folder, is_held=True)
        assert wait_until(lambda: running(third) == {"pill"})
        waiting = pool.submit(third.post, LONG)  # a new one is not mixed with it
        assert wait_until(lambda: third.service.num_open == 1)
        fourth = journaled(after=third.folder)
        assert wait_until(lambda: is_idle(fourth) and fourth.service.journal._are_tried.is_set())
        assert running(third) == {"pill"}
        third.gate.set()  # there it was innocent
        assert waiting.result().status_code == 200
        first.gate.set()
        second.gate.set()
    for name in ("other", "third"):
        assert tokens_of(rest(fourth, name).text) == expected([1, 2, 3], 50)
    for server in (fourth, journaled(after=fourth.folder)):
        error, done = (data for _, data in events_of(rest(server, "pill").text))
        assert tells(json.loads(error)["error"]["message"], "died twice alone")
        assert done == "[DONE]"
        assert server.post(STREAM, **{"X-Request-Id": "pill"}).text.count("data: ") == 2
        assert server.post(LONG).status_code == 200


def test_suspects_whose_clients_stay_away_keep_nobody_waiting(journaled):
    first = journaled(is_held=True)
    with ThreadPoolExecutor(3) as pool:
        for name in ("one", "two", "three"):
            pool.submit(cut, first, STREAM, 1, headers={"X-Request-Id": name})
            assert wait_until(lambda name=name: name in running(first))
        second = journaled(after=first.folder, is_held=True)
        assert wait_until(lambda: running(second) == {"one", "two", "three"})
        third = journaled(after=second.folder, is_held=True)
        assert wait_until(lambda: running(third) == {"one"})
        keeper = third.service.journal
        for (_, name), kept in list(keeper.requests.items()):
            if name != "one":  # as after reconnect_s
                keeper._loop.call_soon_threadsafe(keeper._abandon, kept)
        assert wait_until(lambda: keeper.num_abandoned == 2)
        for server in (first, second, third):
            server.gate.set()
    assert third.post(LONG).status_code == 200
    assert tokens_of(rest(third, "one").text) == expected([1, 2, 3], 50)
    assert keeper.num_resumed == 1
    assert {name for _, name in journaled(after=third.folder).service.journal.requests} == {"one"}


def test_a_request_that_goes_on_from_server_to_server_is_never_tried_alone(journaled):
    server, _ = begun(journaled, num_events=3)
    for _ in range(5):
        kept = server.service.journal.requests[b"", "mine"]
        assert kept.suspected is None or kept.suspected.num_deaths <= 1
        num_before = len(kept.chunks)
        server = journaled(after=server.folder, is_held=True)
        server.let(3)
        kept = server.service.journal.requests[b"", "mine"]
        assert wait_until(lambda before=num_before, kept=kept: len(kept.chunks) == before + 3)
        assert wait_until(server.is_held)
    server.gate.set()
    assert tokens_of(rest(server, "mine").text) == expected([1, 2, 3], 50)


def test_a_server_that_is_told_to_end_blames_no_request(journaled):
    server = journaled(drain_s=0.1)
    server.let(9)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.post, STREAM, **NAMED)
        assert wait_until(server.is_held)
        assert running(server) == {"mine"}
        server.end_held()
    (path,) = server.folder.glob("*.journal")
    data = path.read_bytes()
    ends = [end for end, _ in journal_file.records_of(data)]
    for size, num_deaths in ((ends[-1], 0), (ends[-2], 1)):  # the last record says so
        path.write_bytes(data[:size])
        file = JournalFile(server.folder)
        assert [each.num_deaths for each in file.found.values()] == [num_deaths]
        file.close()


@pytest.mark.parametrize("most", [-(10**6), 0])
def test_new_files_lose_nothing(journaled, monkeypatch, most):
    """A new file with every record, or with some; and the older ones are still there."""
    monkeypatch.setattr(keeper, "_COMPACT_BYTES", most)
    monkeypatch.setattr(journal_file.Path, "unlink", lambda path: None)
    server, came = begun(journaled)
    files = sorted(server.folder.glob("*.journal"))
    assert len(files) >= (2 if most == 0 else 8)
    after = journaled(after=server.folder)
    answer = rest(after, "mine", 7)
    assert tokens_of(came + answer.text) == expected([1, 2, 3], 50)


def test_a_record_that_is_torn_or_damaged(journaled, tmp_path):
    """Cut off at any byte, what is before it is used; a byte that was changed is refused."""
    server, _ = begun(journaled)
    folder = shutil.copytree(server.folder, tmp_path / "copy")
    (path,) = folder.glob("*.journal")
    data = path.read_bytes()
    ends = [end for end, _ in journal_file.records_of(data)]
    assert ends[-1] == len(data)
    for size in (0, 5, ends[0] - 1):  # no file has its name before its header is whole
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=telling("byte 0 header missing")) as refused:
            JournalFile(folder)
        assert str(size) in str(refused.value)
    for size in (ends[0], ends[1] + 12, len(data) - 1):
        path.write_bytes(data[:size])
        file = JournalFile(folder)
        num_whole = sum(end <= size for end in ends)
        assert file.num_torn_bytes == size - ([0, *ends][num_whole])
        assert len(file.found) == (num_whole > 1)
        file.close()
    path.write_bytes(data + bytes(50))  # as a file system may leave it
    file = JournalFile(folder)
    assert file.num_torn_bytes == 50
    file.close()
    for at in (3, 20, ends[1] + 2, ends[1] + 7, ends[1] + 14, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 0x40
        path.write_bytes(changed)
        begin = max(end for end in [0, *ends] if end <= at)
        with pytest.raises(UserError, match=f"{path.name}: byte {begin}: ") as refused:
            JournalFile(folder)
        assert "\n" not in str(refused.value)


def test_another_model_or_server(journaled):
    server, _ = begun(journaled)
    program = "import sys; from expertlane.server.journal.file import *; "
    program += "JournalFile(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(server.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert tells(done.stderr, "another server folder")
    copy = server.folder.with_name("copy")
    shutil.copytree(server.folder, copy)
    file = JournalFile(copy)
    with pytest.raises(UserError, match=telling("server stub x")):
        file.identify({"model": "x"})
    file.close()
    file = JournalFile(copy.with_name("empty"))
    file.identify({"model": "x"})
    file.close()


def test_a_full_disk_ends_the_server(journaled, monkeypatch):
    """What could not be written is not sent; what was goes on later."""
    server = journaled()
    server.step_s = 0.01
    write = os.write

    def full(file, data):
        if server.engine.runner.num_steps > 9:
            write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(journal_file.os, "write", full)
        came = server.post(STREAM, **NAMED).text
        server.join()
    assert isinstance(server.error, JournalError)
    assert tells(str(server.error), f"--journal {server.folder} No space left")
    num = len(events_of(came))
    assert 5 < num < 12
    answer = rest(journaled(after=server.folder), "mine", num)
    assert tokens_of(came + answer.text) == expected([1, 2, 3], 50)
