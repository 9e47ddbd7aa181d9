"""The clocks of a rank: the host's, or the compute stream's on a GPU; and the token for its core.

On a GPU the host only queues work, and waiting for a transfer holds up the stream, not the host. So
stages are timed by events on the stream, which are read once, when the step is over: no mark waits
for the GPU. Between the two marks of a wait the stream did nothing but wait, so the part of a
transfer that overlaps with computing is not counted. Not yet run on a GPU (docs/validation.md).
"""

import fcntl
import time
from collections.abc import Callable
from typing import Any

import torch

from expertlane.engine.comm.transport import Event


class HostClock:
    """Takes marks cheaply, and gives the seconds between them later; by the host's clock."""

    def restart(self) -> None:
        """Forget all marks so far."""

    def mark(self) -> Any:
        """Take a mark now."""
        return time.perf_counter()

    def settle(self) -> None:
        """Make all marks so far readable."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two settled marks."""
        return float(end - begin)


class StreamClock(HostClock):
    """A clock whose marks are events on the current CUDA stream, reused after each restart.

    Args:
        wait: blocks until the stream has passed an event.
        make: makes an event with timing; tests give another kind.
    """

    def __init__(self, wait: Callable[[Any], None], make: Callable[[], Any] | None = None) -> None:
        self._wait = wait
        self._make = make or _timed_event
        self._events: list[Any] = []
        self._num_marks = 0
        self._at_s: list[float] = []  # of settled marks, since the first of them

    def restart(self) -> None:
        self._num_marks = 0
        self._at_s.clear()

    def mark(self) -> int:
        """Record an event on the stream; the mark is its number."""
        number = self._num_marks
        if number == len(self._events):
            self._events.append(self._make())
        self._events[number].record()
        self._num_marks += 1
        return number

    def settle(self) -> None:
        """Wait until the stream has passed all marks, and read them."""
        marks = self._events[: self._num_marks]
        if marks:
            self._wait(marks[-1])
            self._at_s = [marks[0].elapsed_time(mark) / 1e3 for mark in marks]

    def seconds(self, begin: int, end: int) -> float:
        return self._at_s[end] - self._at_s[begin]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _synchronize(event: torch.cuda.Event) -> None:
    event.synchronize()


def clock_for(device: torch.device, wait: Callable[[Event], None] | None = None) -> HostClock:
    """The clock that times the work of `device`.

    Args:
        wait: blocks until a GPU has passed an event; with a bound, where other ranks can be lost.
    """
    return StreamClock(wait or _synchronize) if device.type == "cuda" else HostClock()


class CoreToken:
    """The right to compute on a core, held by one of the ranks that share it at a time.

    It is a lock on one byte of a file that all of them have open: the kernel releases it when its
    owner dies. A rank must release it before it blocks.

    Args:
        file: descriptor of a file that the ranks of a node share.
        local_rank: the rank within its node; ranks are assigned to cores in turn.
        num_cores: cores of the node.
    """

    def __init__(self, file: int, local_rank: int, num_cores: int) -> None:
        self._file = file
        self._core = local_rank % num_cores
        self._is_held = False

    def acquire(self) -> None:
        """Wait for the core; no effect if this rank holds it."""
        if not self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._core)
            self._is_held = True

    def release(self) -> None:
        """Let another rank have the core; no effect if this rank does not hold it."""
        if self._is_held:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._core)
            self._is_held = False
