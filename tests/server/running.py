"""Servers in threads of the test's own process."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai

from engine.ranks.processes import wait_until
from engine.stub_runner import StubEngine, letters
from expertlane.engine.llm import LLM
from expertlane.server.run import Running, bind, serve
from expertlane.server.setup import ServedModel, ServerOptions
from expertlane.spec.sampling import SamplingParams

PATIENCE_S = 120.0  # of what takes a second on a quiet machine
PROMPTS: tuple[str | list[int], ...] = ("the thing", "a", [5, 6, 7], "thing the thing the")
MESSAGES = ({"role": "system", "content": "the"}, {"role": "user", "content": "thing"})
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = {"prompt": [1, 2, 3], "max_tokens": 50, "temperature": 0}
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=12, logprobs=2)


class ServerInThread:
    """A server at a port, by default a free one.

    Attributes:
        url: without `/v1`.
        error: what `serve` raised.
    """

    def __init__(
        self,
        model: ServedModel,
        options: ServerOptions | None = None,
        check_ranks: Callable[[], None] = lambda: None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.error: Exception | None = None
        self.running: Running | None = None
        bound = bind(host, port)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        started = threading.Event()

        def on_start(running: Running) -> None:
            self.running = running
            started.set()

        def run() -> None:
            try:
                serve(
                    model,
                    options or ServerOptions(),
                    bound,
                    check_ranks=check_ranks,
                    on_start=on_start,
                    takes_signals=False,
                )
            except Exception as error:
                self.error = error
            finally:
                bound.close()

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert started.wait(PATIENCE_S), "it did not start"

    @property
    def service(self) -> Any:
        assert self.running is not None
        return self.running.service

    @property
    def live(self) -> Any:
        assert self.running is not None
        return self.running.live

    def post(self, body: Any, path: str = "/v1/completions", **headers: Any) -> httpx.Response:
        """Send a body: a value, or what is JSON already."""
        how = "content" if isinstance(body, str | bytes) else "json"
        given = {"Content-Type": "application/json"} | headers
        url = f"{self.url}{path}"
        return httpx.post(url, headers=given, timeout=PATIENCE_S, **{how: body})

    def ask(self, **more: Any) -> httpx.Response:
        """Ask for a completion, `LONG` but for what is given."""
        return self.post(LONG | more)

    def openai(self) -> openai.OpenAI:
        """A client of the openai package."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S
        )

    def tell_to_end(self) -> None:
        assert self.running is not None
        self.running.loop.call_soon_threadsafe(self.running.end)

    def join(self) -> None:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "it did not end"

    def stop(self) -> None:
        if self.thread.is_alive():
            self.tell_to_end()
        self.join()


@contextmanager
def serving(
    llm: LLM, *given: Any, options: ServerOptions | None = None, **more: Any
) -> Iterator[Any]:
    """A server of an LLM's ranks, which must end without an error.

    Args:
        given, more: further arguments of `ServedModel`.
    """
    model = ServedModel("tiny", llm.engine, llm.limits, *given, **more)
    server: Any = ServerInThread(model, options, check_ranks=llm.check_ranks)
    server.llm = llm
    try:
        yield server
    finally:
        server.stop()
    assert server.error is None


class StubServer(ServerInThread):
    """A server of a `StubEngine`, whose steps can be held up.

    Args:
        is_held: it makes no step before the gate is set.

    Attributes:
        gate: steps go on while it is set.
        closes_at: the number of steps after which the gate closes, once; None to leave it.
        step_s: how long one takes.
    """

    def __init__(
        self,
        options: ServerOptions | None = None,
        *,
        is_held: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        **engine: Any,
    ) -> None:
        self.step_s = 0.0
        self.closes_at: int | None = None
        self.gate = threading.Event()
        if not is_held:
            self.gate.set()
        self.engine = StubEngine(tokenizer=letters(), **engine)
        self.engine.runner.before = self._pass_gate
        model = ServedModel("stub", self.engine, self.engine.limits, letters())
        super().__init__(model, options, host=host, port=port)

    def _pass_gate(self) -> None:
        if self.engine.runner.num_steps == self.closes_at:
            self.closes_at = None
            self.gate.clear()
        assert self.gate.wait(PATIENCE_S), "the gate stayed closed"
        time.sleep(self.step_s)

    def let(self, num_steps: int) -> None:
        """Let so many more steps go on; the next one waits at the gate."""
        self.closes_at = self.engine.runner.num_steps + num_steps
        self.gate.set()

    def is_held(self) -> bool:
        """Whether the steps that were let go on are over."""
        return not self.gate.is_set()

    def end_held(self) -> None:
        """End it while a step waits at the gate, which no drain outlasts."""
        assert self.running is not None
        assert self.is_held()
        self.tell_to_end()
        assert wait_until(lambda: self.running.server.should_exit)
        self.gate.set()
        self.join()

    def stop(self) -> None:
        self.closes_at = None
        self.gate.set()
        super().stop()


def events_in(text: str | bytes) -> list[Any]:
    """The JSON of each event in a stream, or in a part of it."""
    text = text.decode() if isinstance(text, bytes) else text
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


def is_idle(server):
    return server.engine.is_idle and server.engine.num_blocks_used() == 0


def held(server, **more):
    """A stream whose request runs, while the gate is closed."""
    server.gate.clear()
    connection = Stream(server, **more)
    assert wait_until(lambda: server.engine.scheduler.num_running == 1)
    return connection


class Stream:
    """A connection that reads as much as it wants."""

    def __init__(self, server, **more):
        body = json.dumps(LONG | {"stream": True} | more).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
        self.socket.sendall(head.encode() + body)

    def read_until(self, text):
        found = b""
        while text not in found:
            part = self.socket.recv(4096)
            assert part, found
            found += part
        return found

    def close(self):
        self.socket.close()
