"""From arrival to end: closed connections, full queues, deadlines, draining, ranks that die."""

import asyncio
import os
import resource
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cli.screen import tells
from engine.ranks.processes import wait_until
from engine.stub_runner import expected, spell
from expertlane.errors import CapacityError, RankError, TerminatedError
from expertlane.server.errors import ApiError
from expertlane.server.requests import CompletionRequest
from expertlane.server.run import bind, serve
from expertlane.server.setup import ServerOptions
from server.running import LONG, PATIENCE_S, Stream, events_in, held, is_idle


@pytest.mark.parametrize("half_closes", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_frees_its_blocks(stub_server, stream, half_closes):
    server = stub_server()
    connection = held(server, stream=stream)
    num_steps = server.engine.runner.num_steps
    if half_closes:
        if stream:
            connection.read_until(b"text/event-stream")
        connection.socket.shutdown(socket.SHUT_WR)
    connection.close()
    assert wait_until(lambda: server.service.num_open == 0)
    server.gate.set()
    assert wait_until(lambda: is_idle(server))
    # The step at the gate, and the one that was planned ahead.
    assert server.engine.runner.num_steps <= num_steps + 2
    line = b'vllm:request_success_total{engine="0",finished_reason="abort",model_name="stub"} 1.0'
    assert wait_until(lambda: line in server.service.metrics.text())


def test_a_closed_connection_disturbs_no_other(stub_server):
    server = stub_server()
    with ThreadPoolExecutor(1) as pool:
        server.let(10)
        other = pool.submit(server.ask, prompt=[4, 5], return_token_ids=True)
        assert wait_until(server.is_held)
        connection = Stream(server)
        assert wait_until(lambda: server.service.engine.num_unseen == 1)
        while server.engine.scheduler.num_running < 2:
            server.let(1)
            assert wait_until(server.is_held)
        connection.close()
        assert wait_until(lambda: server.service.num_open == 1)
        server.let(10)
        assert wait_until(server.is_held)
        assert server.engine.scheduler.num_running == 1
        server.gate.set()
        found = other.result().json()["choices"][0]
    assert found["token_ids"] == expected([4, 5], 50)
    assert wait_until(lambda: is_idle(server))


def test_a_full_queue(stub_server):
    server = stub_server(ServerOptions(max_num_queued=2), max_num_seqs=1)
    server.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.ask)
        assert wait_until(lambda: server.engine.scheduler.num_running == 1)
        waiting = [pool.submit(server.ask) for _ in range(2)]
        assert wait_until(lambda: server.service.num_queued == 2)
        refused = server.ask()
        server.gate.set()
        answers = [each.result().status_code for each in (running, *waiting)]
    assert answers == [200, 200, 200]
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.ask().status_code == 200


def test_a_burst_does_not_pass_a_full_queue(stub_server):
    """Requests whose chats are rendered at the same time have all found room at first."""
    server = stub_server(ServerOptions(max_num_queued=2), max_num_seqs=1)
    service = server.service
    request = CompletionRequest.model_validate(LONG)
    params = service.params(request, [[1, 2, 3]], "prompt")
    refused = []

    async def generate():
        service.check_admission(None)
        await asyncio.sleep(0)  # as rendering does
        now_s = asyncio.get_running_loop().time()
        try:
            await service.generate([[1, 2, 3]], params, request, "prompt", now_s)
        except ApiError as error:
            refused.append(error.status)

    async def burst():
        await asyncio.gather(*(generate() for _ in range(9)))

    server.gate.clear()
    over = asyncio.run_coroutine_threadsafe(burst(), server.running.loop)
    assert wait_until(lambda: len(refused) >= 6)
    server.gate.set()
    over.result(PATIENCE_S)
    assert {*refused} == {429}
    assert wait_until(lambda: is_idle(server))


@pytest.mark.parametrize(
    ("options", "more"),
    [(ServerOptions(request_timeout_s=0.05), {}), (ServerOptions(), {"timeout_s": 0.05})],
)
def test_a_deadline(stub_server, options, more):
    server = stub_server(options)
    server.gate.clear()
    answer = server.ask(**more)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    server.gate.set()
    assert wait_until(lambda: is_idle(server))


def test_a_deadline_in_a_stream(stub_server):
    server = stub_server()
    connection = Stream(server, timeout_s=60, max_tokens=1)
    assert b'"code"' not in connection.read_until(b"[DONE]")
    connection.close()
    server.gate.clear()
    connection = Stream(server, timeout_s=0.3)
    end = connection.read_until(b"[DONE]")
    connection.close()
    assert b'"code":"timeout"' in end


def test_draining(stub_server):
    server = stub_server()
    connection = held(server, return_token_ids=True)
    server.tell_to_end()
    assert wait_until(lambda: server.service.is_draining)
    refused = server.ask()
    health = httpx.get(f"{server.url}/health")
    server.gate.set()
    found = connection.read_until(b"[DONE]")
    connection.close()
    server.join()
    assert server.error is None
    assert refused.status_code == health.status_code == 503
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "draining"
    text = "".join(event["choices"][0]["text"] for event in events_in(found))
    assert text == spell(expected([1, 2, 3], 50))
    assert server.engine.num_blocks_used() == 0


def test_draining_has_a_bound(stub_server):
    server = stub_server(ServerOptions(drain_s=0.1))
    connection = held(server)
    server.tell_to_end()
    assert b'"code":"ended"' in connection.read_until(b"[DONE]")
    connection.close()
    server.gate.set()
    server.join()
    assert server.error is None


def test_told_twice_it_ends_at_once(stub_server):
    server = stub_server()
    connection = held(server)
    server.tell_to_end()
    server.tell_to_end()
    assert b'"code":"ended"' in connection.read_until(b"[DONE]")
    connection.close()
    server.join()
    assert isinstance(server.error, TerminatedError)
    server.gate.set()


@pytest.mark.parametrize("stream", [False, True])
def test_ranks_that_die_end_all(stub_server, stream):
    server = stub_server()

    def die():
        raise RankError("rank 1 was killed")

    server.engine.runner.before = die
    connection = Stream(server, stream=stream)
    end = connection.read_until(b"engine_dead")
    connection.close()
    server.join()
    assert end.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 500")
    assert b"rank 1 was killed" in end
    assert str(server.error) == "rank 1 was killed"


def test_a_request_without_logits_fails_alone(stub_server):
    server = stub_server()
    server.engine.runner.poison = 3
    assert server.ask().status_code == 500
    answer = server.ask(prompt=[4, 5], max_tokens=1)
    assert answer.status_code == 200


def test_a_slow_reader_holds_nobody_up(stub_server):
    server = stub_server()
    connection = Stream(server, n=8)
    assert server.ask(prompt=[4]).status_code == 200
    assert connection.read_until(b"[DONE]").count(b'"finish_reason":"length"') == 8
    connection.close()


def test_keys(stub_server):
    server = stub_server(ServerOptions(api_keys=("one", "two")))
    url = f"{server.url}/v1/models"
    for key in ("one", "two"):
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer three"},
        {"Authorization": "one"},
        {"Authorization": "Basic one"},
        {"Authorization": b"Bearer \xff"},
    ):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.ask().status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_server_without_descriptors_does_not_start(stub_server):
    """The loop itself could not even end without a traceback."""
    model, bound = stub_server().service.model, bind("127.0.0.1", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = {*map(int, os.listdir("/proc/self/fd"))}
    least = [number for number in range(4096) if number not in is_open][20]  # twenty are left
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
        with pytest.raises(CapacityError) as refused:
            serve(model, ServerOptions(), bound, takes_signals=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        bound.close()
    assert tells(str(refused.value), f"cannot serve few descriptors {least} ulimit -n")
