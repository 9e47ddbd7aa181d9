"""Routes by which clients come back to their requests."""

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from expertlane.server.answers import Answer
from expertlane.server.errors import ApiError, bad_field, json_response
from expertlane.server.journal.keeper import JournalKeeper
from expertlane.server.service import Service


class _Rest(Response):
    """The events of a kept answer that a client does not have yet."""

    def __init__(self, service: Service, answer: Answer) -> None:
        super().__init__()  # unused: `__call__` sends the answer
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; for the server."""
        self._service.num_open += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._service.num_open -= 1


def add_journal(app: FastAPI, service: Service, keeper: JournalKeeper) -> None:
    """Add the routes of kept requests to an app."""

    @app.get("/v1/requests/{request_id}/events", response_class=Response)
    async def events(request_id: str, http: Request) -> Response:
        """The events of a stream after `Last-Event-ID`, or all; 204 where no more will come."""
        kept, after = keeper.find(http.scope, request_id)
        if not kept.prepared.request.stream:
            text = f"request {request_id} has no events: it was asked for without stream"
            raise bad_field("request_id", text)
        if kept.num_events is not None and after >= kept.num_events:
            return Response(status_code=204)
        return _Rest(service, keeper.reconnect(kept, after))

    @app.delete("/v1/requests/{request_id}")
    async def cancel(request_id: str, http: Request) -> Response:
        """End a request, and forget it."""
        kept, _ = keeper.find(http.scope, request_id)
        kept.end(ApiError(410, f"request {request_id} was cancelled", code="cancelled"))
        keeper.forget(kept)
        return json_response({"id": request_id, "object": "request", "deleted": True})
