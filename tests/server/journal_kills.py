"""`expertlane serve --journal` killed again and again under load; clients come back for the rest.

Between two kills of it a rank is killed too: while it serves, perhaps right before it is killed
itself, or while it starts. Eight clients ask for completions and chats, mostly streams.
Every event has to have the next number, whichever process sends it. When all is answered, what came
is held against `LLM.generate` on one rank in float32. From the repository's root:

    PYTHONPATH=src:tests python -m server.journal_kills --kills 50
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import torch

from engine.model.chat_checkpoint import save_chat_checkpoint
from expertlane.engine.llm import LLM
from expertlane.spec.sampling import Structured
from server.front import KEPT, Front, free_port
from server.soak import TEMPLATE
from server.soak_client import SOAK_S, ClientAnswer
from server.soak_judge import Arbiter, Judge
from server.soak_requests import DrawnRequest, draw, right_answers

NUM_CLIENTS = 8
PART = 10  # kills
_LEAST_RUNNING = 3  # requests before a kill, so that there is something to lose
_REGEX = "[a-j ]{40,90}"
_ENDS = ("stop", "stop_token_ids", "ignore_eos")  # that would cut off what has a form
_MOST_POSITIONS = 250  # of the checkpoint's 256
_RETRY_S = 0.05


def drawn(seed: int, number: int) -> DrawnRequest:
    """A longer one than those of the soak, mostly a stream; the same for the same arguments."""
    dice = random.Random(f"{seed} {number}")
    asked = draw(seed, number, is_calm=True)
    while asked.wrong is not None:
        asked = draw(dice.randrange(2**32), number, is_calm=True)
    body = {k: v for k, v in asked.body.items() if k not in ("priority", "stream_options")}
    body["stream"] = dice.random() < 0.9
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    params = asked.params
    if params[0].structured is None:
        most = dice.randrange(40, 120)
        most = min(most, _MOST_POSITIONS - max(map(_num_bytes, asked.prompts)))
        body.pop("min_tokens", None)
        body["max_tokens"] = most
        params = tuple(replace(each, max_tokens=most, min_tokens=0) for each in params)
        if isinstance(body.get("prompt"), str) and len(params) == 1 and dice.random() < 0.5:
            body = {k: v for k, v in body.items() if k not in _ENDS} | {"guided_regex": _REGEX}
            held = {"stop": (), "stop_token_ids": (), "ignore_eos": False}
            params = (replace(params[0], structured=Structured(regex=_REGEX), **held),)
    return replace(asked, params=params, body=body)


def _num_bytes(prompt: Any) -> int:
    """At least as many as it has tokens."""
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(_num_bytes(each["content"]) + 2 if isinstance(each, dict) else 1 for each in prompt)


@dataclass
class Client:
    """Sends one request after another, and comes back to each until it has all of it.

    Attributes:
        answers: by number.
        wrong: a line each.
        counts: events, reconnects and the like.
        num_further: events of requests that were there before the last kill.
    """

    url: str
    http: httpx.AsyncClient
    prefix: str
    answers: dict[int, ClientAnswer] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first_further_s: float | None = None

    def killed(self) -> None:
        """Look for the first token from now on of a request that has some."""
        self.first_further_s = None

    async def ask(self, asked: DrawnRequest) -> None:
        """Have a request answered, whatever it takes."""
        name = f"{self.prefix}-{asked.number}"
        came = self.answers[asked.number] = ClientAnswer()
        taken = StreamSoFar(name, came)
        for attempt in count():
            try:
                if asked.is_stream:
                    await self._stream(asked, taken, attempt)
                else:
                    await self._whole(asked, name, came)
            except httpx.TransportError:
                pass
            if came.is_done or self.wrong:
                break
            self.counts["attempts that failed"] += 1
            await asyncio.sleep(_RETRY_S)
        self.counts["events"] += taken.num_events
        if asked.is_stream and not self.wrong and asked.number % 4 == 0:
            await self._check_again(name, taken)

    async def _whole(self, asked: DrawnRequest, name: str, came: ClientAnswer) -> None:
        answer = await self.http.post(asked.path, json=asked.body, headers={"X-Request-Id": name})
        if answer.status_code in (500, 503):  # it is ending
            return
        came.status, came.is_done = answer.status_code, True
        came.take(answer.json())

    async def _stream(self, asked: DrawnRequest, taken: "StreamSoFar", attempt: int) -> None:
        headers = {"X-Request-Id": taken.name}
        if taken.num_events:
            headers["Last-Event-ID"] = f"{taken.name}:{taken.num_events}"
        method, path, body = "POST", asked.path, asked.body
        if taken.num_events and attempt % 2:
            method, path, body = "GET", f"/v1/requests/{taken.name}/events", None
            del headers["X-Request-Id"]
        had_some = bool(taken.num_events)
        async with self.http.stream(method, path, json=body, headers=headers) as response:
            if response.status_code in (500, 503):
                return
            taken.came.status = response.status_code
            if response.status_code != 200:
                self.wrong.append(f"{taken.name}: {method} {await response.aread()!r}")
                return
            self.counts["reconnects"] += had_some
            async for event in blocks(response):
                problem = taken.take(event)
                if problem is not None:
                    self.wrong.append(f"{taken.name}: {problem}")
                    return
                if had_some and self.first_further_s is None:
                    self.first_further_s = time.monotonic()

    async def _check_again(self, name: str, taken: "StreamSoFar") -> None:
        """All events once more: they have to be the same bytes."""
        try:
            answer = await self.http.get(f"/v1/requests/{name}/events")
        except httpx.TransportError:
            return
        self.counts["read again"] += 1
        # Less than all where it was killed meanwhile.
        if answer.status_code == 200 and not taken.text.startswith(answer.text):
            self.wrong.append(f"{name}: other events than before")


@dataclass
class StreamSoFar:
    """What has come of a stream."""

    name: str
    came: ClientAnswer
    num_events: int = 0
    text: str = ""

    def take(self, event: str) -> str | None:
        """Take an event in; says what is wrong with it."""
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        self.num_events += 1
        if fields["id"] != f"{self.name}:{self.num_events}":
            return f"event {fields['id']} comes as number {self.num_events}"
        self.text += f"{event}\n\n"
        if fields["data"] == "[DONE]":
            self.came.is_done = True
            return None
        self.came.take(json.loads(fields["data"]))
        return None


async def blocks(response: httpx.Response) -> AsyncIterator[str]:
    """Whole events; comments are passed over."""
    rest = ""
    async for part in response.aiter_text():
        *events, rest = (rest + part).split("\n\n")
        for event in events:
            if not event.startswith(":"):
                yield event


@dataclass
class Kill:
    """One kill of the front, in seconds from it on.

    Attributes:
        ready_s: until the next process takes requests.
        further_s: until a client has the next event of a stream that had begun before.
        resumed: requests that the next process went on with.
        rank: when a rank was killed since the kill before: `serving`, `starting` or not at all.
        recoveries: of that process, before it was killed itself.
    """

    after_s: float
    ready_s: float
    further_s: float | None
    resumed: int
    rank: str = ""
    recoveries: int = 0


@dataclass
class Part:
    """Some kills, and what came of the requests meanwhile."""

    kills: list[Kill]
    counts: Counter[str]


async def load(front: Front, url: str, seed: int, number: int, num_kills: int) -> tuple[Any, ...]:
    """Kill the front under load; gives the kills, the requests and the client."""
    dice = random.Random(f"{seed} {number}")
    numbers, asked_of, kills, is_ending = count(number * 100_000), {}, [], False
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=SOAK_S, limits=limits) as http:
        client = Client(url, http, f"part{number}")

        async def work() -> None:
            while not (is_ending or client.wrong):
                asked = drawn(seed, next(numbers))
                asked_of[asked.number] = asked
                await client.ask(asked)

        workers = [asyncio.create_task(work()) for _ in range(NUM_CLIENTS)]
        for nth in range(num_kills):
            after_s, rank = dice.uniform(0.0, 2.0), ("serving", "starting")[nth % 2]
            await asyncio.sleep(after_s)
            recoveries = await _counter(http, "recoveries")
            if rank == "serving":
                assert front.kill_rank(dice)
                await asyncio.sleep(dice.uniform(0.0, 1.5))  # while it is replaced, or after that
                recoveries = await _counter(http, "recoveries")
            while await _metric(http, "requests_running") < _LEAST_RUNNING:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(front.kill)
            client.killed()
            killed_s = time.monotonic()
            starts = asyncio.create_task(asyncio.to_thread(front.start))
            while rank == "starting" and not starts.done():
                await asyncio.sleep(dice.uniform(0.0, 0.5))
                if front.kill_rank(dice):
                    break
            await starts
            ready_s = time.monotonic() - killed_s
            for _ in range(200):
                if client.first_further_s is not None or client.wrong:
                    break
                await asyncio.sleep(0.02)
            # A server is ready before it has resumed all.
            resumed = await _counter(http, "journal_resumed")
            further_s = client.first_further_s
            further_s = None if further_s is None else further_s - killed_s
            kills.append(Kill(after_s, ready_s, further_s, resumed, rank, recoveries))
        is_ending = True
        for worker in workers:
            await worker
    return kills, asked_of, client


async def _counter(http: httpx.AsyncClient, name: str) -> int:
    return await _metric(http, f"{name}_total")


async def _metric(http: httpx.AsyncClient, name: str) -> int:
    lines = (await http.get("/metrics")).text.splitlines()
    values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"expertlane:{name}")]
    assert values, name
    return int(sum(map(float, values)))


def run_part(folder: Path, seed: int, number: int, num_kills: int) -> Part:
    """Some kills, and the judgement.

    Raises:
        AssertionError: a client lost something, had it twice, or had something else.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        options = ("--dtype", "float32", "--journal", str(Path(temporary) / "journal"), *KEPT)
        front = Front(folder, Path(temporary) / "log", *options, port=port)
        front.start()
        url = f"http://127.0.0.1:{port}"
        try:
            kills, asked_of, client = asyncio.run(load(front, url, seed, number, num_kills))
        except BaseException as error:
            front.kill()
            error.add_note(front.said)
            raise
        front.end()
    assert not client.wrong, "\n".join(client.wrong)
    return Part(kills, client.counts + judged(folder, list(asked_of.values()), client.answers))


def judged(
    folder: Path, asked: list[DrawnRequest], answers: dict[int, ClientAnswer]
) -> Counter[str]:
    """Hold answers against those of an undisturbed run.

    Raises:
        AssertionError: one is another.
    """
    with LLM(folder, dtype="float32", num_blocks=4096) as llm:
        right = right_answers(llm, asked)
    judge = Judge(Arbiter(folder))
    for each in asked:
        judge.take(each, answers[each.number], right[each.number])
    judge.check()
    return judge.counts


def table(parts: list[Part]) -> Iterator[str]:
    """What a reader wants to know, in lines."""
    kills = [kill for part in parts for kill in part.kills]
    ranks = Counter(kill.rank for kill in kills)
    yield f"{len(kills)} kills of the front, {sum(k.resumed for k in kills)} requests went on"
    yield (
        f"  ranks killed: {ranks['serving']} serving, {ranks['starting']} starting; "
        f"{sum(kill.recoveries for kill in kills)} recoveries before a kill"
    )
    for name, number in sorted(sum((part.counts for part in parts), Counter()).items()):
        yield f"  {name:24} {number:8,}"
    further = [kill.further_s for kill in kills if kill.further_s is not None]
    for name, values in (
        ("ready again", [kill.ready_s for kill in kills]),
        ("first further event", further),
    ):
        if values:
            yield f"  {name:24} p50 {statistics.median(values):6.2f} s, max {max(values):6.2f} s"
    yield "  none lost, none twice"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny"
        folder.mkdir()
        save_chat_checkpoint(folder, TEMPLATE)
        for begin in range(0, options.kills, PART):
            num_kills = min(PART, options.kills - begin)
            parts.append(run_part(folder, options.seed, len(parts), num_kills))
            print("\n".join(table(parts)), flush=True)


if __name__ == "__main__":
    main()
