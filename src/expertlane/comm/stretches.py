"""A rank's step as stretches of time: computing, waiting, and what other ranks had its core for."""

from collections.abc import Iterable, Iterator
from typing import Any

from expertlane.comm.clocks import HostClock
from expertlane.spec.names import Track

_LEAST_LOST_S = 20e-6  # of CPU time in a stretch; less is what the marks themselves take
Stretch = tuple[Track, int, float, float]  # track, cell, begin and end in seconds
Wait = tuple[int, Any, Any]  # cell, and marks of its begin and end
# The mark of what was waited for, and the thread's CPU seconds before and after.
Arrival = tuple[Any, float, float]
Interval = tuple[int, tuple[Any, Any], tuple[float, float]]  # cell, marks, CPU seconds


def stretches(
    clock: HostClock,
    intervals: Iterable[Interval],
    waits: Iterable[tuple[Wait, Arrival]],
    *,
    is_alone: bool,
) -> Iterator[Stretch]:
    """Each moment once, from the step's start.

    Args:
        intervals: in order and without gaps; a wait begins and ends within one of its own cell.
        waits: in order.
        is_alone: whether CPU time that an interval lacks was another rank's on the same core.
    """
    remaining = iter(waits)
    following, first = next(remaining, None), None

    def computed(cell: int, begin_s: float, end_s: float, cpu_s: float) -> Iterator[Stretch]:
        return _split(Track.COMPUTE, cell, begin_s, begin_s + cpu_s if is_alone else end_s, end_s)

    for cell, (begin, end), (cpu_s, end_cpu_s) in intervals:
        first = begin if first is None else first
        begin_s, end_s = clock.seconds(first, begin), clock.seconds(first, end)
        while following is not None:
            (_, wait, over), (arrived, wait_cpu_s, over_cpu_s) = following
            wait_s = clock.seconds(first, wait)
            if wait_s >= end_s:
                break
            arrived_s, over_s = clock.seconds(first, arrived), clock.seconds(first, over)
            yield from computed(cell, begin_s, wait_s, wait_cpu_s - cpu_s)
            yield from _split(Track.NETWORK, cell, wait_s, arrived_s, over_s)
            begin_s, cpu_s = over_s, over_cpu_s
            following = next(remaining, None)
        yield from computed(cell, begin_s, end_s, end_cpu_s - cpu_s)


def _split(
    track: Track, cell: int, begin_s: float, until_s: float, end_s: float
) -> Iterator[Stretch]:
    """A stretch up to where other ranks had the core, if they had it for long."""
    if end_s - until_s < _LEAST_LOST_S:
        yield track, cell, begin_s, end_s
        return
    yield track, cell, begin_s, until_s
    yield Track.DESCHEDULED, cell, until_s, end_s
