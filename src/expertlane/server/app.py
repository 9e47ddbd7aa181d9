"""The HTTP interface: routes, the middleware before them, and requests until their answers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from expertlane.server.answers import Answer, Endpoint
from expertlane.server.bodies import BodyLimit, make_bodies_models
from expertlane.server.completions import CHATS, COMPLETIONS
from expertlane.server.errors import ApiError, ErrorBody, bad_field, install_handlers, json_response
from expertlane.server.health import PROBES
from expertlane.server.journal.keeper import JournalKeeper
from expertlane.server.live import LiveFeed, add_live
from expertlane.server.metrics import CONTENT_TYPE
from expertlane.server.middleware import ApiKeys, ExchangeObserver, Heads, Hosts, client_left
from expertlane.server.profiling import add_profiling
from expertlane.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from expertlane.server.scaling import add_scaling
from expertlane.server.service import Service, late
from expertlane.version import __version__

# Of POST: these change nothing.
_COMPUTED = frozenset({COMPLETIONS.path, CHATS.path, "/tokenize", "/detokenize", "/ping"})
_TOKENIZED = 4  # times the longest prompt: clients cut what they have tokenized
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong; `error.param` names it."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer."},
}


def make_app(
    service: Service, live: LiveFeed, journal: JournalKeeper | None = None, *, is_local: bool
) -> FastAPI:
    """An app that answers for a service.

    Args:
        is_local: it is reached by the loopback interface alone.
    """
    options = service.options
    app = FastAPI(
        title="expertlane",
        version=__version__,
        docs_url=None,  # its page would load scripts of other hosts
        redoc_url=None,
        responses=_ERRORS,
    )
    make_bodies_models(app)
    install_handlers(app)
    _add_generation(app, service, journal)
    _add_tokens(app, service)
    _add_state(app, service)
    add_scaling(app, service, live.state)
    add_profiling(app, service)
    add_live(app, live)
    if journal is not None:
        _add_journal(app, service, journal)
    # The last one added comes first.
    app.add_middleware(Heads)
    app.add_middleware(BodyLimit)
    app.add_middleware(ApiKeys, keys=options.api_keys)
    app.add_middleware(
        Hosts,
        allowed=options.allowed_hosts,
        is_local=is_local,
        has_keys=bool(options.api_keys),
        computed=_COMPUTED,
    )
    app.add_middleware(ExchangeObserver, count=service.metrics.on_response, observe=options.observe)
    return app


def _add_generation(app: FastAPI, service: Service, journal: JournalKeeper | None) -> None:
    @app.post(COMPLETIONS.path, response_class=Response)
    async def complete(request: CompletionRequest) -> Response:
        """Continue one or more prompts; whole, or as server-sent events."""
        return _arrival(service, journal, request, COMPLETIONS)

    @app.post(CHATS.path, response_class=Response)
    async def chat(request: ChatRequest) -> Response:
        """Answer in a conversation; whole, or as server-sent events."""
        return _arrival(service, journal, request, CHATS)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Response:
        """The token ids of a text, or of a chat."""
        service.check_model(request.model)
        tokenizer = service.tokenizer("prompt")
        if request.messages is None:
            (tokens,) = await service.encode(
                [request.prompt or ""],
                "prompt",
                add_special_tokens=request.add_special_tokens,
                factor=_TOKENIZED,
            )
        else:
            tokens, _ = await service.encode_chat(
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                add_special_tokens=request.add_special_tokens,
                variables=request.chat_template_kwargs,
            )
        names = [tokenizer.name(each) for each in tokens] if request.return_token_strs else None
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": service.model.max_model_len,
                "tokens": tokens,
                "token_strs": names,
            }
        )

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """Special tokens and chat template, for evaluations that use `/tokenize`."""
        tokenizer, template = service.tokenizer("tokenizer"), service.model.template
        eos = [tokenizer.name(each) for each in sorted(tokenizer.eos_token_ids)]
        own = {"eos_token": eos[0] if eos else None, "bos_token": None, "pad_token": None}
        if template is not None:
            own |= template.special_tokens | {"chat_template": template.source}
        return json_response(own | {"model_max_length": service.model.max_model_len})

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(request.model)
        tokens, size = request.tokens, service.model.limits.vocab_size
        most = _TOKENIZED * service.model.max_model_len
        if len(tokens) > most:
            text = f"tokens holds {len(tokens):,}; at most {most:,} are taken"
            raise bad_field("tokens", text, "context_length_exceeded")
        if (largest := max(tokens, default=0)) >= size:
            text = f"tokens holds {largest}; valid ids: 0 to {size - 1}"
            raise bad_field("tokens", text)
        text = await service.decode(tokens, "tokens")
        return json_response({"prompt": text})


def _add_state(app: FastAPI, service: Service) -> None:
    def model_card() -> dict[str, Any]:
        return {
            "id": service.model.name,
            "object": "model",
            "created": service.created,
            "owned_by": "expertlane",
            "root": service.model.name,
            "parent": None,
            "max_model_len": service.model.max_model_len,
        }

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """Redirect people to the page `/live`."""
        return RedirectResponse("/live")

    @app.get("/v1/models")
    async def models() -> Response:
        """The list of models: the one that is served."""
        return json_response({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model with this name; 404 if another is served."""
        service.check_model(name)
        return json_response(model_card())

    async def health() -> Response:
        """Status 200 and an empty body while requests are answered, else an error."""
        service.check_health()
        return Response()

    for path in PROBES:
        app.get(path)(health)
    app.post("/ping", include_in_schema=False)(health)  # as some platforms ask

    @app.get("/version")
    async def version() -> Response:
        """The version of expertlane."""
        return json_response({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        """The number of requests that have no complete answer yet."""
        return json_response({"server_load": service.num_open})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


class Arrival(Response):
    """The response of a request whose answer is not made yet; ends if the client leaves or is late.

    Making it includes tokenizing the prompt.

    Args:
        make: makes the answer, from the request's scope and its arrival on the loop's clock.
    """

    def __init__(
        self,
        service: Service,
        make: Callable[[Scope, float], Awaitable[Answer]],
        limit_s: float | None = None,
    ) -> None:
        super().__init__()  # unused: `__call__` sends another response
        self._service, self._make, self._limit_s = service, make, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the answer and send it; called by the HTTP server."""
        began_s = asyncio.get_running_loop().time()
        self._service.num_open += 1
        making = asyncio.ensure_future(self._make(scope, began_s))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            await asyncio.wait(
                {making, leaving}, timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if making.done():
                answer = making.result()
            elif leaving.done():
                return
            else:
                raise late(self._limit_s)
            leaving.cancel()
            await answer(scope, receive, send)
        finally:
            self._service.num_open -= 1
            making.cancel()
            leaving.cancel()


def _arrival(
    service: Service, journal: JournalKeeper | None, request: GenerationRequest, endpoint: Endpoint
) -> Arrival:
    async def make(scope: Scope, began_s: float) -> Answer:
        if journal is not None:
            return await journal.answer(scope, request, endpoint, began_s)
        if b"last-event-id" in dict(scope["headers"]):
            text = "Last-Event-ID: this server keeps no journal of requests (--journal)"
            raise ApiError(404, text, param="Last-Event-ID", code="request_not_found")
        return await endpoint.make(service, request, began_s)

    return Arrival(service, make, service.time_limit_s(request))


def _add_journal(app: FastAPI, service: Service, keeper: JournalKeeper) -> None:
    """Add the routes of kept requests to an app."""

    @app.get("/v1/requests/{request_id}/events", response_class=Response)
    async def events(request_id: str, http: Request) -> Response:
        """The events of a kept stream after `Last-Event-ID`, or all; 204 when there are no more."""
        kept, after = keeper.find(http.scope, request_id)
        if not kept.prepared.request.stream:
            text = f"request {request_id} has no events: it was asked for without stream"
            raise bad_field("request_id", text)
        if kept.num_events is not None and after >= kept.num_events:
            return Response(status_code=204)
        answer = keeper.reconnect(kept, after)

        async def rest(scope: Scope, began_s: float) -> Answer:
            return answer

        return Arrival(service, rest)

    @app.delete("/v1/requests/{request_id}")
    async def cancel(request_id: str, http: Request) -> Response:
        """Cancel a request of the journal, and delete what is kept of it."""
        kept, _ = keeper.find(http.scope, request_id)
        kept.end(ApiError(410, f"request {request_id} was cancelled", code="cancelled"))
        keeper.forget(kept)
        return json_response({"id": request_id, "object": "request", "deleted": True})
