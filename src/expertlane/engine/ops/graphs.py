"""The interface of graphs: operations that are recorded once and launched together."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """Records operations once, and launches them again without the host's work between them.

    Graphs of one recorder share memory: a graph's results are gone once another graph runs, unless
    they were copied to memory from outside.
    """

    def capture(self, run: Callable[[], None], until: Callable[[Any], None]) -> Callable[[], None]:
        """Call `run` twice: once to execute it, once to record it.

        The graph keeps the addresses that operations used, and the values that the host had.

        Args:
            until: waits, with a bound, for an event of the stream: the first call may wait for
                ranks that are lost.

        Returns:
            A function that launches the recorded operations again.
        """
        ...


def is_recorded(device: torch.device) -> bool:
    """Whether the current stream is being captured, so that operations are recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
