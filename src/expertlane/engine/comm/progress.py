"""Where every rank is, in memory that the launcher can read while a rank hangs or after it died."""

import ctypes
import mmap
import os
import time
from typing import NamedTuple, cast

from expertlane.spec.names import Stage

_NUM_FIELDS = 6
_STEP, _LAYER, _STAGE, _WAITING, _COUNTER, _TIME_NS = range(_NUM_FIELDS)
NO_LAYER = -1

# Before the lines: the latest epoch, its server, and what else it has: of even and of odd epochs
# apart, so that nothing is written over before the next epoch has begun.
_NUM_IN_HEADER = 8
_EPOCH, _SERVER_PID, _FILES = range(3)
_NUM_OF_EPOCH = 3

Line = tuple[int, int, int, int, int, int]  # the fields of a rank


class EpochFiles(NamedTuple):
    """What the ranks of a node share in an epoch, as descriptors of the server that forks them.

    Attributes:
        memory_fd: of the memory for their messages.
        store_fd: of the file in which they meet.
        Both are -1 where there is none.
        num_ranks: how many share them.
    """

    server_pid: int
    memory_fd: int
    store_fd: int
    num_ranks: int


class Position(NamedTuple):
    """What a rank was doing when it last reported.

    Attributes:
        layer: `NO_LAYER` outside any layer.
        waiting: blocked in a wait for other ranks.
        counter: rises with every report.
        time_s: of the last report, on the monotonic clock.
    """

    step: int
    layer: int
    stage: Stage
    waiting: bool
    counter: int
    time_s: float

    def __str__(self) -> str:
        layer = "" if self.layer == NO_LAYER else f"layer {self.layer}, "
        step = "" if self.step < 0 else f"step {self.step}, "
        # A rank that has ended a step stays in its last layer, idle.
        ended = " since the step ended" if layer and self.stage is Stage.IDLE else ""
        return f"{step}{layer}stage {self.stage.label}{ended}"


class ProgressBoard:
    """The epoch, and one line a rank, in a file mapped by the launcher and all ranks of its node.

    Args:
        num_ranks: that it has room for; of a file that is empty, else it has what it has.
        fd: the file's descriptor. None keeps the board private to this process.

    Raises:
        OSError: there is no room in the file, or it cannot be mapped.
    """

    def __init__(self, num_ranks: int, fd: int | None = None) -> None:
        size = (_NUM_IN_HEADER + num_ranks * _NUM_FIELDS) * 8
        is_new = fd is None or os.fstat(fd).st_size == 0
        if fd is None:
            self._map = mmap.mmap(-1, size)
        else:
            if is_new:
                os.pwrite(fd, bytes(size), 0)  # takes the room now: a lack of it is an error here
            self._map = mmap.mmap(fd, 0)
        self._cells = memoryview(self._map).cast("q")
        if is_new:
            for rank in range(num_ranks):
                self.reporter(rank)  # writes "setting up"

    @property
    def epoch(self) -> int:
        """The latest one that has begun on this node."""
        return self._cells[_EPOCH]

    @property
    def num_lines(self) -> int:
        """Ranks that it has room for."""
        return (len(self._cells) - _NUM_IN_HEADER) // _NUM_FIELDS

    def begin_epoch(
        self, epoch: int, server_pid: int, memory_fd: int, store_fd: int, num_ranks: int
    ) -> None:
        """Say that another one begins; before the files of the one before it are closed.

        Args:
            epoch: one more than before.
            server_pid, memory_fd, store_fd, num_ranks: as in `EpochFiles`.
        """
        place = _FILES + _NUM_OF_EPOCH * (epoch % 2)
        self._cells[_SERVER_PID] = server_pid
        for number, value in enumerate((memory_fd, store_fd, num_ranks)):
            self._cells[place + number] = value
        self._cells[_EPOCH] = epoch  # last: who sees it sees the rest

    def files(self, epoch: int) -> EpochFiles:
        """Of an epoch, which is not over if it is still the latest one thereafter."""
        place = _FILES + _NUM_OF_EPOCH * (epoch % 2)
        values = self._cells[place : place + _NUM_OF_EPOCH].tolist()
        return EpochFiles(self._cells[_SERVER_PID], *values)

    def position(self, rank: int) -> Position:
        """What `rank` last reported."""
        cells = self._line(rank)
        return Position(
            step=cells[_STEP],
            layer=cells[_LAYER],
            stage=Stage(cells[_STAGE]),
            waiting=bool(cells[_WAITING]),
            counter=cells[_COUNTER],
            time_s=cells[_TIME_NS] / 1e9,
        )

    def line(self, rank: int) -> Line:
        """The raw line of `rank`, for `update` on the launcher's board."""
        return cast(Line, tuple(self._line(rank).tolist()))

    def update(self, rank: int, line: Line) -> None:
        """Take over the line of a rank of another node; its clock is not ours."""
        cells = self._line(rank)
        if line[_COUNTER] != cells[_COUNTER]:
            for field, value in enumerate(line):
                cells[field] = value
            cells[_TIME_NS] = time.monotonic_ns()

    def reporter(self, rank: int) -> "ProgressReporter":
        """The line of `rank`, to be written by that rank alone."""
        return ProgressReporter(self._line(rank))

    def _line(self, rank: int) -> memoryview:
        begin = _NUM_IN_HEADER + rank * _NUM_FIELDS
        return self._cells[begin : begin + _NUM_FIELDS]


class ProgressReporter:
    """Writes one rank's line; cheap enough to call at every change of stage."""

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self.set_step(-1)
        self.set_waiting(False)  # as the rank that had this line before may have been
        self.enter(Stage.SETUP, NO_LAYER)

    def set_step(self, step: int) -> None:
        """Say which step begins; -1 before the first."""
        self._cells[_STEP] = step

    def enter(self, stage: Stage, layer: int) -> int:
        """Say which stage of which layer begins; gives the time, in ns of the monotonic clock."""
        cells = self._cells
        cells[_STAGE] = stage
        cells[_LAYER] = layer
        cells[_COUNTER] += 1  # as `touch`, without a call of it
        cells[_TIME_NS] = now_ns = time.monotonic_ns()
        return now_ns

    def touch(self) -> None:
        """Say that work goes on."""
        self._cells[_COUNTER] += 1
        self._cells[_TIME_NS] = time.monotonic_ns()

    def addresses(self) -> tuple[int, int, int, int]:
        """Where layer, stage, counter and time lie, for C++ that does as `enter`; int64 each."""
        begin = ctypes.addressof(ctypes.c_int64.from_buffer(self._cells))
        layer, stage, counter, time_ns = (
            begin + 8 * field for field in (_LAYER, _STAGE, _COUNTER, _TIME_NS)
        )
        return layer, stage, counter, time_ns

    def set_waiting(self, waiting: bool) -> None:
        """Say whether the rank is blocked in a wait for others."""
        self._cells[_WAITING] = waiting
