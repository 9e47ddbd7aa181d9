"""From a request's arrival to its answer, unless the client leaves or a time limit ends it."""

import asyncio

from fastapi import Response
from starlette.types import Receive, Scope, Send

from expertlane.server.answers import Answer
from expertlane.server.endpoint import Endpoint
from expertlane.server.errors import ApiError
from expertlane.server.journal.keeper import JournalKeeper
from expertlane.server.requests import SampledRequest
from expertlane.server.service import Service
from expertlane.server.under_way import late


class Arrival(Response):
    """Sends an answer once it is made, unless the client leaves or the time is up before.

    Making it includes tokenizing the prompt.
    """

    def __init__(
        self,
        service: Service,
        journal: JournalKeeper | None,
        request: SampledRequest,
        endpoint: Endpoint,
    ) -> None:
        super().__init__()  # unused: `__call__` sends another response
        self._journal = journal
        self._service, self._request, self._endpoint = service, request, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the answer and send it; called by the HTTP server."""
        service = self._service
        began_s = asyncio.get_running_loop().time()
        limit_s = service.time_limit_s(self._request)
        service.num_open += 1
        making = asyncio.ensure_future(self._make(scope, began_s))
        leaving = asyncio.ensure_future(_leaves(receive))
        try:
            await asyncio.wait(
                {making, leaving}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if making.done():
                answer = making.result()
            elif leaving.done():
                return
            else:
                raise late(limit_s)
            leaving.cancel()
            await answer(scope, receive, send)
        finally:
            service.num_open -= 1
            making.cancel()
            leaving.cancel()

    async def _make(self, scope: Scope, began_s: float) -> Answer:
        service, request, endpoint = self._service, self._request, self._endpoint
        if self._journal is not None:
            return await self._journal.answer(scope, request, endpoint, began_s)
        if b"last-event-id" in dict(scope["headers"]):
            text = "Last-Event-ID: this server keeps no journal of requests (--journal)"
            raise ApiError(404, text, param="Last-Event-ID", code="request_not_found")
        return await endpoint.make(service, request, began_s)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
