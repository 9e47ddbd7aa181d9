"""What a backend needs for operations that are launched together, as a graph."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """Records operations once, and launches them again without the host's work between them.

    Graphs of one of these share memory: what one has computed is gone once another runs, unless it
    was copied to memory from outside.
    """

    def capture(self, run: Callable[[], None], until: Callable[[Any], None]) -> Callable[[], None]:
        """Call `run` once as it is, and once to record it; gives what launches the recorded again.

        The record has the memory that operations used, and all values that were on the host.

        Args:
            until: waits, with a bound, for an event of the stream: the first call may wait for
                ranks that are lost.
        """
        ...


def is_recorded(device: torch.device) -> bool:
    """Whether operations of this thread become a part of a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
