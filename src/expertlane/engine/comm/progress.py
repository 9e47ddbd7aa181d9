"""Memory that the ranks of a node and their launcher share, without torch.

The progress board has each rank's step, layer and stage; it can be read while a rank hangs, and
after it died. `Region` is the layout of the memory for messages.
"""

import ctypes
import mmap
import os
import time
from dataclasses import dataclass
from typing import NamedTuple, cast

from expertlane.spec.names import Stage

_NUM_FIELDS = 6
_STEP, _LAYER, _STAGE, _WAITING, _COUNTER, _TIME_NS = range(_NUM_FIELDS)
NO_LAYER = -1

# Header: the latest epoch, its fork server, and the other fields of `EpochFiles`, for even and odd
# epochs apart, so that nothing is overwritten before the next epoch has begun.
_NUM_IN_HEADER = 8
_EPOCH, _SERVER_PID, _FILES = range(3)
_NUM_OF_EPOCH = 3

Line = tuple[int, int, int, int, int, int]  # the fields of a rank


class EpochFiles(NamedTuple):
    """Files that the ranks of a node share in an epoch, opened by the server that forks them.

    Attributes:
        memory_fd: descriptor of the memory for their messages; -1 for none.
        store_fd: descriptor of their rendezvous file; -1 for none.
        num_ranks: ranks that share them.
    """

    server_pid: int
    memory_fd: int
    store_fd: int
    num_ranks: int


class Position(NamedTuple):
    """The step, layer and stage that a rank last reported.

    Attributes:
        layer: `NO_LAYER` outside any layer.
        waiting: it is blocked in a wait for other ranks.
        counter: rises with every report.
        time_s: time of the last report, on the monotonic clock.
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
    """The epoch and a line for each rank, in a file mapped by the launcher and its node's ranks.

    Args:
        num_ranks: lines of a new board; a file that is not empty keeps its own number.
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
        """The latest epoch that has begun on this node."""
        return self._cells[_EPOCH]

    @property
    def num_lines(self) -> int:
        """Number of lines: ranks that the board has room for."""
        return (len(self._cells) - _NUM_IN_HEADER) // _NUM_FIELDS

    def begin_epoch(
        self, epoch: int, server_pid: int, memory_fd: int, store_fd: int, num_ranks: int
    ) -> None:
        """Publish the next epoch; called before the files of the last one are closed.

        Args:
            epoch: one more than before.
            server_pid, memory_fd, store_fd, num_ranks: see `EpochFiles`.
        """
        place = _FILES + _NUM_OF_EPOCH * (epoch % 2)
        self._cells[_SERVER_PID] = server_pid
        for number, value in enumerate((memory_fd, store_fd, num_ranks)):
            self._cells[place + number] = value
        self._cells[_EPOCH] = epoch  # last: whoever reads it can read the rest

    def files(self, epoch: int) -> EpochFiles:
        """The files of an epoch; valid only if it is still the latest one after this call."""
        place = _FILES + _NUM_OF_EPOCH * (epoch % 2)
        values = self._cells[place : place + _NUM_OF_EPOCH].tolist()
        return EpochFiles(self._cells[_SERVER_PID], *values)

    def position(self, rank: int) -> Position:
        """The last report of `rank`."""
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
        return cast("Line", tuple(self._line(rank).tolist()))

    def update(self, rank: int, line: Line) -> None:
        """Copy a line from another node's board, with this node's time, as clocks differ."""
        cells = self._line(rank)
        if line[_COUNTER] != cells[_COUNTER]:
            for field, value in enumerate(line):
                cells[field] = value
            cells[_TIME_NS] = time.monotonic_ns()

    def reporter(self, rank: int) -> "ProgressReporter":
        """A writer of the line of `rank`, for that rank alone."""
        return ProgressReporter(self._line(rank))

    def _line(self, rank: int) -> memoryview:
        begin = _NUM_IN_HEADER + rank * _NUM_FIELDS
        return self._cells[begin : begin + _NUM_FIELDS]


class ProgressReporter:
    """Writes one rank's line; cheap enough to call at every change of stage."""

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self.set_step(-1)
        self.set_waiting(False)  # a lost rank that had this line may have left it set
        self.enter(Stage.SETUP, NO_LAYER)

    def set_step(self, step: int) -> None:
        """Report the step that begins; -1 before the first."""
        self._cells[_STEP] = step

    def enter(self, stage: Stage, layer: int) -> int:
        """Report the stage and layer that begin; gives the time, in ns of the monotonic clock."""
        cells = self._cells
        cells[_STAGE] = stage
        cells[_LAYER] = layer
        cells[_COUNTER] += 1  # `touch` inlined: this is hot
        cells[_TIME_NS] = now_ns = time.monotonic_ns()
        return now_ns

    def touch(self) -> None:
        """Report that work goes on."""
        self._cells[_COUNTER] += 1
        self._cells[_TIME_NS] = time.monotonic_ns()

    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of layer, stage, counter and time, int64 each; C++ writes them like `enter`."""
        begin = ctypes.addressof(ctypes.c_int64.from_buffer(self._cells))
        layer, stage, counter, time_ns = (
            begin + 8 * field for field in (_LAYER, _STAGE, _COUNTER, _TIME_NS)
        )
        return layer, stage, counter, time_ns

    def set_waiting(self, waiting: bool) -> None:
        """Report whether the rank is blocked in a wait for others."""
        self._cells[_WAITING] = waiting


_LINE_BYTES = 64


@dataclass(frozen=True)
class Region:
    """Sizes of the memory that the ranks of a node share; pages not touched take no memory.

    Attributes:
        groups_bytes: for the state of groups, of all ranks together.
        heap_bytes: for the messages of each rank.
    """

    num_ranks: int
    groups_bytes: int = 64 << 20
    heap_bytes: int = 128 << 20

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole region; its file must be zeros at first."""
        return self.num_ranks * (_LINE_BYTES + self.heap_bytes) + self.groups_bytes

    def heap(self, rank: int) -> range:
        """Offsets of a rank's heap; `rank` counts within the node."""
        begin = self.num_ranks * _LINE_BYTES + self.groups_bytes + rank * self.heap_bytes
        return range(begin, begin + self.heap_bytes)

    def map(self, fd: int) -> mmap.mmap:
        """Map the region from its file."""
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(fd, self.num_bytes, mmap.MAP_SHARED | no_reserve)
