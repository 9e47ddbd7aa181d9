"""Loads on servers that answer, refuse, break off and vanish."""

import asyncio

import pytest

from cli.screen import tells
from client.fake_server import DONE, END, OPENING, answer, chunk, error, fakes, text, usage, whole
from expertlane.client.connection import Url
from expertlane.client.run import MeasureOptions, Target, measure
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.spec.workload import LengthRange, Load, parse_slos


@pytest.fixture
def fake():
    with fakes() as make:
        yield make


LENGTHS = LengthRange(2, 9), LengthRange(1, 5)


def seen(*servers, load=None, **more):
    targets = [Target(Url.parse(each.url), f"key {place}") for place, each in enumerate(servers)]
    load = load or Load(12, *LENGTHS, batch=3)
    return measure(targets, MeasureOptions([load], 0, **more), Progress())


def client_of(found):
    return found.records[0].serving[0].client


def test_a_closed_loop_counts_every_token(fake):
    server = fake()
    found = seen(server, slos=parse_slos(["ttft.p95=1000s"]))
    (record,) = found.records
    (serving,) = record.serving
    probe, *warm_up_and_load = server.asked
    load = warm_up_and_load[3:]
    assert record.name == f"{server.url} (fake 1.2)"
    assert (record.layout, record.options) == (None, None)
    assert probe["model"] == "paper-tiny"
    assert len(warm_up_and_load) == 3 + 12
    assert serving.num_prompt_tokens == sum(len(each["prompt"]) for each in load)
    assert serving.num_output_tokens == sum(each["max_tokens"] for each in load)
    assert (serving.batch, serving.num_requests, serving.good_share.value) == (3, 12, 1.0)
    client = serving.client
    assert (client.num_failed, client.num_events) == (0, serving.num_output_tokens)
    assert sorted(client.requests.numbers) == list(range(12))
    lens = [len(each["prompt"]) for each in load]
    assert sorted(client.requests.prompt_lens) == sorted(lens)
    assert set(server.keys) == {"bearer key 0"}
    assert serving.ttft_s.median.value <= serving.e2e_s.median.value


def test_one_request_of_one_token(fake):
    found = seen(fake(), load=Load(1, LengthRange(1, 1), LengthRange(1, 1), batch=1), num_warm_up=0)
    (serving,) = found.records[0].serving
    assert (serving.num_requests, serving.num_output_tokens, serving.tpot_s) == (1, 1, None)


def test_an_open_loop_counts_from_when_requests_were_due(fake):
    """One at a time behind a lock: those that wait there are late by all that was before them."""
    lock = asyncio.Lock()

    async def slowly(asked, number):
        async with lock:
            await asyncio.sleep(0.02)
            async for part in answer(asked, number):
                yield part

    load = Load(10, *LENGTHS, rate=10_000.0)
    (serving,) = seen(fake(slowly), load=load, num_warm_up=0).records[0].serving
    requests = serving.client.requests
    ends = sorted(due + e2e for due, e2e in zip(requests.due_s, requests.e2e_s, strict=True))
    assert ends[-1] >= 10 * 0.02  # counted from the first due time, though none took that long
    assert max(requests.ttft_s) >= 9 * 0.02
    assert serving.client.late_s is not None
    assert serving.rate == 10_000.0


def failing(number_of, what):
    async def generate(asked, number):
        if number and number % number_of == 0:  # not the probe
            async for part in what(asked, number):
                yield part
            return
        async for part in answer(asked, number):
            yield part

    return generate


async def too_many(asked, number):
    yield error(429, "queue full")


async def closes(asked, number):
    if False:
        yield b""


async def cut(asked, number):
    yield OPENING + chunk(text())


async def broken(asked, number):
    yield OPENING + chunk(text() + b'data: {"error": {"message": "boom"}}\n\n' + DONE) + END


async def not_a_stream(asked, number):
    yield whole({"choices": [{"text": "all"}]})


async def no_http(asked, number):
    yield b"SSH-2.0-OpenSSH_9.6\r\n"


@pytest.mark.parametrize(
    ("what", "name", "message"),
    [
        (too_many, "HTTP 429", "queue full"),
        (closes, "no answer", "closed"),
        (cut, "stream ended early", "closed"),
        (broken, "error in the stream", "boom"),
        (not_a_stream, "no event stream", "application/json"),
        (no_http, "no answer", "HTTP"),
    ],
)
def test_failures_are_counted_and_never_good(fake, what, name, message):
    found = seen(fake(failing(4, what)), num_warm_up=0, slos=parse_slos(["ttft.p95=1000s"]))
    (serving,) = found.records[0].serving
    client = serving.client
    assert (serving.num_requests, client.num_failed) == (9, 3)
    ((failure),) = client.failures
    assert (failure.name, failure.num_requests) == (name, 3)
    assert tells(failure.message, message)
    assert serving.good_share.value == 9 / 12


def test_a_request_that_takes_too_long(fake):
    async def never(asked, number):
        yield OPENING
        await asyncio.sleep(60)

    found = seen(fake(failing(6, never)), num_warm_up=0, timeout_s=0.2)
    assert [each.name for each in client_of(found).failures] == ["timeout"]


def test_a_server_that_goes_ends_the_load(fake):
    servers = []

    async def goes(asked, number):
        if number == 5:
            servers[0]._loop.call_soon(servers[0]._server.close)
        yield OPENING + chunk(text()) + chunk(usage(1, 1) + DONE) + END
        yield b""  # and the connection closes

    servers.append(fake(goes))
    found = seen(servers[0], load=Load(400, *LENGTHS, batch=4), num_warm_up=0)
    client = client_of(found)
    assert found.why_ended == client.why_ended == "the server is gone (connection refused)"
    assert found.signal is None
    assert client.num_unsent > 300


def test_two_servers_take_turns_and_get_the_same_requests(fake):
    order = []

    def telling(which):
        async def generate(asked, number):
            order.append(which)
            async for part in answer(asked, number):
                yield part

        return fake(generate)

    servers = telling("A"), telling("B")
    found = seen(*servers, load=Load(1, *LENGTHS, batch=1), num_warm_up=0, num_rounds=5)
    assert "".join(order[2:]) == "ABBAABBAAB"  # after the probes
    own, other = ([each["prompt"] for each in one.asked[1:]] for one in servers)
    assert own == other
    assert len({tuple(each) for each in own}) == 5
    ratios = {each.metric: each for each in found.ratios}
    assert ratios["output tokens/s"].num_rounds == 5
    assert ratios["output tokens/s"].ratio.low is not None
    assert client_of(found).num_rounds == 5
    assert servers[1].keys[-1] == "bearer key 1"


def test_what_a_server_refuses_is_left_out(fake):
    async def no_eos(asked, number):
        if "ignore_eos" in asked:
            yield error(400, "unknown field ignore_eos")
            return
        async for part in answer(asked, number):
            yield part

    server = fake(no_eos)
    seen(server, num_warm_up=0)
    assert len(server.asked) == 2 + 12


MISTAKES = [
    (lambda fake: fake(models=("a", "b")), "2 models a b"),
    (lambda fake: fake(models=("unknown",)), "tokens unknown"),
    (lambda fake: fake(failing(1, too_many)), "none 3 HTTP 429 queue full"),
]


@pytest.mark.parametrize(("make", "line"), MISTAKES)
def test_a_server_that_cannot_be_measured(fake, make, line):
    server = make(fake)
    with pytest.raises(UserError) as caught:
        seen(server)
    assert str(caught.value).startswith(server.url)
    assert tells(str(caught.value), line)
