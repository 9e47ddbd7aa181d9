"""Requests and their answers as observers see them: log lines, and OpenTelemetry spans.

Lines go to stderr, as JSON for machines or as text, without prompts unless asked for. Names and
attributes of spans are those of vLLM's `SpanAttributes`; those of usage and of requests are of
OpenTelemetry's semantic conventions for generative AI.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, Literal, TextIO
from urllib.parse import urlsplit

import msgspec

from expertlane.errors import UserError
from expertlane.printable import printable
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.spec.sampling import SamplingParams
from expertlane.version import __version__

GENERATED = "expertlane.generated"  # in a scope: the outputs of a request


@dataclass(frozen=True)
class Generated:
    """The outputs of a request for text.

    Attributes:
        request_id: the id that the client got.
        outputs, params: [num_prompts × num_choices].
    """

    request_id: str
    outputs: Sequence[RequestOutput]
    params: Sequence[SamplingParams]
    num_choices: int
    is_stream: bool


@dataclass(frozen=True)
class Exchange:
    """A request, and its answer once that has ended.

    Attributes:
        path: path of the route; `none` where there is no such route.
        client: the address that it came from.
        status: 499 where the client went before there was an answer.
        generated: its outputs; None where no text was asked for, or none was given.
    """

    method: str
    path: str
    client: str
    status: int
    seconds: float
    raw_headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    generated: Generated | None

    @property
    def headers(self) -> dict[str, str]:
        """The request's headers; names in lower case."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers}


Observer = Callable[[Exchange], None]


# Asked for often, by probes, Prometheus and pages; written down only where they fail.
_QUIET = frozenset({"/health", "/ping", "/metrics", "/load", "/live", "/scale"})
_MOST_WAITING = 10_000  # lines
_MOST_ID = 128  # characters of a client's own id
_CLOSE_S = 2.0
_LEVELS = {"error": "error", "end": "error", "recovery": "warning"}  # of events


class RequestLog:
    """Writes in a thread of its own, so that a slow reader holds up no request.

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
        if own := exchange.headers.get("x-request-id"):
            facts["client_request_id"] = own[:_MOST_ID]
        if exchange.generated is not None:
            facts |= self._of_text(exchange.generated)
        return facts

    def _of_text(self, generated: Generated) -> dict[str, Any]:
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
            "finish_reasons": [finish_reason(each) for each in outputs],
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


def finish_reason(output: RequestOutput) -> str:
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


SPAN = "llm_request"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-"


def is_configured(endpoint: str | None) -> bool:
    """Whether traces are to be exported, by the option or OpenTelemetry's variables."""
    return endpoint is not None or any(os.environ.get(name) for name in _ENDPOINTS)


class Tracing:
    """Makes a span for each sequence of a request, once the request has ended.

    Args:
        provider: OpenTelemetry's `TracerProvider`; it samples and exports.
    """

    def __init__(self, provider: Any, model: str) -> None:
        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("expertlane", __version__)

    def __call__(self, exchange: Exchange) -> None:
        """Trace a request for text; others have no spans."""
        generated = exchange.generated
        if generated is None:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(exchange.headers)
        for place, (output, params) in enumerate(
            zip(generated.outputs, generated.params, strict=True)
        ):
            self._span(parent, exchange, generated, place, output, params)

    def close(self) -> None:
        """Export the spans still queued."""
        self._provider.shutdown()

    def _span(
        self,
        parent: Any,
        exchange: Exchange,
        generated: Generated,
        place: int,
        output: RequestOutput,
        params: SamplingParams,
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        offset_ns = time.time_ns() - time.perf_counter_ns()
        ended_s = time.perf_counter()
        if output.e2e_s is not None:
            ended_s = output.arrival_s + output.e2e_s
        several = f"-{place}" if len(generated.outputs) > 1 else ""
        attributes = {
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": f"{generated.request_id}{several}",
            "gen_ai.request.n": generated.num_choices,
            "http.response.status_code": exchange.status,
        } | attributes_of(output, params)
        span = self._tracer.start_span(
            SPAN,
            context=parent,
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=int(1e9 * output.arrival_s) + offset_ns,
        )
        if output.finish_reason is FinishReason.ERROR or exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR, output.error))
        span.end(int(1e9 * ended_s) + offset_ns)


def attributes_of(output: RequestOutput, params: SamplingParams) -> dict[str, Any]:
    """The span attributes of a sequence: parameters, tokens, seconds; without unknown ones."""
    times, scheduled_s = output.token_times_s, output.scheduled_s
    found: dict[str, Any] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.completion_tokens": len(output.token_ids),
        "gen_ai.usage.cached_tokens": output.num_cached_tokens,
        "gen_ai.response.finish_reasons": [finish_reason(output)],
        "gen_ai.latency.time_in_queue": scheduled_s,
        "gen_ai.latency.time_to_first_token": output.ttft_s,
    }
    if times:
        found["gen_ai.latency.e2e"] = times[-1]
        found["gen_ai.latency.time_in_model_decode"] = times[-1] - times[0]
        if scheduled_s is not None:
            found["gen_ai.latency.time_in_model_prefill"] = times[0] - scheduled_s
            found["gen_ai.latency.time_in_model_inference"] = times[-1] - scheduled_s
    return {name: value for name, value in found.items() if value is not None}


def start_tracing(endpoint: str | None, model: str) -> Tracing:
    """Export spans by OTLP, by `endpoint` and OpenTelemetry's variables.

    Raises:
        UserError: OpenTelemetry is not installed, or the protocol is not known.
    """
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "")
    protocol = protocol or "http/protobuf"
    if protocol not in ("http/protobuf", "grpc"):
        raise UserError(f"{_PROTOCOLS[1]} is {protocol!r}; valid: http/protobuf, grpc")
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(endpoint, protocol)
    except ImportError as error:
        kind = "grpc" if protocol == "grpc" else "http"
        raise UserError(
            f"traces need {error.name}, which is not installed: {_INSTALL}{kind}"
        ) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "expertlane"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, model)


def _exporter(endpoint: str | None, protocol: str) -> Any:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    if endpoint is not None and urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return Http(endpoint=endpoint)
