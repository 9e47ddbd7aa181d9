"""Servers that a drill strikes: an honest one, and some that lose, alter or lie afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from client.fake_server import (
    DONE,
    END,
    HEAD,
    JSON,
    OPENING,
    Fake,
    chunk,
    error,
    event,
    usage,
    whole,
)
from expertlane.endpoint.faults import FaultOutcome

TOKEN_S = 0.03
HANG_S = 60.0
PAUSE_S = 1.0  # until those that recover do
SIZE = 3  # of chunks


class Stub(Fake):
    """A server that behaves as its name says once it is struck.

    Args:
        mark: a file that strikes it once it is there.
    """

    def __init__(self, behaviour: str, mark: Path | None = None, **more: Any) -> None:
        self.behaviour = behaviour
        self.struck_s: float | None = None
        self._mark = mark
        super().__init__(self._tokens, **more)

    @property
    def since_s(self) -> float:
        """Seconds since it was struck; negative before."""
        if self.struck_s is None and self._mark is not None and self._mark.exists():
            self.strike()
        return -1.0 if self.struck_s is None else time.perf_counter() - self.struck_s

    @property
    def is_struck(self) -> bool:
        return self.since_s >= 0

    def strike(self) -> None:
        self.struck_s = time.perf_counter()
        if self.behaviour in ("dies", "refuses for a while"):
            self._loop.call_soon_threadsafe(self._die)

    def _die(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        if self.behaviour == "refuses for a while":
            self._loop.call_later(PAUSE_S, lambda: asyncio.ensure_future(self._return()))

    async def _return(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**24)

    def _about(self, route: str) -> bytes:
        if route == "/tokenize":
            return whole({"tokens": list(range(500))})
        if route != "/health" or self.behaviour == "has no /health":
            return super()._about(route)
        is_ill = self.is_struck and self.behaviour == "says 503 while well"
        is_ill |= 0 <= self.since_s < PAUSE_S and self.behaviour == "fails for a while"
        status = 503 if is_ill else 200
        return HEAD % (status, JSON) + b"Content-Length: 0\r\n\r\n"

    async def _wait(self) -> None:
        """As long as a token takes, or for the server to go on."""
        await asyncio.sleep(TOKEN_S)
        behaviour = self.behaviour
        if self.is_struck and behaviour == "hangs, and says 200":
            await asyncio.sleep(HANG_S)
        if 0 <= self.since_s < PAUSE_S and behaviour == "recovers":
            await asyncio.sleep(PAUSE_S - self.since_s)

    async def _tokens(self, asked: dict[str, Any], number: int) -> AsyncIterator[bytes]:
        behaviour, num = self.behaviour, asked["max_tokens"]
        is_failing = 0 <= self.since_s < PAUSE_S and behaviour == "fails for a while"
        if is_failing or (self.is_struck and behaviour == "fails"):
            yield error(500, "EngineCore is dead")
            return
        if "has chats alone" in behaviour and "messages" not in asked:
            yield error(404, "Not Found")
            return
        prompt = asked.get("prompt") or asked["messages"][0]["content"].encode()
        truth = [(7 * prompt[0] + 13 * place) % 1000 for place in range(num)]
        yield OPENING
        sent = 0
        while sent < num:
            await self._wait()
            is_down = 0 <= self.since_s < PAUSE_S
            if is_down and behaviour == "cuts streams" and sent:
                return
            if is_down and behaviour == "fails for a while":
                yield chunk(event({"error": {"message": "EngineCore is dead"}})) + END
                return
            own = truth[sent : sent + SIZE]
            late = self.since_s > PAUSE_S / 2 and sent == SIZE
            if late and behaviour == "changes a token":
                own = [*own[:-1], 999]
            if late and behaviour == "ties":
                own = [*own[:-1], 998]
            if not (late and behaviour == "drops a chunk"):
                yield chunk(self._event(own, asked))
            if late and "repeats a chunk" in behaviour:
                yield chunk(self._event(own, asked))
            sent += SIZE
        if not (self.is_struck and behaviour == "has no finish reason"):
            yield chunk(event({"choices": [{"text": "", "finish_reason": "length"}]}))
        counted = num + (self.is_struck and behaviour == "counts wrongly")
        yield chunk(usage(len(prompt), counted) + DONE) + END

    def _event(self, tokens: list[int], asked: dict[str, Any]) -> bytes:
        text = "".join(f" {each}" for each in tokens)
        is_chat = "messages" in asked
        said = {"delta": {"content": text}} if is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **said}
        if asked.get("return_token_ids") and self.behaviour != "tells text alone":
            choice["token_ids"] = tokens
        if asked.get("logprobs"):
            first, second = -0.1, -0.11 if self.behaviour == "ties" else -3.0
            of_chat = {
                "top_logprobs": [{"token": "a", "logprob": each} for each in (first, second)]
            }
            choice["logprobs"] = (
                {"content": [of_chat for _ in tokens]}
                if is_chat
                else {"top_logprobs": [{"a": first, "b": second} for _ in tokens]}
            )
        return event({"choices": [choice | {"finish_reason": None}]})


class Strike:
    """The fault of such a server."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    words = "SIGKILL to rank 1"

    def check(self) -> None:
        pass

    async def strike(self) -> FaultOutcome:
        self._stub.strike()
        return FaultOutcome()
