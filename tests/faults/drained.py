"""Requests of an HTTP server that is told to end by SIGTERM while they run."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil

from expertlane.engine.llm import LLM
from expertlane.server.run import Running, bind, serve
from expertlane.server.service import ServedModel, ServerOptions
from expertlane.spec.sampling import SamplingParams
from faults.planted import Happened
from faults.served import Served

_PATIENCE_S = 120.0
_NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty")
_NUM_BEFORE = 2  # tokens of some request, before it is told to end


def tell_all_to_end() -> None:
    """Send SIGTERM to this process and all below it, as systemd and Slurm do."""
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        process.terminate()


def _body(prompt: list[int], params: SamplingParams) -> dict[str, Any]:
    body = {"prompt": prompt, "stream": True, "return_token_ids": True, "ignore_eos": True}
    body |= {name: getattr(params, name) for name in (*_NAMES, "seed", "max_tokens")}
    return {name: value for name, value in body.items() if value is not None}


class _Clients:
    """One a request; they come together."""

    def __init__(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> None:
        self._requests = requests
        num = len(requests)
        self.served = Served(
            tokens=[[] for _ in range(num)],
            arrivals_s=[[] for _ in range(num)],
            places=[[] for _ in range(num)],
            gaps=[[] for _ in range(num)],
            reasons=[""] * num,
        )
        self.wrong: list[str] = []

    async def run(self, url: str, running: Running, happened: Happened) -> None:
        """Ask for everything, let the server be told to end, and take what comes."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limits) as http:
            clients = [
                asyncio.create_task(self._take(http, number))
                for number in range(len(self._requests))
            ]
            while running.service.num_open < len(clients) or not self._has_begun:
                if any(client.done() for client in clients):
                    break  # too early: it is told below
                await asyncio.sleep(0.002)
            if running.service.num_open < len(clients):
                self.wrong.append(f"{running.service.num_open} requests ran when it was to end")
            tell_all_to_end()
            while not running.service.is_draining:
                await asyncio.sleep(0.001)
            happened.begin()
            refused = await http.post("/v1/completions", json={"prompt": [1], "max_tokens": 1})
            if refused.status_code != 503:
                self.wrong.append(f"a new request had status {refused.status_code}")
            await asyncio.gather(*clients)

    @property
    def _has_begun(self) -> bool:
        return max(map(len, self.served.tokens)) >= _NUM_BEFORE

    async def _take(self, http: httpx.AsyncClient, number: int) -> None:
        body, served = _body(*self._requests[number]), self.served
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.wrong.append(f"request {number}: {await answer.aread()!r}")
                return
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                (choice,) = json.loads(data).get("choices") or [{}]
                for token in choice.get("token_ids") or ():
                    served.tokens[number].append(token)
                    served.arrivals_s[number].append(time.monotonic())
                served.reasons[number] = choice.get("finish_reason") or served.reasons[number]


def serve_and_end(
    llm: LLM, requests: Sequence[tuple[list[int], SamplingParams]], happened: Happened
) -> tuple[Served, list[str]]:
    """What requests bring to clients of a server that ends meanwhile, and what was wrong.

    In the main thread of a process. What is to happen later may, once the server takes no more.
    """
    clients, threads = _Clients(requests), []
    failed: list[str] = []

    def run(running: Running) -> None:
        try:
            asyncio.run(clients.run(f"http://127.0.0.1:{port}", running, happened))
        except Exception as error:
            failed.append(f"a client had {error!r}")
            running.tell_to_drain()

    def on_start(running: Running) -> None:
        llm.on_told_to_end(running.tell_to_drain)
        threads.append(threading.Thread(target=run, args=(running,)))
        threads[0].start()

    model = ServedModel("tiny", llm.engine, llm.limits, watch=llm.watch())
    options = ServerOptions(drain_s=_PATIENCE_S)
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        serve(model, options, bound, check_ranks=llm.check_ranks, on_start=on_start)
    threads[0].join(_PATIENCE_S)
    return clients.served, clients.wrong + failed
