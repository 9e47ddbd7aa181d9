"""The transport of a node's ranks through memory that they share.

The protocol (docs/performance.md) is `engine/ops/shared_memory.cpp`; where that cannot be
compiled, gloo is the transport.
"""

import ctypes
import itertools
import mmap
import time
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.comm.progress import Region
from expertlane.engine.comm.transport import LOOK_S, Epoch, Link, PeerLostError, Work
from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.errors import CapacityError

_NONE = -1  # no message, not even an empty one


class Endpoint:
    """A rank's end of the shared memory.

    Args:
        library: has the functions of `engine/ops/shared_memory.cpp`.
        num_spins: polls of the memory before a wait sleeps.
    """

    def __init__(
        self, library: ctypes.CDLL, memory: mmap.mmap, region: Region, rank: int, num_spins: int
    ) -> None:
        self._library, self._memory = library, memory  # mapped as long as this lives
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        sizes = region.num_ranks, region.groups_bytes, region.heap_bytes
        self._endpoint = library.shared_open(base, *sizes, rank, num_spins)
        weakref.finalize(self, library.shared_close, self._endpoint)
        self._place, self._pointers = ctypes.c_int64(), array("q", [0] * region.num_ranks)
        self._results = ctypes.byref(self._place), self._pointers.buffer_info()[0]
        self._exchange = ctypes.c_void_p()  # the latest of those begun and waited for in one call
        self._to_exchange = ctypes.addressof(self._exchange)
        self._in_use: dict[Any, tuple[Any, ...]] = {}  # by exchanges under way
        heap = region.heap(rank)
        with torch.inference_mode(False):  # torch writes to it in and outside that mode
            self._heap = torch.frombuffer(
                memory, dtype=torch.uint8, offset=heap.start, count=len(heap)
            )
        self._heap_by_type: dict[torch.dtype, Tensor] = {}

    def group_bytes(self, size: int) -> int:
        """Bytes of the groups' memory that a group of `size` ranks takes."""
        return int(self._library.shared_group_bytes(size))

    def open_group(self, number: int, offset: int, place: int, ranks: Sequence[int]) -> Any:
        """Open a group.

        Args:
            number: the group's; the same on all its ranks.
            offset: where the group begins in the groups' memory, in bytes; the same on all ranks.
            place: this rank's place in the group.
            ranks: [size]; the group's ranks, counted within the node.
        """
        local = array("q", ranks)
        return self._library.shared_group(
            self._endpoint, number, offset, len(ranks), place, local.buffer_info()[0]
        )

    def begin(
        self,
        group: Any,
        rows: Tensor,
        send: Sequence[int],
        received: Tensor | None,
        receive: Sequence[int],
        *,
        same_for_all: bool,
    ) -> Any:
        """Begin to exchange rows.

        Args:
            send, receive: [size]; numbers of rows to and from each place, -1 for no message.
            received: filled with the rows that come; None if `read` follows the wait.
            same_for_all: all of `rows` goes to every place.

        Returns:
            The exchange, for `wait` and `read`.
        """
        out, back = array("q", send), array("q", receive)
        # Of no rows there may be no memory, and None would mean that they are read in place.
        into = None if received is None else received.data_ptr() or self._pointers.buffer_info()[0]
        exchange = self._library.shared_begin(
            *(group, rows.shape[1] * rows.itemsize, rows.data_ptr(), out.buffer_info()[0]),
            *(same_for_all, into, back.buffer_info()[0]),
        )
        self._in_use[exchange] = rows, received, receive
        return exchange

    def wait(self, exchange: Any, timeout_s: float) -> tuple[int, int]:
        """Wait for an exchange for a limited time.

        Returns:
            Its state: 0 if done, 1 if not yet, 2 if a message has another size than expected; and
            the place that it hangs on, -1 for none.
        """
        state = self._library.shared_wait(exchange, int(timeout_s * 1e9), *self._results)
        if state == 0 and self._in_use[exchange][1] is not None:
            del self._in_use[exchange]
        return state, self._place.value

    def exchange(
        self,
        group: Any,
        rows: Tensor,
        send: Sequence[int],
        received: Tensor | None,
        receive: Sequence[int],
        timeout_s: float,
        *,
        same_for_all: bool,
    ) -> tuple[Any, int]:
        """`begin`, then `wait`, in one call; gives the exchange, and its state (see `wait`)."""
        out, back = array("q", send), array("q", receive)
        into = None if received is None else received.data_ptr() or self._pointers.buffer_info()[0]
        state: int = self._library.shared_exchange(
            *(group, rows.shape[1] * rows.itemsize, rows.data_ptr(), out.buffer_info()[0]),
            *(same_for_all, into, back.buffer_info()[0], int(timeout_s * 1e9), *self._results),
            self._to_exchange,
        )
        exchange = self._exchange.value
        if state or received is None:
            self._in_use[exchange] = rows, received, receive
        return exchange, state

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A buffer for rows that are sent once: in the rank's heap if there is room.

        Rows there are sent without a copy.
        """
        num_bytes = num_rows * width * dtype.itemsize
        offset = self._library.shared_room(self._endpoint, num_bytes) if num_bytes else -1
        if offset < 0:
            return torch.empty(num_rows, width, dtype=dtype)
        heap = self._heap_by_type.get(dtype)
        if heap is None:
            heap = self._heap_by_type[dtype] = self._heap.view(dtype)
        return heap.as_strided((num_rows, width), (width, 1), offset // dtype.itemsize)

    def read(self, exchange: Any, finish: Callable[[RowParts], Tensor]) -> Tensor:
        """The result of `finish` on the rows received; ends the exchange."""
        rows, _, receive = self._in_use[exchange]
        result = finish(RowParts(self._pointers, receive, rows.shape[1], rows.dtype))
        self._library.shared_end(exchange)
        del self._in_use[exchange]
        return result


class _SharedWork(Work):
    """An exchange among `ranks`."""

    def __init__(self, link: "SharedLink", exchange: Any, ranks: Sequence[int]) -> None:
        self._endpoint, self._exchange, self._ranks = link.endpoint, exchange, ranks
        self._timeout_s, self._epoch = link.timeout_s, link.epoch
        self._is_done = False

    def let_go(self) -> None:
        self.wait()  # of a send, until it lies in shared memory

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        return self._endpoint.read(self._exchange, finish)

    def wait(self) -> None:
        if self._is_done:
            return
        deadline_s = time.monotonic() + self._timeout_s
        state, place = self._endpoint.wait(self._exchange, min(LOOK_S, self._timeout_s))
        while state == 1:  # in slices: in between, Python handles signals
            self._epoch.check()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                whom = f"rank {self._ranks[place]}" if place >= 0 else "room in shared memory"
                raise PeerLostError(f"waited {self._timeout_s:g} s for {whom}")
            state, place = self._endpoint.wait(self._exchange, min(LOOK_S, left_s))
        if state == 2:
            self._epoch.check()
            raise PeerLostError(f"rank {self._ranks[place]} sent another size than expected")
        self._is_done = True


class SharedLink(Link):
    """A link by exchanges of an endpoint.

    Args:
        ranks: [size]; global ranks, in group order.
        place: this rank's place in the group.
        group: the endpoint's group of all of them.
        pairs: the endpoint's groups of this rank and one other, by the other's place; for single
            messages.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        ranks: Sequence[int],
        place: int,
        group: Any,
        pairs: Mapping[int, Any],
        timeout_s: float,
        epoch: Epoch,
    ) -> None:
        self.endpoint, self._ranks, self._place = endpoint, ranks, place
        self._group, self._pairs = group, pairs
        self.timeout_s, self.epoch = timeout_s, epoch

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.endpoint.empty(num_rows, width, dtype)

    def at_once(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        *,
        same_for_all: bool = False,
        finish: Callable[[RowParts], Tensor] | None = None,
    ) -> Tensor:
        received = None if finish else rows.new_empty((sum(receive), rows.shape[1]))
        exchange, state = self.endpoint.exchange(
            *(self._group, rows, send, received, receive, min(LOOK_S, self.timeout_s)),
            same_for_all=same_for_all,
        )
        if state:
            _SharedWork(self, exchange, self._ranks).wait()
        if received is not None:
            return received
        assert finish is not None, "or there is room"
        return self.endpoint.read(exchange, finish)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _SharedWork:
        return self._begin(rows, send, received, receive)

    def all_to_all_parts(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> _SharedWork:
        return self._begin(rows, send, None, receive)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _SharedWork:
        send = [rows.shape[0]] * len(self._ranks)
        return self._begin(rows, send, received, num_rows_of, same_for_all=True)

    def _begin(
        self,
        rows: Tensor,
        send: Sequence[int],
        received: Tensor | None,
        receive: Sequence[int],
        *,
        same_for_all: bool = False,
    ) -> _SharedWork:
        exchange = self.endpoint.begin(
            self._group, rows, send, received, receive, same_for_all=same_for_all
        )
        return _SharedWork(self, exchange, self._ranks)

    def send(self, rows: Tensor, to: int) -> _SharedWork:
        return self._single(to, rows, len(rows), rows, _NONE)

    def receive(self, rows: Tensor, source: int) -> _SharedWork:
        return self._single(source, rows, _NONE, rows, len(rows))

    def _single(
        self, other: int, rows: Tensor, send: int, received: Tensor, receive: int
    ) -> _SharedWork:
        """Begin one message between this rank and another, in the group of the two."""
        pair = sorted((self._place, other))
        sizes = [[size if place == other else _NONE for place in pair] for size in (send, receive)]
        exchange = self.endpoint.begin(
            self._pairs[other], rows, sizes[0], received, sizes[1], same_for_all=True
        )
        return _SharedWork(self, exchange, [self._ranks[place] for place in pair])


class SharedTransport:
    """Implements `Transport` for groups whose ranks are all on this node.

    Args:
        endpoint: this rank's.
        first_rank: the node's lowest global rank.
        rank: this rank's global number.
        timeout_s: the bound on any wait.
        epoch: the epoch of the memory; its end ends any wait.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        region: Region,
        first_rank: int,
        rank: int,
        timeout_s: float,
        epoch: Epoch,
    ) -> None:
        self._endpoint, self._region = endpoint, region
        self._first_rank, self._rank = first_rank, rank
        self._timeout_s, self._epoch = timeout_s, epoch
        self._num_groups = self._end = 0
        self._links: dict[tuple[int, ...], SharedLink] = {}

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group; all ranks of the node make all groups in the same order.

        So each group has the same place in memory for all of them.

        Raises:
            CapacityError: the groups' memory is full.
        """
        group = self._open(ranks)
        pairs = {}
        for first, second in itertools.combinations(range(len(ranks)), 2):
            pair = self._open((ranks[first], ranks[second]))
            if self._rank in (ranks[first], ranks[second]):
                pairs[second if ranks[first] == self._rank else first] = pair
        if self._rank in ranks:
            place = ranks.index(self._rank)
            self._links[ranks] = SharedLink(
                self._endpoint, ranks, place, group, pairs, self._timeout_s, self._epoch
            )

    def _open(self, ranks: tuple[int, ...]) -> Any:
        number, offset = self._num_groups, self._end
        self._num_groups, self._end = number + 1, offset + self._endpoint.group_bytes(len(ranks))
        if self._end > self._region.groups_bytes:
            raise CapacityError(f"{self._num_groups} groups of ranks do not fit into shared memory")
        if self._rank not in ranks:
            return None
        local = [rank - self._first_rank for rank in ranks]
        return self._endpoint.open_group(number, offset, ranks.index(self._rank), local)

    def link(self, ranks: tuple[int, ...]) -> SharedLink:
        return self._links[ranks]

    def leave(self) -> None:
        """Release all groups; the memory is freed with the last link, and the last tensor in it."""
        self._links.clear()
