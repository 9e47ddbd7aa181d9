"""The times of a rank's step: the duration of each stage, and a timeline of the rank."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.progress import NO_LAYER
from expertlane.results.step_record import RankEvents
from expertlane.spec.names import Stage, Track

_LEAST_LOST_S = 20e-6  # of CPU time in a stretch; less is what the marks themselves take
_NUM_STAGES = len(Stage)
_TRACKS = list(Track)

Stretch = tuple[Track, int, float, float]  # track, cell, begin and end in seconds
# What a wait needs to be drawn: the mark at which what was waited for came, and the thread's CPU
# seconds before and after.
Arrival = tuple[Any, float, float]


class StepTimes:
    """Marks of a step's clock: one wherever a stage begins, two for each wait within a stage.

    An interval is known by its cell: its place in an array of all micro-batches, layers (and one
    slot for what is of none) and stages.
    """

    def __init__(self, clock: HostClock, num_micro_batches: int, num_layers: int) -> None:
        self._clock = clock
        clock.restart()
        self._num_layers = num_layers
        self._shape = num_micro_batches, num_layers + 1, _NUM_STAGES
        self._started_s = time.perf_counter()
        self._cells: list[int] = []  # of every interval, in order
        self._marks: list[Any] = []  # where each interval begins; one more at the end
        self._cpu_marks: list[float] = []
        self._waits: list[tuple[int, Any, Any]] = []  # cell, and marks of its begin and end
        self._arrivals: list[Arrival] = []  # of each wait, where there are to be events

    def enter(self, micro_batch: int, layer: int, stage: Stage) -> None:
        """End the present interval and begin another."""
        slot = self._num_layers if layer == NO_LAYER else layer
        self._cells.append((micro_batch * (self._num_layers + 1) + slot) * _NUM_STAGES + stage)
        self._mark()

    def _mark(self) -> None:
        self._marks.append(self._clock.mark())
        self._cpu_marks.append(time.thread_time())

    def waited(self, begin: Any, arrived: Any, begin_cpu_s: float) -> None:
        """Record a wait that has ended in the present interval.

        Args:
            begin: its mark.
            arrived: that of when what was waited for came; None where no events are wanted.
            begin_cpu_s: the thread's CPU seconds then; for events alone.
        """
        self._waits.append((self._cells[-1], begin, self._clock.mark()))
        if arrived is not None:
            self._arrivals.append((arrived, begin_cpu_s, time.thread_time()))

    def end(self) -> None:
        """End the last interval."""
        self._mark()
        self._clock.settle()

    def seconds(self) -> list[npt.NDArray[np.float64]]:
        """Wall time, CPU time of the thread, and the part of wall time in waits, by cell."""
        wall_s, cpu_s, blocked_s = found = [np.zeros(self._shape) for _ in range(3)]
        for cell, (begin, end), (cpu_begin_s, cpu_end_s) in self._intervals():
            wall_s.flat[cell] += self._clock.seconds(begin, end)
            cpu_s.flat[cell] += cpu_end_s - cpu_begin_s
        for cell, begin, end in self._waits:
            blocked_s.flat[cell] += self._clock.seconds(begin, end)
        return found

    def events(self, *, is_alone: bool) -> RankEvents:
        """Every interval without its waits, every wait, and what of both other ranks took.

        Args:
            is_alone: whether CPU time that an interval lacks was another rank's on the same core.
        """
        kept = [
            row
            for row in self._stretches(is_alone)
            if row[3] > row[2] and row[1] % _NUM_STAGES != Stage.IDLE
        ]
        tracks, cells, begin_s, end_s = zip(*kept, strict=True) if kept else [()] * 4
        places = np.array(cells, dtype=np.int64)
        micro_batch, slot, stage = (
            axis.astype(np.int64) for axis in np.unravel_index(places, self._shape)
        )
        return RankEvents(
            start_s=self._started_s,
            track=np.array([_TRACKS.index(track) for track in tracks], dtype=np.int64),
            stage=stage,
            layer=np.where(slot == self._num_layers, NO_LAYER, slot),
            micro_batch=micro_batch,
            begin_s=np.array(begin_s, dtype=np.float64),
            end_s=np.array(end_s, dtype=np.float64),
        )

    def _intervals(self) -> Iterator[tuple[int, tuple[Any, Any], tuple[float, float]]]:
        """Cell, marks and CPU seconds of each, in order and without gaps."""
        return zip(self._cells, pairwise(self._marks), pairwise(self._cpu_marks), strict=True)

    def _stretches(self, is_alone: bool) -> Iterator[Stretch]:
        """Each moment once, from the step's start; waits lie within an interval of their cell."""
        seconds, first = self._clock.seconds, self._marks[0]
        remaining = zip(self._waits, self._arrivals, strict=True)
        following = next(remaining, None)

        def computed(cell: int, begin_s: float, end_s: float, cpu_s: float) -> Iterator[Stretch]:
            until_s = begin_s + cpu_s if is_alone else end_s
            return _split(Track.COMPUTE, cell, begin_s, until_s, end_s)

        for cell, (begin, end), (cpu_s, end_cpu_s) in self._intervals():
            begin_s, end_s = seconds(first, begin), seconds(first, end)
            while following is not None:
                (_, wait, over), (arrived, wait_cpu_s, over_cpu_s) = following
                wait_s = seconds(first, wait)
                if wait_s >= end_s:
                    break
                arrived_s, over_s = seconds(first, arrived), seconds(first, over)
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
