"""Responses that later requests go on from: in memory, with a bound."""

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
        body: as the client got it.
        messages: of the whole chat, without instructions, which do not go on.
    """

    body: dict[str, Any]
    messages: list[dict[str, Any]]


class ResponseStore:
    """The responses used last.

    Args:
        most: how many; 0 to keep none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether anything is kept."""
        return self._most > 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response; those that were used least lately go."""
        size = len(msgspec.json.encode((response.body, response.messages)))
        if (known := self._kept.pop(response.body["id"], None)) is not None:
            self._num_bytes -= known[1]
        self._kept[response.body["id"]] = response, size
        self._num_bytes += size
        while self._kept and (len(self._kept) > self._most or self._num_bytes > _MOST_BYTES):
            _, (_, size) = self._kept.popitem(last=False)
            self._num_bytes -= size

    def get(self, response_id: str, param: str) -> StoredResponse:
        """One of them.

        Args:
            param: the field that names it.

        Raises:
            ApiError: it is not there, or not any more.
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
        """Forget one.

        Raises:
            ApiError: it is not there.
        """
        self.get(response_id, param)
        self._num_bytes -= self._kept.pop(response_id)[1]
