"""Streams of completions from one process that only counts bytes: it takes little of the machine.

Every stream has a connection, on which one request follows another. A time to first token ends
with the first event of an answer.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import uvloop

TIMEOUT_S = 600.0
_LAST = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        num_streams: requests at once.
        num_requests: in all.
        prompt_len, output_len: tokens.
        vocab_size: prompts are drawn from.
    """

    num_streams: int
    num_requests: int
    prompt_len: int
    output_len: int
    vocab_size: int


@dataclass
class Taken:
    """What a load took.

    Attributes:
        seconds: from the first request to the last answer's end.
        ttft_s, tpot_s: of each request.
    """

    num_tokens: int
    seconds: float = 0.0
    num_bytes: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


class _Stream(asyncio.Protocol):
    """One connection; answers end with `_LAST`."""

    def __init__(self, host: str, bodies: list[bytes], taken: Taken, output_len: int) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._host, self._bodies, self._taken = host, bodies, taken
        self._output_len = output_len
        self._began_s = self._first_s = 0.0
        self._end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._taken.num_bytes += len(data)
        if not self._first_s:
            if self._end == b"" and not data.startswith(b"HTTP/1.1 200"):
                self._fail(data[:300].decode(errors="replace"))
                return
            if b"data:" in data:
                self._first_s = time.perf_counter()
        # An answer is over with its last chunk, which is empty.
        self._end = (self._end + data)[-len(_LAST) - 16 :]
        if self._end.endswith(b"0\r\n\r\n") and _LAST in self._end:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self._fail(f"the connection was closed: {error}")

    def _fail(self, text: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(text))
        self._transport.close()

    def _ask(self) -> None:
        if not self._bodies:
            self.ended.set_result(None)
            self._transport.close()
            return
        body = self._bodies.pop()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._first_s, self._end = 0.0, b""
        self._began_s = time.perf_counter()
        self._transport.write(head.encode() + body)

    def _finish(self) -> None:
        now_s = time.perf_counter()
        self._taken.ttft_s.append(self._first_s - self._began_s)
        if self._output_len > 1:
            self._taken.tpot_s.append((now_s - self._first_s) / (self._output_len - 1))
        self._ask()


def run_load(url: str, model: str, load: Load, seed: str) -> Taken:
    """Send it, greedily and past any end token.

    Args:
        url: of the server, without a path.

    Raises:
        ConnectionError: a request was refused or cut off.
        TimeoutError: it takes too long.
    """
    draw = random.Random(seed)
    bodies = [
        json.dumps(
            {
                "model": model,
                "prompt": [draw.randrange(300, load.vocab_size) for _ in range(load.prompt_len)],
                "max_tokens": load.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        for _ in range(load.num_requests)
    ]
    return uvloop.run(_run(url, bodies, load))


async def _run(url: str, bodies: list[bytes], load: Load) -> Taken:
    at = urlsplit(url)
    taken = Taken(load.num_requests * load.output_len)
    began_s = time.perf_counter()
    loop = asyncio.get_running_loop()
    connections = [
        await loop.create_connection(
            lambda: _Stream(at.netloc, bodies, taken, load.output_len), at.hostname, at.port
        )
        for _ in range(load.num_streams)
    ]
    await asyncio.wait_for(asyncio.gather(*(each.ended for _, each in connections)), TIMEOUT_S)
    taken.seconds = time.perf_counter() - began_s
    if len(taken.ttft_s) != load.num_requests:
        raise ConnectionError(f"{len(taken.ttft_s)} answers of {load.num_requests} came")
    return taken
