"""A client of a soak: sends drawn requests, leaves when it is told to, and keeps what came."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.soak_requests import DrawnRequest

SOAK_S = 300.0  # for anything: the machine may have more to do


@dataclass
class Choice:
    """What came of a choice."""

    text: str = ""
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    num_endings: int = 0


@dataclass
class ClientAnswer:
    """What came of a request.

    Attributes:
        status: None where the client had left before there was one.
        error: the last error's object.
        has_left: whether the client closed the connection before the end.
    """

    status: int | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None
    has_left: bool = False
    is_done: bool = False  # a stream's last event has come

    def take(self, body: dict[str, Any]) -> None:
        """Take in a whole answer, or an event."""
        self.error = body.get("error") or self.error
        self.usage = body.get("usage") or self.usage
        for given in body.get("choices", ()):
            self._take_choice(self.choices.setdefault(given["index"], Choice()), given)

    def _take_choice(self, choice: Choice, given: dict[str, Any]) -> None:
        message = given.get("message") or given.get("delta") or {}
        choice.text += given.get("text") or message.get("content") or ""
        if (tokens := given.get("token_ids")) is not None:
            choice.token_ids = (choice.token_ids or []) + tokens
        if (tokens := given.get("prompt_token_ids")) is not None:
            choice.prompt_token_ids = tokens
        if (logprobs := given.get("logprobs")) is not None:
            entries = logprobs.get("content")
            choice.logprobs += (
                logprobs["token_logprobs"]
                if entries is None
                else [each["logprob"] for each in entries]
            )
        if (reason := given.get("finish_reason")) is not None:
            choice.finish_reason = reason
            choice.num_endings += 1


async def send(client: httpx.AsyncClient, asked: DrawnRequest) -> ClientAnswer:
    """Ask, and wait for the answer or leave before."""
    came = ClientAnswer()
    if asked.is_stream or asked.aborted_after is None:
        await _send(client, asked, came)
        return came
    task = asyncio.create_task(_send(client, asked, came))
    done, _ = await asyncio.wait([task], timeout=asked.aborted_after / 100)
    if not done:
        came.has_left = True
        task.cancel()
    await asyncio.wait([task], timeout=SOAK_S)
    if not task.cancelled():
        task.result()
    return came


async def _send(client: httpx.AsyncClient, asked: DrawnRequest, came: ClientAnswer) -> None:
    async with client.stream("POST", asked.path, json=asked.body) as response:
        came.status = response.status_code
        if not (asked.is_stream and response.status_code == 200):
            came.take(json.loads(await response.aread()))
            return
        number = 0
        async for event in _events(response):
            if number == asked.aborted_after:
                came.has_left = True
                return  # leaving the context closes the connection
            number += 1
            if event == "[DONE]":
                came.is_done = True
            else:
                assert not came.is_done, "an event after the last one"
                came.take(json.loads(event))


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line:
            assert line.startswith("data: "), line
            yield line[6:]
