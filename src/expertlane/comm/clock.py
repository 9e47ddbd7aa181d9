"""Two clocks for a rank's stages: the host's, and the compute stream's where there is a GPU.

On a GPU the host only queues work, and waiting for a transfer holds up the stream, not the host;
so stages are timed by events on the stream. Not yet run on a GPU (docs/validation.md).
"""

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments cheaply and tells the seconds between them later."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def settle(self) -> None:
        """Make all marks so far readable."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two settled marks."""
        ...


class HostClock:
    """Marks are times of the host's monotonic clock."""

    def mark(self) -> float:
        """This moment."""
        return time.perf_counter()

    def settle(self) -> None:
        """Nothing to wait for."""

    def seconds(self, begin: float, end: float) -> float:
        """Between two marks."""
        return end - begin


class StreamClock:
    """Marks are events on the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        """The moment at which the stream will get here."""
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def settle(self) -> None:
        """Wait until the stream has passed all marks."""
        torch.cuda.current_stream().synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two settled marks."""
        return float(begin.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that sees what `device` does."""
    return StreamClock() if device.type == "cuda" else HostClock()
