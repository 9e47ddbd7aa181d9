"""OpenTelemetry spans of requests, with the names and attributes of vLLM's.

Source of the names: vLLM's `SpanAttributes`; those of usage and of requests are of OpenTelemetry's
semantic conventions for generative AI.
"""

import os
import time
from typing import Any
from urllib.parse import urlsplit

from expertlane.errors import UserError
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.server.logs import finish_reason
from expertlane.server.observed import Exchange, Generated
from expertlane.spec.sampling import SamplingParams
from expertlane.version import __version__

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
