"""Routes of `/v1/responses`."""

from fastapi import FastAPI, Response

from expertlane.server.arrival import Arrival
from expertlane.server.errors import json_response
from expertlane.server.responses.answer import make_response
from expertlane.server.responses.request import ResponsesRequest
from expertlane.server.responses.store import ResponseStore
from expertlane.server.service import Service


def add_responses(app: FastAPI, service: Service) -> None:
    """Let an app answer them."""
    store = ResponseStore(service.options.max_stored_responses)

    @app.post("/v1/responses", response_class=Response)
    async def respond(request: ResponsesRequest) -> Response:
        """Continue a conversation, or begin one; its items, whole or as events."""
        service.check_admission(request.model)
        return Arrival(service, request, lambda: make_response(service, request, store))

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str) -> Response:
        """A response that was kept."""
        return json_response(store.get(response_id, "response_id").body)

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget a response that was kept."""
        store.delete(response_id, "response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})
