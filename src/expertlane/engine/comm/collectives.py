"""The collectives of a group of ranks, on the link that its transport gives it.

Every sum is ours, in float32 and in rank order, so a result does not depend on the transport. Only
where 16-bit values are added up across nodes of GPUs, nccl does it (`comm/torch_transport.py`).
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from time import monotonic_ns
from typing import TypeVar

import torch
from torch import Tensor

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm.checks import checksum
from expertlane.engine.comm.counters import links_of
from expertlane.engine.comm.recorder import CheckedRecorder, Recorder
from expertlane.engine.comm.transport import AtOnce, Link, Work
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.spec.names import Stage

Look = Callable[[Tensor], None]  # inspects the rows that a transfer has brought
# Rows for each rank without the padding; called only where a step is recorded.
NumReal = Callable[[], Sequence[int]]

# Other transfers wait for another pipeline stage, or move beside steps.
_HIDEABLE = (Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES)


class Pending:
    """A transfer in flight. It remembers the stage that began it, for the clock.

    Args:
        finish: makes the result of the rows received; None if they are the result.
        transfer: its number in the recorder's log, if it has one.
        meets: the ranks that all wait for it; none of a send.

    Attributes:
        look: inspects the rows received before `finish` takes them; None without checks.
    """

    look: Look | None = None

    def __init__(
        self,
        recorder: Recorder,
        work: Work | None,
        received: Tensor,
        sent: Tensor | None = None,
        finish: Callable[[RowParts], Tensor] | None = None,
        transfer: int | None = None,
        meets: Sequence[int] = (),
    ) -> None:
        self._recorder, self._transfer = recorder, transfer
        profile = recorder.profile
        self._comm_op = None if profile is None else profile.comm_op(meets)
        self._work = work
        self._received, self._finish = received, finish
        self._sent = sent  # must outlive the transfer
        self._stage, self._layer = recorder.stage, recorder.layer
        is_metered = recorder.meter is not None and recorder.stage in _HIDEABLE
        self._posted_ns = monotonic_ns() if is_metered and work is not None else 0

    def wait(self) -> Tensor:
        """Block until the transfer is done, and give its result.

        Raises:
            PeerLostError: another rank is gone, sent something else, or did not answer in time.
            EpochEndedError: a later epoch has begun.
        """
        self._recorder.enter(self._stage, self._layer)
        if self._work is not None:
            needed_ns = monotonic_ns() if self._posted_ns else 0
            self._block(self._work.wait, self._transfer)
            if self._posted_ns and self._recorder.meter is not None:
                self._recorder.meter.transferred(self._posted_ns, needed_ns)
        self._sent = None
        if self._finish is None:
            if self.look is not None:
                self.look(self._received)
            return self._received
        if self._work is None:
            return self._finish(RowParts.of(self._received))
        return self._work.read(self._look_and_finish)

    def _look_and_finish(self, parts: RowParts) -> Tensor:
        assert self._finish is not None, "something is made of it"
        if self.look is not None:
            self.look(parts.tensor())
        return self._finish(parts)

    def let_go(self) -> None:
        """Block until a send goes on without this rank, which then waits for its next command."""
        self._recorder.enter(self._stage, self._layer)
        if self._work is not None:
            self._block(self._work.let_go)

    def _block(self, until: Callable[[], None], transfer: int | None = None) -> None:
        begin = self._recorder.begin_wait()
        until()
        self._recorder.end_wait(begin, transfer, self._comm_op)


class Group:
    """Ranks that exchange rows of two-dimensional tensors.

    Args:
        link: None for a group of one.
        ranks_per_node: consecutive global ranks that share a node.

    Attributes:
        ranks: [size]; global ranks, in group order.
        nodes: [size]; the node of each rank.
        rank: this rank's place in the group.
    """

    def __init__(
        self,
        link: Link | None,
        ranks: Sequence[int],
        rank: int,
        ranks_per_node: int,
        recorder: Recorder,
    ) -> None:
        self._link = link
        self.ranks = list(ranks)
        self.nodes = [each // ranks_per_node for each in ranks]
        self._recorder = recorder
        self.size = len(ranks)
        self.rank = self.ranks.index(rank)
        self._links = links_of(self.nodes, self.rank)

    def renew(self, link: Link | None) -> None:
        """Use a new epoch's link from now on."""
        self._link = link

    def _post(
        self,
        kind: TransferKind,
        rows: Tensor,
        num_rows: Sequence[int],
        metadata_bytes: int,
        num_real: NumReal | None,
        num_padded: int | None = None,
    ) -> int | None:
        """Count the rows about to be sent; the link pads each number to `num_padded`, if given."""
        row_bytes, real = rows.shape[1] * rows.itemsize, None
        if num_real is not None and self._recorder.is_recording:
            with self._recorder.uncounted():
                real = num_real()
        if num_padded is not None:
            real = num_rows if real is None else real
            num_rows = [num_padded] * self.size
        self._meter_sent(rows, num_rows)
        return self._recorder.post(
            kind, self.ranks, self.ranks, num_rows, row_bytes, metadata_bytes, real
        )

    def _padded_to(self, rows: Tensor, num_rows_of: Sequence[int]) -> int | None:
        link = self._link
        assert link is not None, "something is sent"
        return link.padded_to(num_rows_of, rows.shape[1] * rows.itemsize) if link.pads else None

    def _meter_sent(self, rows: Tensor, num_rows: Sequence[int]) -> None:
        if (meter := self._recorder.meter) is not None:
            meter.sent(self._links, num_rows, rows.shape[1] * rows.itemsize)

    def _exchange(
        self,
        kind: TransferKind,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        metadata_bytes: int,
        finish: Callable[[RowParts], Tensor] | None = None,
        num_real: NumReal | None = None,
    ) -> Pending:
        rows = rows.contiguous()
        if self._link is None:
            return Pending(self._recorder, None, rows, finish=finish)
        look = self._look_at(kind, rows, send, receive)
        padded = self._padded_to(rows, receive) if kind is TransferKind.ALL_GATHER else None
        transfer = self._post(kind, rows, send, metadata_bytes, num_real, padded)
        if finish is not None:
            work = self._link.all_to_all_parts(rows, send, receive)
            received = rows
        else:
            received = rows.new_empty((sum(receive), rows.shape[1]))
            if kind is TransferKind.ALL_GATHER:
                work = self._link.all_gather(rows, received, receive)
            else:
                work = self._link.all_to_all(rows, send, received, receive)
        self._recorder.posted()
        pending = Pending(self._recorder, work, received, rows, finish, transfer, self.ranks)
        pending.look = look
        return pending

    def _look_at(
        self, kind: TransferKind, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Look | None:
        """Inspect rows about to be sent; gives the function that inspects those received."""
        return None

    def empty(
        self, num_rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A buffer [num_rows, width] for rows that are sent once, in the transport's own memory.

        It must not be written to once its rows are sent.

        Args:
            like: gives the device, and the dtype if that is None.
        """
        if self._link is None:
            return like.new_empty((num_rows, width), dtype=dtype)
        return self._link.empty(num_rows, width, dtype or like.dtype)

    def all_to_all(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        metadata_bytes: int = 0,
        finish: Callable[[RowParts], Tensor] | None = None,
        num_real: NumReal | None = None,
    ) -> Pending:
        """Send consecutive rows to the ranks of the group, and get theirs in rank order.

        Args:
            rows: [sum(send), width].
            send, receive: [size]; numbers of rows, zeros allowed.
            metadata_bytes: bytes of each row that are no hidden state; only counted.
            finish: makes the result of the rows received, whose memory may be reused afterwards.
            num_real: rows to each rank without padding [size]; only counted.

        Returns:
            The transfer; its result is [sum(receive), width], or that of `finish`.
        """
        kind = TransferKind.ALL_TO_ALL
        return self._exchange(kind, rows, send, receive, metadata_bytes, finish, num_real)

    def all_gather(
        self,
        rows: Tensor,
        num_rows_of: Sequence[int],
        metadata_bytes: int = 0,
        num_real: NumReal | None = None,
    ) -> Pending:
        """Give every rank the rows of all, in rank order; numbers may be uneven or 0.

        Args:
            rows: [num_rows_of[self.rank], width].
            num_rows_of: [size]; rows of each rank.
            metadata_bytes, num_real: see `all_to_all`.

        Returns:
            The transfer; its result is [sum(num_rows_of), width].
        """
        to_each, kind = [rows.shape[0]] * self.size, TransferKind.ALL_GATHER
        return self._exchange(kind, rows, to_each, num_rows_of, metadata_bytes, None, num_real)

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int], num_real: NumReal | None = None
    ) -> Pending:
        """Add up every rank's rows, in float32 and in rank order; each rank gets its part.

        Args:
            rows: [sum(num_rows_of), width].
            num_rows_of: [size]; rows of the sum that each rank gets.
            num_real: see `all_to_all`.

        Returns:
            The transfer; its result is [num_rows_of[self.rank], width] in the dtype of `rows`.
        """
        if self._link is None:
            return Pending(self._recorder, None, rows)
        own, kind = [num_rows_of[self.rank]] * self.size, TransferKind.REDUCE_SCATTER
        rows = rows.contiguous()
        native = None
        if self._recorder.checks is None:  # checks need each rank's rows, not their sum
            native = self._link.reduce_scatter(rows, num_rows_of)
        if native is not None:
            work, received = native
            padded = self._padded_to(rows, num_rows_of)
            transfer = self._post(kind, rows, num_rows_of, 0, num_real, padded)
            self._recorder.posted()
            return Pending(
                self._recorder, work, received, rows, transfer=transfer, meets=self.ranks
            )
        return self._exchange(kind, rows, num_rows_of, own, 0, self._adder(rows), num_real)

    def gathered(
        self,
        rows: Tensor,
        num_rows_of: Sequence[int],
        metadata_bytes: int = 0,
        num_real: NumReal | None = None,
    ) -> "Steps[Tensor]":
        """`all_gather` and the wait for its result, in one call if nothing overlaps with it."""
        at_once = self._at_once()
        if at_once is None:
            return (yield self.all_gather(rows, num_rows_of, metadata_bytes, num_real))
        rows = rows.contiguous()
        to_each = [rows.shape[0]] * self.size
        look = self._look_at(TransferKind.ALL_GATHER, rows, to_each, num_rows_of)
        self._meter_sent(rows, to_each)
        received = self._recorder.wait_at_once(
            lambda: at_once(rows, to_each, num_rows_of, same_for_all=True)
        )
        if look is not None:
            look(received)
        return received

    def exchanged(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        metadata_bytes: int = 0,
        finish: Callable[[RowParts], Tensor] | None = None,
        num_real: NumReal | None = None,
    ) -> "Steps[Tensor]":
        """`all_to_all` and the wait for its result, in one call if nothing overlaps with it."""
        at_once = self._at_once()
        if at_once is None:
            return (yield self.all_to_all(rows, send, receive, metadata_bytes, finish, num_real))
        rows = rows.contiguous()
        self._meter_sent(rows, send)
        return self._recorder.wait_at_once(lambda: at_once(rows, send, receive, finish=finish))

    def reduced(
        self, rows: Tensor, num_rows_of: Sequence[int], num_real: NumReal | None = None
    ) -> "Steps[Tensor]":
        """`reduce_scatter` and the wait for its result, in one call if nothing overlaps with it."""
        if self._at_once() is None:
            return (yield self.reduce_scatter(rows, num_rows_of, num_real))
        own = [num_rows_of[self.rank]] * self.size
        return (yield from self.exchanged(rows, num_rows_of, own, 0, self._adder(rows)))

    def _at_once(self) -> AtOnce | None:
        """The link's one call; None if work overlaps, the step is counted, or nothing is sent."""
        if self._link is None or not self._recorder.may_wait_at_once:
            return None
        return self._link.at_once

    def _adder(self, rows: Tensor) -> Callable[[RowParts], Tensor]:
        ops = backend_for(rows.device)
        return lambda received: ops.sum_parts(received, self.size)

    def send(self, rows: Tensor, to: int) -> Pending | None:
        """Begin to send rows to the rank at place `to`; None where there are none to send."""
        if rows.shape[0] == 0:
            return None
        assert self._link is not None, "there is another rank"
        rows = rows.contiguous()
        row_bytes = rows.shape[1] * rows.itemsize
        if (meter := self._recorder.meter) is not None:
            meter.sent([self._links[to]], [rows.shape[0]], row_bytes)
        self._recorder.post(
            TransferKind.SEND, self.ranks, [self.ranks[to]], [rows.shape[0]], row_bytes
        )
        work = self._link.send(rows, to)
        self._recorder.posted()
        return Pending(self._recorder, work, rows)

    def receive(self, rows: Tensor, source: int) -> Pending:
        """Begin to fill `rows`, contiguous, from the rank at place `source`."""
        assert self._link is not None, "there is another rank"
        work = self._link.receive(rows, source) if rows.shape[0] else None
        meets = self.ranks[source], self.ranks[self.rank]
        return Pending(self._recorder, work, rows, meets=meets)


ResultT = TypeVar("ResultT")

# A computation as a generator: it yields each transfer that it waits for, and is sent its result.
# One batch exhausts one generator; two-batch overlap interleaves two, so that one computes while
# the other's tokens are sent.
Steps = Generator[Pending, Tensor, ResultT]


def interleave(computations: Sequence[Steps[ResultT]]) -> list[ResultT]:
    """Run computations in turn, each up to its next wait; give their results in order.

    The order of turns does not depend on sizes, so all ranks that run the same computations begin
    their transfers in the same order.
    """
    results: dict[int, ResultT] = {}
    waiting: deque[tuple[int, Pending | None]] = deque((i, None) for i in range(len(computations)))
    while waiting:
        index, pending = waiting.popleft()
        computation = computations[index]
        try:
            following = computation.send(pending.wait()) if pending else next(computation)
        except StopIteration as stop:
            results[index] = stop.value
        else:
            waiting.append((index, following))
    return [results[index] for index in range(len(computations))]


class CheckedGroup(Group):
    """A group that records checksums of gathered rows; of all its transfers if checks are full."""

    _recorder: CheckedRecorder

    def _look_at(
        self, kind: TransferKind, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Look | None:
        checks, place = self._recorder.checks, self._recorder.place
        is_gathered, number = kind is TransferKind.ALL_GATHER, 0
        if checks.is_full:
            sent = [rows] * self.size if is_gathered else torch.split(rows, list(send))
            number = checks.begin_transfer(self.ranks)
            checks.moved(self.ranks, number, place, self._of_others(sent), is_sent=True)
        elif not is_gathered:
            return None

        def look(received: Tensor) -> None:
            if is_gathered:
                checks.alike(self.ranks, checksum(received), place)
            if checks.is_full:
                came = self._of_others(torch.split(received, list(receive)))
                checks.moved(self.ranks, number, place, came, is_sent=False)

        return look

    def send(self, rows: Tensor, to: int) -> Pending | None:
        checks = self._recorder.checks
        if checks.is_full and rows.shape[0] and self._recorder.stage is Stage.HAND_OVER:
            place, number = self._recorder.place, self._number_of(self.rank, to)
            checks.moved(self.ranks, number, place, [(self.ranks[to], rows)], is_sent=True)
        return super().send(rows, to)

    def receive(self, rows: Tensor, source: int) -> Pending:
        checks, pending = self._recorder.checks, super().receive(rows, source)
        if not (checks.is_full and rows.shape[0] and self._recorder.stage is Stage.HAND_OVER):
            return pending
        number = self._number_of(source, self.rank)

        def look(received: Tensor) -> None:
            parts = [(self.ranks[source], received)]
            checks.moved(self.ranks, number, self._recorder.place, parts, is_sent=False)

        pending.look = look
        return pending

    def _number_of(self, source: int, to: int) -> int:
        """The number of a send, counted alike by its two ranks, apart from those to others."""
        return self._recorder.checks.begin_transfer((self.ranks[source], self.ranks[to]))

    def _of_others(self, parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        return [
            (rank, part)
            for rank, part in zip(self.ranks, parts, strict=True)
            if rank != self.ranks[self.rank] and part.shape[0]
        ]
