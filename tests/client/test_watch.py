"""What a server counts itself beside what its client counts: exactly the same, or it is told."""

import asyncio
from dataclasses import replace

import pytest

from client.fake_server import DONE, END, OPENING, answer, chunk, error, fakes, page, text, usage
from expertlane.client import watch
from expertlane.client.connection import Connections, Url
from expertlane.client.prometheus import Gauges
from expertlane.client.run import MeasureOptions, Target, measure
from expertlane.client.server import Form, Server, Vocabulary, alike, flush_caches
from expertlane.client.watch import Sample, ServerSamples, engine_record
from expertlane.progress import Progress
from expertlane.results.engine_record import EngineCounts
from expertlane.spec.workload import LengthRange, Load

LOAD = Load(12, LengthRange(2, 9), LengthRange(1, 5), batch=3)


@pytest.fixture
def fake():
    with fakes() as make:
        yield make


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(watch, "_SETTLED_S", 0.3)
    monkeypatch.setattr(watch, "_STILL_S", 0.02)


class Counting:
    """Counts what it answers, as engines do: rank by rank, in turn.

    Args:
        generate: the answer.
        before: called with the number of each request, before it is counted.
        num_reads: how often its page is read before it answers.
    """

    def __init__(
        self, num_ranks=1, generate=answer, before=lambda counting, number: None, num_reads=0
    ):
        self.ranks = [dict.fromkeys(("prompt", "output", "requests"), 0) for _ in range(num_ranks)]
        self.num_cached, self.num_preempted, self.num_reads = 0, 0, 0
        self.num_running = 0
        self._generate, self._before, self._wanted_reads = generate, before, num_reads

    async def generate(self, asked, number):
        self._before(self, number)
        rank = self.ranks[number % len(self.ranks)]
        self.num_running += 1
        end = self.num_reads + self._wanted_reads if number else 0  # none while it is probed
        while self.num_reads < end:
            await asyncio.sleep(0.001)
        async for part in self._generate(asked, number):
            yield part
        self.num_running -= 1
        rank["prompt"] += len(asked["prompt"])
        rank["output"] += asked["max_tokens"]
        rank["requests"] += 1

    def page(self):
        self.num_reads += 1
        lines = [
            f"vllm:prefix_cache_hits_total {self.num_cached}",
            f"vllm:num_preemptions_total {self.num_preempted}",
        ]
        for i, rank in enumerate(self.ranks):
            label = f'engine="{i}",model_name="<b>"'
            lines += [
                f"vllm:prompt_tokens_total{{{label}}} {rank['prompt']}",
                f"vllm:generation_tokens_total{{{label}}} {rank['output']}",
                f'vllm:request_success_total{{{label},finished_reason="length"}} '
                f"{rank['requests']}",
                f"vllm:num_requests_running{{{label}}} {self.num_running}",
            ]
        return page("\n".join(lines) + "\n")


def counted(fake, counting, load=LOAD, **more):
    server = fake(counting.generate, metrics=counting.page)
    found = measure([Target(Url.parse(server.url))], MeasureOptions([load], 0, **more), Progress())
    return found.records[0].serving[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_warm_up", [0, None, 7])
def test_every_round_agrees_exactly_without_warm_up_and_probe(fake, num_ranks, num_warm_up):
    serving = counted(fake, Counting(num_ranks), num_rounds=3, num_warm_up=num_warm_up)
    engine = serving.engine
    assert len(engine.rounds) == 3
    for each in engine.rounds:
        assert each.engine.num_requests == each.client.num_requests == 12
        assert each.engine.num_prompt_tokens == each.client.num_prompt_tokens
        assert each.engine.num_output_tokens == each.client.num_output_tokens
    assert engine.counts.num_requests == serving.num_requests == 36
    assert engine.counts.num_prompt_tokens == serving.num_prompt_tokens
    assert engine.counts.num_output_tokens == serving.num_output_tokens
    assert (engine.differences, engine.num_others, engine.engine) == ([], 0, "vllm")
    assert list(engine.by_rank) == ["0", "1"][:num_ranks]
    assert sum(each.num_requests or 0 for each in engine.by_rank.values()) == 36


def test_an_engine_that_counts_otherwise_is_told(fake):
    def loses(counting, number):
        if number == 5:
            counting.ranks[0]["output"] -= 1

    engine = counted(fake, Counting(before=loses), num_warm_up=0).engine
    (difference,) = engine.differences
    assert difference.what == "output tokens"
    assert difference.engine == difference.client - 1


def test_other_clients_are_noticed(fake):
    def others(counting, number):
        if number == 5:
            counting.ranks[0]["requests"] += 4
            counting.ranks[0]["prompt"] += 40

    engine = counted(fake, Counting(before=others), num_warm_up=0).engine
    assert engine.num_others == 4
    assert {each.what for each in engine.differences} == {"requests", "prompt tokens"}


def test_preemptions_and_cached_tokens_are_those_of_the_rounds(fake):
    def preempts(counting, number):
        counting.num_preempted += 1
        counting.num_cached += 2

    serving = counted(fake, Counting(before=preempts), num_rounds=2)
    assert serving.num_preemptions == serving.engine.counts.num_preemptions == 24
    assert serving.num_cached_tokens == 48
    assert serving.engine.cached_share == 48 / serving.num_prompt_tokens


def test_an_idle_rank_is_told(fake):
    counting = Counting(2)

    async def first_alone(asked, number):
        async for part in counting.generate(asked, 0):
            yield part

    server = fake(first_alone, metrics=counting.page)
    found = measure([Target(Url.parse(server.url))], MeasureOptions([LOAD], 0), Progress())
    engine = found.records[0].serving[0].engine
    assert engine.work_by_rank["1"] == 0
    assert engine.max_over_mean == pytest.approx(2.0)


def test_requests_that_failed_may_count_or_not(fake):
    """Refused ones never reached the engine; what is cut off has been computed."""

    async def some(asked, number):
        if number % 4 == 3:
            yield error(429, "full")
        elif number % 4 == 2:
            yield OPENING + chunk(text())
        else:
            async for part in answer(asked, number):
                yield part

    engine = counted(fake, Counting(generate=some), num_warm_up=0).engine
    (both,) = engine.rounds
    assert (both.client.num_requests, both.client.num_aborted) == (6, 6)
    assert both.engine.num_requests == 12
    assert both.differences == []
    assert both.engine.num_prompt_tokens == (
        both.client.num_prompt_tokens + both.failed_prompt_tokens
    )


def test_tokens_without_usage_are_not_compared(fake):
    async def silent(asked, number):
        yield OPENING
        for _ in range(asked["max_tokens"]):
            yield chunk(text())
        yield chunk(DONE) + END

    engine = counted(fake, Counting(generate=silent), num_warm_up=0).engine
    (both,) = engine.rounds
    assert both.client.num_output_tokens is None
    assert engine.differences == []


def test_a_server_started_anew_tells_no_counts(fake):
    def anew(counting, number):
        if number == 15:
            counting.ranks[0].update(prompt=0, output=0, requests=0)

    serving = counted(fake, Counting(before=anew), num_warm_up=7)
    assert serving.engine.rounds == ()
    assert serving.engine.counts == EngineCounts()
    assert serving.num_preemptions is None


def test_gauges_over_time(fake, monkeypatch):
    monkeypatch.setattr(watch, "_EVERY_S", 0.01)
    monkeypatch.setattr(watch, "_MOST_SHARE", 1e9)

    counting = Counting(2, num_reads=3)
    gauges = counted(fake, counting, num_rounds=2).engine.gauges
    assert set(gauges.rounds) == {1, 2}
    assert list(gauges.ranks) == ["0", "1"]
    assert max(gauges.ranks["0"].num_running) == 3
    assert max(gauges.total("num_running")) == 6
    assert (gauges.ranks["0"].kv_usage, gauges.most_kv_usage) == ((), None)
    first = [
        time for time, number in zip(gauges.times_s, gauges.rounds, strict=True) if number == 1
    ]
    assert first == sorted(first)


def test_samples_are_bounded(fake, monkeypatch):
    monkeypatch.setattr(watch, "_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "_MOST_SHARE", 1e9)
    monkeypatch.setattr(watch, "_MOST_SAMPLES", 8)

    counting = Counting(num_reads=10)
    serving = counted(fake, counting, num_warm_up=0)
    assert counting.num_reads > 20
    assert len(serving.engine.gauges.times_s) < 8


def test_a_slow_page_is_read_seldom(fake, monkeypatch):
    """A server makes its page in the time in which it would serve."""
    monkeypatch.setattr(watch, "_EVERY_S", 0.0)
    reads = []

    async def read(connections, route):
        reads.append(route)
        await asyncio.sleep(0.02)
        return

    async def sample():
        monkeypatch.setattr(watch, "_read", read)
        async with watch.Watch(None, "/metrics", "vllm").watching():
            await asyncio.sleep(0.5)

    asyncio.run(sample())
    assert 1 <= len(reads) <= 3  # every 0.4 s


@pytest.mark.parametrize(
    "bad",
    [
        lambda: page("", 404),
        lambda: page("vllm:prompt_tokens_total 1", 401),
        lambda: page("nothing known 3\n"),
        lambda: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        lambda: b"garbage\r\n\r\n",
    ],
)
def test_servers_without_metrics_are_measured_all_the_same(fake, monkeypatch, bad):
    monkeypatch.setattr(watch, "_READ_S", 0.2)
    server = fake(metrics=bad)
    found = measure([Target(Url.parse(server.url))], MeasureOptions([LOAD], 0), Progress())
    (serving,) = found.records[0].serving
    assert (serving.engine, serving.num_requests) == (None, 12)


def test_a_page_that_fails_under_way_leaves_the_rest(fake):
    counting = Counting()
    reads = iter(range(1000))
    server = fake(
        counting.generate,
        metrics=lambda: counting.page() if next(reads) < 4 else page("busy", 503),
    )
    found = measure(
        [Target(Url.parse(server.url))], MeasureOptions([LOAD], 0, num_rounds=2), Progress()
    )
    (serving,) = found.records[0].serving
    assert serving.num_requests == 24
    assert serving.engine is None or len(serving.engine.rounds) < 2


def test_samples_with_other_ranks_than_the_latest_are_left_out():
    one, both = {"0": Gauges(1.0)}, {"0": Gauges(2.0), "1": Gauges(3.0)}
    watched = ServerSamples("vllm", samples=[Sample(0.0, one), Sample(0.5, both)])
    gauges = engine_record([None, watched]).gauges
    assert (gauges.rounds, gauges.times_s) == ((2,), (0.5,))
    assert gauges.ranks["1"].num_running == (3.0,)
    assert engine_record([]) is engine_record([None, ServerSamples("vllm")]) is None


def test_all_servers_get_the_same_prompts_in_a_round_and_others_in_another(fake):
    servers = fake(), fake()
    targets = [Target(Url.parse(each.url)) for each in servers]
    measure(targets, MeasureOptions([LOAD], 5, num_rounds=3, num_warm_up=2), Progress())
    one, other = (
        [(each["prompt"], each["max_tokens"]) for each in server.asked[3:]] for server in servers
    )
    assert [sorted(one[at : at + 12]) for at in (0, 12, 24)] == [
        sorted(other[at : at + 12]) for at in (0, 12, 24)
    ]
    rounds = [{tuple(prompt) for prompt, _ in one[at : at + 12]} for at in (0, 12, 24)]
    longer = [{each for each in found if len(each) > 3} for found in rounds]
    assert len(longer[0] | longer[1] | longer[2]) == sum(map(len, longer))


def test_servers_that_tell_other_tokens_draw_from_those_that_all_have():
    form = Form(is_chat=False, as_tokens=True, ignores_eos=True)
    base = Server(None, "a", "", None, Vocabulary(range(10)), form)
    other = replace(base, vocabulary=Vocabulary([3, 4, 5, 99]))
    apart = replace(base, vocabulary=Vocabulary([50]))
    assert [each.vocabulary.token_ids for each in alike([base, other])] == [[3, 4, 5]] * 2
    assert [list(each.vocabulary.token_ids) for each in alike([base, apart])] == [
        list(range(10)),
        [50],
    ]
    assert alike([base, base]) == [base, base]
    assert alike([base]) == [base]


@pytest.mark.parametrize(
    ("routes", "is_done"),
    [
        ({"/flush_cache": 200}, True),
        ({"/flush_cache": 400}, False),  # SGLang, while requests run
        ({"/reset_prefix_cache": 200}, True),
        ({}, False),
    ],
)
def test_caches_are_emptied_before_each_round_where_there_is_a_route(fake, routes, is_done):
    server = fake()
    original = server._about

    def about(route):
        return page("", routes[route]) if route in routes else original(route)

    server._about = about
    asked = MeasureOptions([LOAD], 0, num_rounds=2, flushes_caches=True)
    found = measure([Target(Url.parse(server.url))], asked, Progress())
    flushes = [each for each in server.others if "cache" in each]
    tried = [f"POST {route}" for route in ("/flush_cache", "/reset_prefix_cache")]
    one_round = tried if "/flush_cache" not in routes or not is_done else tried[:1]
    assert flushes == one_round * 2
    assert found.unflushed == (() if is_done else (server.url,))
    measure([Target(Url.parse(server.url))], MeasureOptions([LOAD], 0), Progress())
    assert [each for each in server.others if "cache" in each] == flushes


def test_no_server_is_not_flushed():
    async def flush():
        connections = Connections(Url.parse("http://127.0.0.1:1"), {})
        return await flush_caches(connections)

    assert asyncio.run(flush()) is False


def test_counts_in_the_usage_and_of_the_engine(fake):
    """Where the usage tells cached tokens, that is what counts."""

    async def told(asked, number):
        yield OPENING + chunk(text())
        details = {"prompt_tokens_details": {"cached_tokens": 1}}
        yield chunk(usage(len(asked["prompt"]), 1, **details) + DONE) + END

    serving = counted(fake, Counting(generate=told), num_warm_up=0)
    assert serving.num_cached_tokens == 12


def test_a_checkpoint_without_a_tokenizer_has_as_many_tokens_as_its_configuration_says(tmp_path):
    assert Vocabulary.of_name(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 7}}')
    assert list(Vocabulary.of_name(str(tmp_path)).token_ids) == list(range(7))
    (tmp_path / "config.json").write_text('{"vocab_size": -7}')
    assert Vocabulary.of_name(str(tmp_path)) is None
