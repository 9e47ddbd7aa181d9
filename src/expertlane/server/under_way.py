"""Requests under way: each is ended when its time is up, and all are when the server ends."""

import asyncio

from expertlane.engine.async_engine import RequestGroup
from expertlane.server.errors import ApiError


class UnderWay:
    """The unfinished requests of one server and their timers; used in its event loop."""

    def __init__(self) -> None:
        self._timers: dict[RequestGroup, asyncio.TimerHandle | None] = {}
        self._ending: Exception | None = None  # the error with which all requests end

    def begin(self, group: RequestGroup, began_s: float, limit_s: float | None) -> None:
        """Start the timer of a group of requests, which runs until `finish`.

        Args:
            began_s: arrival of the requests, on the loop's clock.
            limit_s: seconds that they may take; None for any time.
        """
        timer = None
        if limit_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_at(began_s + limit_s, group.end, late(limit_s))
        self._timers[group] = timer
        if self._ending is not None:  # the server has ended meanwhile
            group.end(self._ending)

    def finish(self, group: RequestGroup) -> None:
        """Cancel a group's unfinished requests, and its timer."""
        group.cancel()
        timer = self._timers.pop(group, None)
        if timer is not None:
            timer.cancel()

    def end(self, error: Exception) -> None:
        """Cancel all requests, and any that begin later; clients get the error."""
        self._ending = error
        for group in list(self._timers):
            group.end(error)


def late(limit_s: float | None) -> ApiError:
    """The error of a request whose time is up."""
    return ApiError(504, f"not finished within {limit_s:g} s", code="timeout")
