"""A route that generates text: from a body to what its answer is made of, and to the answer."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from expertlane.server.answers import Answer
from expertlane.server.prepared import Prepared
from expertlane.server.requests import SampledRequest
from expertlane.server.service import Service


@dataclass(frozen=True)
class Endpoint:
    """One of them.

    Attributes:
        body: of its requests.
        prepare: checks a body and makes its prompts tokens; raises an `ApiError`.
        answer: made of what was prepared; the same for the same.
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
            ApiError: it can never be served, or not now.
        """
        service.check_admission(request.model)
        answer = self.answer(service, await self.prepare(service, request))
        answer.began_s = began_s
        return answer
