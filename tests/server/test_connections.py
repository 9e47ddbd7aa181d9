"""Connections that are slow, endless, broken or half-closed: each gets an answer or its end."""

import json
import socket
import threading
from contextlib import suppress

import httpx
import pytest

from cli.screen import tells
from engine.ranks.processes import wait_until
from engine.stub_runner import expected, spell
from expertlane.server import bodies
from expertlane.server import run as server_run
from expertlane.server.setup import ServerOptions
from server.running import LONG, PATIENCE_S, Stream, events_in, is_idle

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)


def answer_of(connection):
    """Status and JSON of what comes until the server closes the connection."""
    answer = b""
    while part := connection.recv(4096):
        answer += part
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def refused(connection):
    """Status and message of an error in the API's form."""
    status, body = answer_of(connection)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return status, body["error"]["message"]


def test_a_half_closed_client_gets_its_answer(stub_server):
    server = stub_server()
    server.gate.clear()
    with connect(server) as connection:
        body = json.dumps(LONG).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        connection.shutdown(socket.SHUT_WR)
        assert wait_until(lambda: server.engine.scheduler.num_running == 1)
        threading.Timer(0.5, server.gate.set).start()
        status, answer = answer_of(connection)
    assert status == 200
    assert answer["choices"][0]["text"] == spell(expected(LONG["prompt"], LONG["max_tokens"]))
    assert wait_until(lambda: is_idle(server))


def test_a_half_closed_client_gets_its_stream(stub_server):
    server = stub_server()
    server.gate.clear()
    connection = Stream(server)
    connection.read_until(b"text/event-stream")
    connection.socket.shutdown(socket.SHUT_WR)
    events = connection.read_until(b"\n:\n")  # by which the server saw that the client is there
    server.gate.set()
    events += connection.read_until(b"[DONE]")
    connection.close()
    text = "".join(event["choices"][0]["text"] for event in events_in(events))
    assert text == spell(expected(LONG["prompt"], LONG["max_tokens"]))


@pytest.mark.parametrize(
    ("sent", "status", "word"),
    [
        (b"GET /health HT", 400, "headers"),
        (HEAD + b"X-A: b\r\n", 400, "headers"),
        (HEAD + b"Content-Length: 50\r\n\r\n{", 400, "ends early"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", 400, "ends early"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400, "not HTTP"),
        (b"GET /health SMTP/9\r\n\r\n", 400, "not HTTP"),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400, "not HTTP"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "not HTTP"),
    ],
)
def test_a_request_that_is_cut_or_none(stub_server, sent, status, word):
    server = stub_server()
    with connect(server) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found, message = refused(connection)
    assert (found, word in message) == (status, True), message
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_headers_without_end(stub_server):
    server = stub_server()
    with connect(server) as connection:
        connection.sendall(HEAD)
        connection.sendall((b"X-A: " + b"b" * 1000 + b"\r\n") * 70)
        assert refused(connection)[0] == 431


def test_a_refused_client_may_send_on_and_read_its_answer(stub_server):
    server = stub_server()
    with connect(server) as connection:
        connection.sendall(HEAD)
        connection.sendall((b"X-A: " + b"b" * 1000 + b"\r\n") * 3000)
        assert refused(connection)[0] == 431
    assert wait_until(lambda: not server.running.server.server_state.connections)


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"2\r\n{}\r\n0\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"),
        (b"2\r\n{}\r\n0\r\nX-A: ", b"b" * 1000),
        (b"", b"1;a=" + b"b" * 1000 + b"\r\n \r\n"),
        (b"2;", b"a" * 1000),
    ],
)
def test_trailers_and_extensions_without_end(stub_server, begin, more):
    server = stub_server()
    with connect(server) as connection:
        connection.sendall(CHUNKED + begin)
        num_sent = 0
        with suppress(ConnectionError):  # it is closed before all is sent
            for _ in range(50_000):
                connection.sendall(more)
                num_sent += len(more)
        assert num_sent < 16 * 2**20  # what the kernel takes
    assert wait_until(lambda: server.service.num_open == 0)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_trailers_are_no_headers(stub_server):
    server = stub_server(ServerOptions(api_keys=("secret",)))
    body = json.dumps(LONG).encode()
    chunks = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer secret\r\n\r\n" % (len(body), body)
    with connect(server) as connection:
        connection.sendall(CHUNKED + chunks)
        assert b" 401 " in connection.recv(4096)


def test_a_body_in_many_small_chunks(stub_server):
    server = stub_server()
    body = json.dumps(LONG).encode() + b" " * 30_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nX-A: b\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(CHUNKED + chunks)
        assert b" 200 " in connection.recv(4096)


SCALE = ("POST", "/scale", {"layout": "tp=1"})
ASKED = ("POST", "/v1/completions", LONG)
DELETED = ("DELETE", "/v1/requests/mine", None)
READ = ("GET", "/metrics", None)
KEYS = {"api_keys": ("secret",)}


@pytest.mark.parametrize(
    ("listens", "options", "headers", "may_read", "may_change"),
    [
        ("127.0.0.1", {}, {"Host": "localhost"}, True, True),
        ("127.0.0.1", {}, {"Host": "LOCALHOST.:1"}, True, True),
        ("127.0.0.1", {}, {"Host": "[::1]:8000"}, True, True),
        ("127.0.0.1", {}, {"Host": "127.8.9.1"}, True, True),
        ("127.0.0.1", {}, {"Host": "evil.example"}, False, False),
        ("127.0.0.1", {}, {"Host": "127.0.0.1.evil.example"}, False, False),
        ("127.0.0.1", {}, {"Host": "evil.example", "Origin": "http://evil.example"}, False, False),
        ("127.0.0.1", {}, {"Host": "[::1"}, False, False),
        (
            "127.0.0.1",
            {"allowed_hosts": ("chat.example",)},
            {"Host": "chat.example:443"},
            True,
            True,
        ),
        ("127.0.0.1", {"allowed_hosts": ("*",)}, {"Host": "evil.example"}, True, True),
        ("127.0.0.1", KEYS, {"Host": "any.example"}, True, True),
        ("127.0.0.1", {}, {"Host": "localhost:80", "Origin": "http://localhost"}, True, True),
        ("127.0.0.1", {}, {"Host": "localhost:80", "Origin": "http://localhost:81"}, True, False),
        ("127.0.0.1", {}, {"Host": "localhost", "Origin": "http://evil.example"}, True, False),
        ("127.0.0.1", {}, {"Host": "localhost", "Origin": "null"}, True, False),
        ("127.0.0.1", KEYS, {"Host": "a.example", "Origin": "http://evil.example"}, True, False),
        ("0.0.0.0", {}, {"Host": "any.example"}, True, False),
        ("0.0.0.0", {}, {"Host": "localhost"}, True, False),
        ("0.0.0.0", {"allowed_hosts": ("gpu1",)}, {"Host": "gpu1:8000"}, True, True),
        ("0.0.0.0", {"allowed_hosts": ("gpu1",)}, {"Host": "gpu2:8000"}, True, False),
        ("0.0.0.0", KEYS, {"Host": "any.example"}, True, True),
    ],
)
def test_a_page_of_another_site_is_refused(
    stub_server, listens, options, headers, may_read, may_change
):
    server = stub_server(ServerOptions(**options), host=listens)
    key = {"Authorization": "Bearer secret"} if options is KEYS else {}
    for sent in (READ, ASKED, DELETED, SCALE):
        method, path, body = sent
        answer = httpx.request(method, f"{server.url}{path}", json=body, headers=headers | key)
        is_refused = answer.status_code == 403
        assert is_refused == (not (may_change if sent in (SCALE, DELETED) else may_read)), sent
        if is_refused:
            assert answer.json()["error"]["code"] == "host_not_allowed"


def test_no_other_site_may_ask(stub_server):
    headers = {"Origin": "http://other", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{stub_server().url}/v1/completions", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("names", ["evil.example localhost", "localhost localhost"])
def test_two_hosts(stub_server, names):
    hosts = "".join(f"Host: {name}\r\n" for name in names.split())
    with connect(stub_server()) as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\n{hosts}\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 403 ")


def test_slow_headers(stub_server, monkeypatch):
    monkeypatch.setattr(server_run, "HEAD_S", 1.0)
    server = stub_server()
    with connect(server) as connection, connect(server) as silent:
        connection.sendall(HEAD)
        status, message = refused(connection)
        assert status == 408
        assert tells(message, "headers 1 s")
        assert silent.recv(1) == b""
    monkeypatch.setattr(server_run, "HEAD_S", 60.0)
    with connect(server) as later:
        later.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in later.recv(4096)
        monkeypatch.setattr(server_run, "HEAD_S", 0.2)
        later.sendall(b"GET /hea")
        assert refused(later)[0] == 408


def test_a_slow_body(stub_server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_S", 0.2)
    server = stub_server()
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 500)
        status, message = refused(connection)
    assert (status, message.count("too slow: 500 bytes")) == (408, 1)
    assert wait_until(lambda: server.service.num_open == 0)


def test_a_client_that_goes_while_its_text_becomes_tokens(stub_server, monkeypatch):
    server = stub_server(max_model_len=2**16, num_blocks=2**14)
    begun, go_on = threading.Event(), threading.Event()
    encode = type(server.engine._tokenizer).encode

    def slow(tokenizer, text, **more):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return encode(tokenizer, text, **more)

    monkeypatch.setattr(type(server.engine._tokenizer), "encode", slow)
    connection = Stream(server, prompt="a" * 30_000, max_tokens=1)
    assert begun.wait(PATIENCE_S)
    assert server.service.num_open == 1
    connection.close()
    assert wait_until(lambda: server.service.num_open == 0)
    assert server.ask(prompt="a" * 30_000, timeout_s=0.1).status_code == 504
    go_on.set()
    assert is_idle(server)
