"""Routes of `/v1/responses`."""

from fastapi import FastAPI, Response

from expertlane.server.arrival import Arrival
from expertlane.server.errors import json_response
from expertlane.server.journal.keeper import JournalKeeper
from expertlane.server.responses.answer import RESPONSES
from expertlane.server.responses.request import ResponsesRequest
from expertlane.server.service import Service


def add_responses(app: FastAPI, service: Service, journal: JournalKeeper | None) -> None:
    """Let an app answer them."""
    store = service.responses

    @app.post(RESPONSES.path, response_class=Response)
    async def respond(request: ResponsesRequest) -> Response:
        """Continue a conversation, or begin one; its items, whole or as events."""
        return Arrival(service, journal, request, RESPONSES)

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str) -> Response:
        """A response that was kept."""
        return json_response(store.get(response_id, "response_id").body)

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget a response that was kept."""
        store.delete(response_id, "response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})
