"""A soak with hostile clients: what ordinary clients lose, and how much longer they wait.

    PYTHONPATH=src:tests python -m server.hostile_soak --minutes 30

One server with a journal. Ordinary clients stream greedy completions all the time. In the second
and the last quarter of the time hostile clients send what costs most: bodies of `hostile.py`,
grammars that grow, headers and trailers without end, silent connections, streams that nobody
reads, names of other sites. Prints one JSON line: attacks, the ordinary clients' requests and
latencies with and without hostile clients, what was wrong with them, and the server's growth.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from engine.model.chat_checkpoint import save_chat_checkpoint
from expertlane.engine.llm import LLM
from expertlane.spec.sampling import SamplingParams
from server.hostile import COMPLETIONS, TOO_MUCH
from server.soak import TEMPLATE, serving

NUM_CLIENTS, NUM_HOSTILE, NUM_PROMPTS, NUM_TOKENS = 4, 4, 16, 24
NUM_PARTS = 4  # of the time: without hostile clients, with them, and so on
PATIENCE_S = 120.0
LAYOUT = "dp=2,ep=2"
PAUSE_S = 0.05  # of a client, between two requests
HOSTILE_S = 0.2  # of a hostile one
GRAMMARS = (
    {"regex": "(a{1000}){1000}"},
    {
        "grammar": "start: A\n"
        + "\n".join(f"{chr(65 + n)}: {chr(66 + n)} {chr(66 + n)}" for n in range(20))
        + '\nU: "a"'
    },
    {
        "guided_json": {
            "type": "object",
            "properties": {f"p{n}": {"type": "string"} for n in range(1000)},
        }
    },
)


@dataclass
class Seen:
    """What ordinary clients saw in one kind of part.

    Attributes:
        seconds: of each request, to its end.
        wrong: requests by what was wrong with them.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)


async def ordinary(
    client: httpx.AsyncClient, prompt: list[int], right: list[int], seen: Seen
) -> None:
    """Send one request, and compare its tokens with those that the model gives on one rank."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    began_s, token_ids, is_done = time.perf_counter(), [], False
    try:
        async with client.stream("POST", COMPLETIONS, json=body) as answer:
            if answer.status_code != 200:
                seen.wrong[f"status {answer.status_code}"] += 1
                return
            async for line in answer.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        token_ids += choice["token_ids"]
    except httpx.HTTPError as error:
        seen.wrong[type(error).__name__] += 1
        return
    if not is_done:
        seen.wrong["no end"] += 1
    elif token_ids != right:
        seen.wrong["other tokens"] += 1
    seen.seconds.append(time.perf_counter() - began_s)


async def raw(port: int, *parts: bytes, waits_s: float = 0.0) -> None:
    """Send bytes on a new connection, and leave the answer unread."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        await asyncio.sleep(waits_s)
    finally:
        writer.close()


def attacks(
    client: httpx.AsyncClient, port: int, dice: random.Random
) -> list[Callable[[], Awaitable[object]]]:
    """The attacks of a hostile client; each call is one attack."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    json_type = {"Content-Type": "application/json"}
    bodies = {}

    async def body() -> None:
        name = dice.choice([*TOO_MUCH])
        if name not in bodies:
            path, make, _ = TOO_MUCH[name]
            made = make()
            bodies[name] = path, (made if isinstance(made, str) else json.dumps(made)).encode()
        path, data = bodies[name]
        await client.post(path, content=data, headers=json_type)

    async def grammar() -> None:
        await client.post(
            COMPLETIONS, json={"prompt": "a", "max_tokens": 4} | dice.choice(GRAMMARS)
        )

    async def stop_strings() -> None:
        stop = ["a" * 4096] * 64
        await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 8, "stop": stop})

    async def another_site() -> None:
        given = {"Host": "evil.example", "Origin": "http://evil.example"}
        await client.post("/scale", json={"layout": "tp=1"}, headers=given)

    async def unread() -> None:
        asked = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True}).encode()
        await raw(port, head + b"Content-Length: %d\r\n\r\n%b" % (len(asked), asked), waits_s=2.0)

    return [
        body,
        grammar,
        stop_strings,
        another_site,
        unread,
        lambda: raw(port, head + b"X-A: " + b"b" * 100_000),
        lambda: raw(port, chunked + b"2\r\n{}\r\n0\r\n", *[b"X-A: " + b"b" * 60_000] * 50),
        lambda: raw(port, head, waits_s=5.0),
        lambda: asyncio.gather(*[raw(port, waits_s=3.0) for _ in range(50)]),
    ]


async def hostile(client: httpx.AsyncClient, port: int, seed: int, done: Counter[str]) -> None:
    """Attack until cancelled."""
    dice = random.Random(seed)
    known = attacks(client, port, dice)
    while True:
        try:
            await dice.choice(known)()
            done["attacks"] += 1
        except (httpx.HTTPError, OSError) as error:
            done[type(error).__name__] += 1
        await asyncio.sleep(HOSTILE_S)


async def soak(
    url: str, minutes: float, right: dict[int, tuple[list[int], list[int]]]
) -> tuple[dict[bool, Seen], Counter[str]]:
    """Run `NUM_PARTS` parts, without and with hostile clients in turns."""
    seen, done, port = {False: Seen(), True: Seen()}, Counter(), httpx.URL(url).port
    assert port is not None
    limits = httpx.Limits(max_connections=None)

    async def work(client: httpx.AsyncClient, until_s: float, first: int, of_part: Seen) -> None:
        number = first
        while time.monotonic() < until_s:
            await ordinary(client, *right[number % NUM_PROMPTS], of_part)
            number += 1
            await asyncio.sleep(PAUSE_S)

    for part in range(NUM_PARTS):
        is_hostile, until_s = part % 2 == 1, time.monotonic() + minutes * 60 / NUM_PARTS
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
            enemies = [
                asyncio.create_task(hostile(client, port, 100 * part + number, done))
                for number in range(NUM_HOSTILE * is_hostile)
            ]
            async with asyncio.TaskGroup() as clients:
                for number in range(NUM_CLIENTS):
                    clients.create_task(work(client, until_s, number, seen[is_hostile]))
            for each in enemies:
                each.cancel()
            await asyncio.gather(*enemies, return_exceptions=True)
        print(
            f"part {part + 1} of {NUM_PARTS}: {seen[is_hostile].wrong or 'nothing'} lost",
            flush=True,
        )
    return seen, done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny"
        folder.mkdir()
        save_chat_checkpoint(folder, TEMPLATE)
        prompts = [
            [dice.randrange(3, 200) for _ in range(dice.randrange(1, 30))]
            for _ in range(NUM_PROMPTS)
        ]
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        with LLM(folder, dtype="float32") as llm:
            found = llm.generate(prompts, params)
        right = {
            n: (prompt, output.token_ids)
            for n, (prompt, output) in enumerate(zip(prompts, found, strict=True))
        }
        log = Path(temporary) / "log"
        journal = ("--journal", str(Path(temporary) / "journal"))
        with serving(folder, LAYOUT, "float32", journal, log) as server:
            before = server.resident()["front"]
            seen, done = asyncio.run(soak(server.url, options.minutes, right))
            grown = server.resident()["front"] - before
    p99 = {kind: float(np.percentile(each.seconds, 99)) for kind, each in seen.items()}
    print(
        json.dumps(
            {
                "benchmark": "hostile_soak",
                "minutes": options.minutes,
                "attacks": dict(done),
                "ordinary_requests": {
                    "without": len(seen[False].seconds),
                    "with": len(seen[True].seconds),
                },
                "wrong": {"without": dict(seen[False].wrong), "with": dict(seen[True].wrong)},
                "p50_ms": {
                    name: round(1e3 * float(np.median(seen[kind].seconds)), 1)
                    for name, kind in (("without", False), ("with", True))
                },
                "p99_ms": {
                    "without": round(1e3 * p99[False], 1),
                    "with": round(1e3 * p99[True], 1),
                },
                "p99_ratio": round(p99[True] / p99[False], 2),
                "front_grew_MB": round(grown / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
