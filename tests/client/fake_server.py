"""A server of the OpenAI API that does as a test says, also what no good server does."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

HEAD = b"HTTP/1.1 %d OK\r\nContent-Type: %s\r\n"
JSON, EVENTS = b"application/json", b"text/event-stream"
Parts = AsyncIterator[bytes]


class Fake:
    """A server in a thread, at a free port.

    Args:
        generate: gets the reader's JSON and the number of the request; gives an answer's bytes,
            after which the connection is closed, or stays open where they say their length.
        metrics: gives the answer of its /metrics; None for none.

    Attributes:
        asked: the JSON of all requests for text, in their order.
        keys: the Authorization of each.
        others: routes that were asked for, with their methods, but those of metrics.
    """

    def __init__(
        self,
        generate: Callable[[dict[str, Any], int], Parts] | None = None,
        models: tuple[str, ...] = ("paper-tiny",),
        metrics: Callable[[], bytes] | None = None,
    ) -> None:
        self.metrics = metrics
        self.others: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._generate = generate or answer
        self._models = models
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._started.wait(30)
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for writer in self._writers:  # one whose client reads no more would stay open
            writer.transport.abort()
        await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        route = first.split()[1]
        if route == "/metrics" and self.metrics is not None:
            writer.write(self.metrics())
            return True
        if not route.endswith("/completions"):
            self.others.append(" ".join(first.split()[:2]))
            writer.write(self._about(route))
            return True
        self.asked.append(json.loads(body))
        self.keys.append(headers.get("authorization", ""))
        stays_open = False
        async for part in self._generate(self.asked[-1], len(self.asked) - 1):
            writer.write(part)
            await writer.drain()
            stays_open = part.endswith(END) or b"Content-Length" in part
        return stays_open

    def _about(self, route: str) -> bytes:
        if route == "/v1/models":
            cards = [{"id": name, "owned_by": "fake"} for name in self._models]
            return whole({"object": "list", "data": cards})
        return whole({"version": "1.2"}) if route == "/version" else whole({}, 404)


@contextmanager
def fakes(kind: type[Fake] = Fake) -> Iterator[Callable[..., Any]]:
    """What makes such servers; all are ended."""
    made: list[Fake] = []

    def make(*given: Any, **more: Any) -> Fake:
        made.append(kind(*given, **more))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            each.stop()


END = b"0\r\n\r\n"


def whole(value: Any, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    return HEAD % (status, JSON) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def page(text: str, status: int = 200) -> bytes:
    """A page of metrics."""
    body = text.encode()
    return HEAD % (status, b"text/plain") + b"Content-Length: %d\r\n\r\n" % len(body) + body


def error(status: int, message: str = "no") -> bytes:
    return whole({"error": {"message": message, "type": "any", "param": None}}, status)


def event(value: Any) -> bytes:
    data = value if isinstance(value, str) else json.dumps(value)
    return f"data: {data}\n\n".encode()


def text(word: str = "a", reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": word, "finish_reason": reason}], "usage": None})


def usage(num_prompt: int, num_output: int, **more: Any) -> bytes:
    counts = {"prompt_tokens": num_prompt, "completion_tokens": num_output} | more
    return event({"choices": [], "usage": counts})


OPENING = HEAD % (200, EVENTS) + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = event("[DONE]")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer(asked: dict[str, Any], number: int) -> Parts:
    """All tokens that were asked for."""
    num = asked["max_tokens"]
    yield OPENING
    for _ in range(num):
        yield chunk(text())
    yield chunk(usage(len(asked["prompt"]), num) + DONE) + END
