"""The protocol of `engine/ops/shared_memory.cpp` in Python, for where that cannot be compiled.

A message is described only once the one before it is read. A rank that publishes writes to the
others' eventfds, and one that waits polls its own. Python has no memory barriers, but a system call
is one: there is one between a payload and its counter, on both sides.
"""

import contextlib
import mmap
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.ops.row_parts import RowParts

_NUM_BEGUN, _NUM_PUBLISHED, _FIRST_PIECE, _NUM_PIECES, _PIECE_BYTES, _BLOCK, _NUM_FIELDS = range(7)
_LINE_WORDS = 8

Words = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass
class _Outgoing:
    """A message of this rank: its parts by place, and its block in the heap once described."""

    parts: list[Bytes]
    same_for_all: bool
    block: slice | None = None
    num_published: int = 0
    num_pieces: int = 0

    @property
    def is_out(self) -> bool:
        return self.block is not None and self.num_published == self.num_pieces


@dataclass
class _Incoming:
    sender: int
    message: int
    into: Bytes
    num_pieces: int = 0
    is_done: bool = False


@dataclass(eq=False)
class _Exchange:
    group: "_Group"
    outgoing: _Outgoing | None
    incoming: list[_Incoming]
    received: Tensor
    differing: int = -1

    @property
    def is_done(self) -> bool:
        is_out = self.outgoing is None or self.outgoing.is_out
        return is_out and all(each.is_done for each in self.incoming)


@dataclass
class _Group:
    """This rank's view of a group.

    Attributes:
        states: [sender, fields]; written by the sender.
        parts: [sender, place, 2]; offset in the block, and bytes, of each part of the message that
            is described.
        consumed: [consumer, sender]; pieces that the consumer has read, written by it.
        lent: the block of the last message, until all have read it.
        num_expected, num_taken: [sender]; messages waited for, and copied out.
    """

    place: int
    ranks: Sequence[int]
    states: Words
    parts: Words
    consumed: Words
    lent: slice | None = None
    queue: list[_Outgoing] = field(default_factory=list)
    num_expected: list[int] = field(default_factory=list)
    num_taken: list[int] = field(default_factory=list)

    def has_consumed_all(self, end_piece: int) -> bool:
        """Whether every other rank has read this rank's pieces before number `end_piece`."""
        return bool((np.delete(self.consumed[:, self.place], self.place) >= end_piece).all())


class UncompiledEndpoint:
    """Implements `Endpoint` in Python.

    Args:
        groups_bytes, heap_bytes: see `Region`.
        wake_fds: [num_ranks]; the ranks' eventfds.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        groups_bytes: int,
        heap_bytes: int,
        rank: int,
        wake_fds: Sequence[int],
    ) -> None:
        whole = np.frombuffer(memory, np.uint8)
        self._groups = whole[:groups_bytes].view(np.int64)
        heaps = whole[groups_bytes:][: len(wake_fds) * heap_bytes]
        self._heaps = heaps.reshape(len(wake_fds), heap_bytes)
        self._free = [slice(0, heap_bytes)]
        self._rank, self._wake_fds = rank, wake_fds
        self._poll = select.poll()
        self._poll.register(wake_fds[rank], select.POLLIN)
        self._exchanges: list[_Exchange] = []

    def group_bytes(self, size: int) -> int:
        return 8 * size * (_LINE_WORDS + 3 * size)

    def open_group(self, number: int, offset: int, place: int, ranks: Sequence[int]) -> _Group:
        size = len(ranks)
        words = self._groups[offset // 8 : (offset + self.group_bytes(size)) // 8]
        states, parts, consumed = np.split(words, np.cumsum([_LINE_WORDS * size, 2 * size * size]))
        group = _Group(
            place,
            ranks,
            states.reshape(size, _LINE_WORDS),
            parts.reshape(size, size, 2),
            consumed.reshape(size, size),
        )
        group.num_expected, group.num_taken = [0] * size, [0] * size
        return group

    def begin(
        self,
        group: _Group,
        rows: Tensor,
        send: Sequence[int],
        received: Tensor | None,
        receive: Sequence[int],
        *,
        same_for_all: bool,
    ) -> _Exchange:
        if received is None:
            received = rows.new_empty(sum(receive), rows.shape[1])
        out = [_bytes(rows)] * len(send) if same_for_all else _parts(rows, send)
        into, place = _parts(received, receive), group.place
        if receive[place] >= 0:
            into[place][:] = out[place]
        exchange = _Exchange(group, None, [], received)
        if any(num >= 0 for other, num in enumerate(send) if other != place):
            exchange.outgoing = _Outgoing(out, same_for_all)
            group.queue.append(exchange.outgoing)
        for sender, num in enumerate(receive):
            if num >= 0 and sender != place:
                message = group.num_expected[sender]
                group.num_expected[sender] += 1
                exchange.incoming.append(_Incoming(sender, message, into[sender]))
        self._exchanges.append(exchange)
        self._push(group)
        return exchange

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype)

    def read(self, exchange: _Exchange, finish: Callable[[RowParts], Tensor]) -> Tensor:
        return finish(RowParts.of(exchange.received))

    def wait(self, exchange: _Exchange, timeout_s: float) -> tuple[int, int]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._progress()
            if exchange.differing >= 0:
                return 2, exchange.differing
            if exchange.is_done:
                self._exchanges.remove(exchange)
                return 0, -1
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                missing = (each.sender for each in exchange.incoming if not each.is_done)
                return 1, next(missing, -1)
            self._poll.poll(1e3 * left_s)
            self._order()

    def _order(self) -> None:
        """Order memory by a system call, which also clears this rank's eventfd."""
        with contextlib.suppress(BlockingIOError):  # nothing new
            os.eventfd_read(self._wake_fds[self._rank])

    def _wake(self, group: _Group, places: Sequence[int]) -> None:
        for place in places:
            if place != group.place:
                os.eventfd_write(self._wake_fds[group.ranks[place]], 1)

    def _progress(self) -> None:
        for exchange in self._exchanges:
            self._push(exchange.group)
            for incoming in exchange.incoming:
                if not incoming.is_done:
                    self._copy_out(exchange, incoming)

    def _push(self, group: _Group) -> None:
        """Publish queued messages in order, as far as there is room."""
        while group.queue:
            message = group.queue[0]
            if message.block is None and not self._describe(group, message):
                return
            while message.num_published < message.num_pieces:
                if not self._publish_piece(group, message):
                    return
            group.queue.pop(0)

    def _describe(self, group: _Group, message: _Outgoing) -> bool:
        state, place = group.states[group.place], group.place
        if not group.has_consumed_all(int(state[_FIRST_PIECE] + state[_NUM_PIECES])):
            return False
        if group.lent is not None:
            self._give_back(group.lent)
            group.lent = None
        sizes = [0 if other == place else len(part) for other, part in enumerate(message.parts)]
        num_parts = 1 if message.same_for_all else len(sizes) - 1
        piece_bytes = max(1, min(max(sizes), self._heaps.shape[1] // 8 // num_parts))
        group.lent = message.block = self._take(num_parts * piece_bytes)
        if message.block is None:
            return False
        message.num_pieces = max(1, -(-max(sizes) // piece_bytes))
        offset = 0
        for other, size in enumerate(sizes):
            group.parts[place, other] = offset, size
            if other != place and not message.same_for_all:
                offset += piece_bytes
        state[_FIRST_PIECE] += state[_NUM_PIECES]
        state[_NUM_PIECES], state[_PIECE_BYTES] = message.num_pieces, piece_bytes
        state[_BLOCK] = message.block.start
        return True

    def _publish_piece(self, group: _Group, message: _Outgoing) -> bool:
        state, piece = group.states[group.place], message.num_published
        number = int(state[_FIRST_PIECE]) + piece
        if not group.has_consumed_all(number):  # one piece at a time
            return False
        assert message.block is not None, "it is described"
        block = self._heaps[self._rank, message.block]
        begin, most = piece * int(state[_PIECE_BYTES]), int(state[_PIECE_BYTES])
        for other, part in enumerate(message.parts):
            if other != group.place:
                offset = int(group.parts[group.place, other, 0])
                data = part[begin : begin + most]
                block[offset : offset + len(data)] = data
                if message.same_for_all:
                    break
        self._order()
        message.num_published += 1
        state[_NUM_PUBLISHED] = number + 1
        if piece == 0:
            state[_NUM_BEGUN] += 1
        self._wake(group, range(len(group.ranks)))
        return True

    def _copy_out(self, exchange: _Exchange, incoming: _Incoming) -> None:
        group, sender = exchange.group, incoming.sender
        state = group.states[sender]
        if group.num_taken[sender] != incoming.message or state[_NUM_BEGUN] <= incoming.message:
            return
        published = int(state[_NUM_PUBLISHED])
        self._order()
        offset, size = map(int, group.parts[sender, group.place])
        if size != len(incoming.into):
            exchange.differing = sender
            return
        first, most = int(state[_FIRST_PIECE]), int(state[_PIECE_BYTES])
        begin = int(state[_BLOCK]) + offset
        heap = self._heaps[group.ranks[sender]]
        before = incoming.num_pieces
        while incoming.num_pieces * most < size and first + incoming.num_pieces < published:
            into = incoming.into[incoming.num_pieces * most :][:most]
            into[:] = heap[begin : begin + len(into)]
            incoming.num_pieces += 1
        if incoming.num_pieces * most >= size:
            incoming.is_done = True
            group.num_taken[sender] += 1
            end_piece = first + int(state[_NUM_PIECES])
        elif incoming.num_pieces > before:
            end_piece = first + incoming.num_pieces
        else:
            return
        self._order()
        group.consumed[group.place, sender] = end_piece
        self._wake(group, [sender])

    def _take(self, num_bytes: int) -> slice | None:
        for index, free in enumerate(self._free):
            if free.stop - free.start >= num_bytes:
                self._free[index] = slice(free.start + num_bytes, free.stop)
                return slice(free.start, free.start + num_bytes)
        return None

    def _give_back(self, block: slice) -> None:
        merged: list[slice] = []
        for each in sorted([*self._free, block], key=lambda each: (each.start, each.stop)):
            if merged and merged[-1].stop == each.start:
                merged[-1] = slice(merged[-1].start, each.stop)
            elif each.stop > each.start:
                merged.append(each)
        self._free = merged


def _bytes(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def _parts(tensor: Tensor, num_rows: Sequence[int]) -> list[Bytes]:
    """Views of the bytes of consecutive rows, by part; empty for -1."""
    width = tensor.shape[1] * tensor.itemsize
    ends = np.cumsum([width * max(num, 0) for num in num_rows])
    return np.split(_bytes(tensor), ends)[: len(num_rows)]
