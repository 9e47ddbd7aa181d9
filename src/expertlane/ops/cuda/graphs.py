"""CUDA graphs. Never run (docs/validation.md)."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from expertlane.ops.transfer import recorded_event


class CudaGraphs:
    """As `ops.graphs.Graphs`; captures use one memory pool."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: WeakSet[Any] = WeakSet()  # that are still there

    def capture(self, run: Callable[[], None], until: Callable[[Any], None]) -> Callable[[], None]:
        """As of `Graphs`; the call before lets kernels be compiled and libraries be loaded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            until(recorded_event())  # torch waits too when a capture begins, without a bound
        torch.cuda.current_stream().wait_stream(self._stream)
        if not self._graphs:  # torch takes no pool again whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (nccl's watchdog asks for events) may go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        self._graphs.add(graph)
        return graph.replay
