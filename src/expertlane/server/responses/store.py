"""Stored responses, which later requests continue: in memory, with a bound."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from expertlane.server.errors import ApiError

_MOST_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class StoredResponse:
    """A response, and the chat that it ends.

    Attributes:
        body: the body that the client got.
        messages: messages of the whole chat, but for instructions, which do not carry over.
    """

    body: dict[str, Any]
    messages: list[dict[str, Any]]


class ResponseStore:
    """The most recently used responses.

    Args:
        most: the number to keep; 0 to keep none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether responses are kept at all."""
        return self._most > 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response; the least recently used ones are dropped."""
        size = len(msgspec.json.encode((response.body, response.messages)))
        if (known := self._kept.pop(response.body["id"], None)) is not None:
            self._num_bytes -= known[1]
        self._kept[response.body["id"]] = response, size
        self._num_bytes += size
        while self._kept and (len(self._kept) > self._most or self._num_bytes > _MOST_BYTES):
            _, (_, size) = self._kept.popitem(last=False)
            self._num_bytes -= size

    def get(self, response_id: str, param: str) -> StoredResponse:
        """A response by its id.

        Args:
            param: the field that names it.

        Raises:
            ApiError: it is not kept, or no longer.
        """
        if response_id not in self._kept:
            raise ApiError(
                404,
                f"{param}: there is no response {response_id!r}; the last {self._most} are kept, "
                "without those with store: false",
                param=param,
                code="response_not_found",
            )
        self._kept.move_to_end(response_id)
        return self._kept[response_id][0]

    def delete(self, response_id: str, param: str) -> None:
        """Drop a response.

        Raises:
            ApiError: it is not kept.
        """
        self.get(response_id, param)
        self._num_bytes -= self._kept.pop(response_id)[1]
