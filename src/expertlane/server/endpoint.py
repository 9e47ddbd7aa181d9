"""Routes that generate text: from a request's body to a prepared request, and to its answer."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from expertlane.server.answers import Answer
from expertlane.server.prepared import Prepared
from expertlane.server.requests import SampledRequest
from expertlane.server.service import Service


@dataclass(frozen=True)
class Endpoint:
    """A route that generates text.

    Attributes:
        body: the type of its requests' bodies.
        prepare: checks a body and tokenizes its prompts; raises an `ApiError`.
        answer: the class of its answers, which depend only on the prepared request and its chunks.
    """

    path: str
    body: type[SampledRequest]
    prepare: Callable[[Service, Any], Awaitable[Prepared]]
    answer: type[Answer]

    async def make(self, service: Service, request: SampledRequest, began_s: float) -> Answer:
        """An answer to a request.

        Args:
            began_s: when it arrived, on the loop's clock.

        Raises:
            ApiError: the request can never be served, or not now.
        """
        service.check_admission(request.model)
        answer = self.answer(service, await self.prepare(service, request))
        answer.began_s = began_s
        return answer
