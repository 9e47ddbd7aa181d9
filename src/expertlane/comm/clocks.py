"""The clocks of a rank: the host's, and the compute stream's where there is a GPU.

On a GPU the host only queues work, and waiting for a transfer holds up the stream, not the host; so
stages are timed by events on the stream. Not yet run on a GPU (docs/validation.md).
"""

import time
from typing import Any

import torch


class HostClock:
    """Marks moments cheaply and tells the seconds between them later; by the host's clock."""

    def mark(self) -> Any:
        """Take a mark now."""
        return time.perf_counter()

    def settle(self) -> None:
        """Make all marks so far readable."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two settled marks."""
        return float(end - begin)


class StreamClock(HostClock):
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
        """Seconds between two settled marks."""
        return float(begin.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> HostClock:
    """The clock that sees what `device` does."""
    return StreamClock() if device.type == "cuda" else HostClock()
