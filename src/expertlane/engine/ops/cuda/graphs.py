"""CUDA graphs. Never run (docs/validation.md)."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

from expertlane.engine.ops.transfer import recorded_event


class CudaGraphs:
    """`ops.graphs.Graphs` as CUDA graphs, which share one memory pool."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: WeakSet[Any] = WeakSet()  # of that pool that are still there
        self._failed: list[Any] = []  # torch's allocator of pinned memory goes on asking them

    def capture(self, run: Callable[[], None], until: Callable[[Any], None]) -> Callable[[], None]:
        """Call `run` once, which compiles kernels and loads libraries; then capture it.

        Returns:
            The graph's launch.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                run()
                until(recorded_event())  # torch waits too when a capture begins, without a bound
        finally:  # of a call that is given up, too: it may still write where others will
            torch.cuda.current_stream().wait_stream(self._stream)
        if not self._graphs:  # torch takes no pool again whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # left for sure, as a capture that fails is not
            self._record(graph, run)
        self._graphs.add(graph)
        return graph.replay

    def _record(self, graph: Any, run: Callable[[], None]) -> None:
        """Capture `run`; raise what it raises, also if the end of the capture fails then.

        The end fails where a group is aborted between a transfer's begin and the wait for it, which
        leaves a stream that nothing joins. Torch then leaves its allocator as if still capturing.
        """
        errors: list[Exception] = []
        try:
            # Other threads (nccl's watchdog asks for events) may go on meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    run()
                except Exception as error:
                    errors.append(error)
        except RuntimeError as error:
            errors.append(error)
            self._failed.append(graph)
            self._graphs = WeakSet()  # so the next capture has another pool
            with suppress(RuntimeError):  # it had not begun
                device = torch.cuda.current_device()
                torch._C._cuda_endAllocateToPool(device, self._pool)
                torch._C._cuda_releasePool(device, self._pool)
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()  # they keep the frames that they went through
