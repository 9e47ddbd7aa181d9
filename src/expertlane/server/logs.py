"""Log lines of requests and their answers.

Lines go to stderr, as JSON for machines or as text, without prompts unless asked for.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, Literal, TextIO

import msgspec

from expertlane.printable import printable
from expertlane.schedule.request import FinishReason, RequestOutput

GENERATED = "expertlane.generated"  # in a scope: the outputs of a request


@dataclass(frozen=True)
class TextOutputs:
    """The outputs of a request for text.

    Attributes:
        request_id: the id that the client got.
        outputs: [num_prompts × num_choices].
    """

    request_id: str
    outputs: Sequence[RequestOutput]
    num_choices: int
    is_stream: bool


@dataclass(frozen=True)
class Exchange:
    """A request, and its answer once that has ended.

    Attributes:
        path: path of the route; `none` where there is no such route.
        client: the address that it came from.
        status: 499 where the client went before there was an answer.
        client_request_id: its header `X-Request-Id`; empty without.
        generated: its outputs; None where no text was asked for, or none was given.
    """

    method: str
    path: str
    client: str
    status: int
    seconds: float
    client_request_id: str
    generated: TextOutputs | None


Observer = Callable[[Exchange], None]


# Asked for often, by probes, Prometheus and pages; written down only where they fail.
_QUIET = frozenset({"/health", "/ping", "/metrics", "/load", "/live", "/scale"})
_MOST_WAITING = 10_000  # lines
_MOST_ID = 128  # characters of a client's own id
_CLOSE_S = 2.0
_LEVELS = {"error": "error", "end": "error", "recovery": "warning"}  # of events


class RequestLog:
    """The log of requests; a thread of its own writes it, so that a slow reader delays no request.

    Args:
        decode: turns a prompt's token ids into text: prompts and outputs are then written too;
            None to write neither.
    """

    def __init__(
        self,
        form: Literal["text", "json"],
        model: str,
        *,
        decode: Callable[[list[int]], str] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._form, self._model, self._decode = form, model, decode
        self._stream = sys.stderr if stream is None else stream
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, exchange: Exchange) -> None:
        """Write a request's line."""
        if exchange.path in _QUIET and exchange.method != "POST" and exchange.status < 400:
            return
        facts = self._facts(exchange)
        self._put(facts, "error" if exchange.status >= 500 else "info", _line(facts))

    def event(self, kind: str, text: str) -> None:
        """Write an event of the server."""
        self._put({"event": kind, "text": text}, _LEVELS.get(kind, "info"), f"{kind}: {text}")

    def close(self) -> None:
        """Write the lines still queued, within a bounded time."""
        self._lines.put(None)
        self._thread.join(_CLOSE_S)

    def _put(self, facts: dict[str, Any], level: str, line: str) -> None:
        if self._lines.qsize() >= _MOST_WAITING:
            self._num_lost += 1
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._form == "json":
            if self._num_lost:
                facts["num_lines_lost"], self._num_lost = self._num_lost, 0
            line = msgspec.json.encode({"time": now, "level": level} | facts).decode()
        else:
            line = f"{now} {printable(line)}"
        self._lines.put(line)

    def _facts(self, exchange: Exchange) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "event": "request",
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status,
            "duration_s": round(exchange.seconds, 6),
            "client": exchange.client,
        }
        if exchange.client_request_id:
            facts["client_request_id"] = exchange.client_request_id[:_MOST_ID]
        if exchange.generated is not None:
            facts |= self._of_text(exchange.generated)
        return facts

    def _of_text(self, generated: TextOutputs) -> dict[str, Any]:
        outputs = generated.outputs
        facts: dict[str, Any] = {
            "request_id": generated.request_id,
            "model": self._model,
            "stream": generated.is_stream,
            "n": generated.num_choices,
            "prompt_tokens": sum(
                len(each.prompt_token_ids) for each in outputs[:: generated.num_choices]
            ),
            "cached_tokens": sum(each.num_cached_tokens for each in outputs),
            "completion_tokens": sum(len(each.token_ids) for each in outputs),
            "queue_s": _rounded(min, (each.scheduled_s for each in outputs)),
            "ttft_s": _rounded(min, (each.ttft_s for each in outputs)),
            "tpot_s": _rounded(max, (each.tpot_s for each in outputs)),
            "finish_reasons": [_finish_reason(each) for each in outputs],
            "preemptions": sum(each.num_preemptions for each in outputs),
        }
        if self._decode is not None:
            facts["prompts"] = [
                self._decode(each.prompt_token_ids) for each in outputs[:: generated.num_choices]
            ]
            facts["outputs"] = [each.text for each in outputs]
        return facts

    def _write(self) -> None:
        is_open = True
        while is_open:
            lines = [self._lines.get()]
            try:
                while len(lines) < 1000:
                    lines.append(self._lines.get_nowait())
            except Empty:
                pass
            is_open = None not in lines
            text = "".join(f"{line}\n" for line in lines if line is not None)
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more
                return


def _finish_reason(output: RequestOutput) -> str:
    """Finish reason of an ended output; `abort` if the client left, or its time was up."""
    reason = output.finish_reason
    return "abort" if reason in (None, FinishReason.CANCELLED) else str(reason)


def _rounded(
    choose: Callable[[list[float]], float], values: Iterable[float | None]
) -> float | None:
    known = [value for value in values if value is not None]
    return round(choose(known), 6) if known else None


def _line(facts: dict[str, Any]) -> str:
    """A request's line for people."""
    parts = [f"{facts['method']} {facts['path']} {facts['status']} in {facts['duration_s']:.3f} s"]
    if "request_id" in facts:
        parts += [
            facts["request_id"],
            f"{facts['prompt_tokens']} + {facts['completion_tokens']} tokens",
            *(
                f"{name} {1e3 * facts[key]:.1f} ms"
                for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
                if facts[key] is not None
            ),
            "/".join(dict.fromkeys(str(each) for each in facts["finish_reasons"])),
        ]
        parts += [f"{name} {facts[name]!r}" for name in ("prompts", "outputs") if name in facts]
    return ", ".join(part for part in parts if part)
