"""The transport by `torch.distributed`: process groups of gloo and nccl that we make ourselves.

There is no default group: each epoch has its groups, made under names of their own, and they are
aborted when it ends. No operation of torch can be waited for in slices (a wait for one of gloo's
receives that times out closes its connections), so a thread watches for the end of the epoch.

Nearly everything is built on the uneven all-to-all: gloo has it asynchronous and with uneven or
empty parts, and on few cores it is several times cheaper than gloo's own all-gather, reduce-scatter
or all-reduce of the same rows (docs/log.md). Only an all-gather of many bytes goes by single sends
and receives: an all-to-all would need a copy of the rows for every rank.

nccl has more collectives of its own. Its streams are those of torch's process group, not ours: each
group has one of its own, on which a transfer begins once the computing stream has come to where it
was asked for; a wait has the computing stream, not the host, wait for its end. A second stream of
ours would add two events to each transfer and overlap nothing more. Never run on a GPU
(docs/validation.md); padding is tested on gloo's process group.

Last, transports made of others: of several nodes, and of GPUs whose hosts exchange their rows.
Ranks that share a GPU, which nccl refuses, have their rows copied to the host, exchanged there, and
copied back. The host waits for the device before it sends, so nothing overlaps: this shows that
results are right, not how fast GPUs are. The copies have never run on a GPU.
"""

import contextlib
import fcntl
import itertools
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from expertlane.engine.comm.shared_memory import SharedTransport
from expertlane.engine.comm.transport import LOOK_S, Epoch, Link, PeerLostError, Transport, Work

_MOST_PADDED = 1.25  # padded over real rows, in a transfer of many bytes; not measured
_SUMMED = (torch.float16, torch.bfloat16)  # summed by nccl across nodes
_AT_ONCE = timedelta(milliseconds=1)
MANY_BYTES = 256 * 1024  # of a rank's rows in an all-gather
_TAG, _GATHER_TAG, _PAIRWISE_TAG, ABORT_TAG = range(4)  # keep sends between the same ranks apart


@contextlib.contextmanager
def blaming_peers(epoch: Epoch) -> Iterator[None]:
    """Turn the backend's errors into `PeerLostError`, or `EpochEndedError` if the epoch ended."""
    try:
        yield
    except RuntimeError as error:
        epoch.check()
        raise PeerLostError(str(error).splitlines()[0]) from error


class Gloo:
    """A process group of gloo.

    Args:
        store: the rendezvous of its ranks.
        place: this rank's place in the group, of `size`.
    """

    def __init__(self, store: Store, place: int, size: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        self.group: Any = ProcessGroupGloo(store, place, size, timeout)
        self._others = [other for other in range(size) if other != place]
        self._num_devices = os.environ.get("GLOO_SOCKET_IFNAME", "").count(",") + 1

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives, each with a wait of its own."""
        yield

    def abort(self) -> None:
        """Abort all operations by receives that time out, which close their device's connections.

        A receive whose connection is broken already fails earlier, and closes none.
        """
        tags = range(ABORT_TAG, ABORT_TAG + self._num_devices)
        for other, tag in itertools.product(self._others, tags):
            with contextlib.suppress(RuntimeError):
                self.group.recv([torch.empty(1)], other, tag).wait(_AT_ONCE)


class Nccl:
    """A process group of nccl. Its abort has never run: docs/validation.md.

    Args:
        store: the rendezvous of its ranks.
        place: this rank's place in the group, of `size`.
    """

    def __init__(
        self, store: Store, place: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        from torch.distributed import ProcessGroupNCCL

        # The epoch tells ranks that another is lost; by default torch would end their processes.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.is_high_priority_stream = True  # beside kernels that fill the GPU
        self.group: Any = ProcessGroupNCCL(store, place, size, options)
        self.group.eager_connect_single_device(device)

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives as one; `works` becomes the one wait for all of them."""
        self.group._start_coalescing()
        yield
        works[:] = [self.group._end_coalescing()]

    def abort(self) -> None:
        """Abort all operations: kernels that wait for other ranks end, with any values."""
        self.group.abort()


Backend = Gloo | Nccl


class TorchWork(Work):
    """Torch's works of a transfer.

    Args:
        sent: what must outlive the transfer.
        then: called after the wait.
    """

    def __init__(
        self,
        works: Sequence[Any],
        epoch: Epoch,
        received: Tensor | None = None,
        sent: Tensor | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        self._works, self._epoch, self.received = works, epoch, received
        self._sent, self._then = sent, then

    def wait(self) -> None:
        with blaming_peers(self._epoch):
            for work in self._works:
                work.wait()
        if self._then is not None:
            self._then()

    def let_go(self) -> None:
        """Return at once: threads of gloo and nccl go on with the send."""


class TorchLink(Link):
    """A link by a process group.

    Args:
        place: this rank's place in the group, of `size`.
        device: device of the rows.
        spans_nodes: the ranks of the group are on several nodes.
    """

    sends_in_pairs = True  # between nodes, where bytes take longer than calls

    def __init__(
        self,
        backend: Backend,
        place: int,
        size: int,
        device: torch.device,
        epoch: Epoch,
        *,
        spans_nodes: bool,
    ) -> None:
        self._backend, self._group = backend, backend.group
        self._place, self._size = place, size
        self._device, self._epoch = device, epoch
        self._spans_nodes = spans_nodes

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> TorchWork:
        if self._spans_nodes and self.sends_in_pairs:
            return self._pairwise(rows, send, received, receive)
        with blaming_peers(self._epoch):
            work = self._group.alltoall_base(received, rows, list(receive), list(send))
        return TorchWork([work], self._epoch, received)

    def _pairwise(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> TorchWork:
        """An all-to-all whose receives are all posted before its sends.

        gloo sends nothing before the receiver has said that it is ready, on the connection that
        carries its own rows too: in gloo's all-to-all a late rank says so behind its rows.
        """
        parts, into = torch.split(rows, list(send)), torch.split(received, list(receive))
        group = self._group
        to = [(self._place + away) % self._size for away in range(1, self._size)]
        with blaming_peers(self._epoch):
            works = [
                group.recv([into[place]], place, _PAIRWISE_TAG)
                for place in reversed(to)  # the rank that sends to this one first comes first
                if receive[place]
            ]
            works += [
                group.send([parts[place]], place, _PAIRWISE_TAG) for place in to if send[place]
            ]
        into[self._place].copy_(parts[self._place])
        return TorchWork(works, self._epoch, received)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> TorchWork:
        size = self._size
        if max(num_rows_of) * rows.shape[1] * rows.itemsize < MANY_BYTES:
            rows = rows.repeat(size, 1)
            return self.all_to_all(rows, [len(rows) // size] * size, received, num_rows_of)
        parts = torch.split(received, list(num_rows_of))
        works: list[Any] = []
        with blaming_peers(self._epoch), self._backend.together(works):
            for away in range(1, size):  # every rank begins with another
                to, source = (self._place + away) % size, (self._place - away) % size
                if len(rows):
                    works.append(self._group.send([rows], to, _GATHER_TAG))
                if len(parts[source]):
                    works.append(self._group.recv([parts[source]], source, _GATHER_TAG))
        parts[self._place].copy_(rows)
        return TorchWork(works, self._epoch)

    def send(self, rows: Tensor, to: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.send([rows], to, _TAG)], self._epoch)

    def receive(self, rows: Tensor, source: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.recv([rows], source, _TAG)], self._epoch)


class NcclLink(TorchLink):
    """A link with nccl's own all-gather, and its reduce-scatter of 16-bit values across nodes.

    `Group` computes other sums: inside a node every rank sends as many bytes either way, and nccl
    rounds after each rank (docs/design_decisions.md).
    """

    sends_in_pairs = False
    pads = True

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        most = max(num_rows_of)
        is_small = most * row_bytes < MANY_BYTES
        is_worth = is_small or most * self._size <= _MOST_PADDED * sum(num_rows_of)
        return most if is_worth else None

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> TorchWork:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if most is None:
            return super().all_gather(rows, received, num_rows_of)
        if not most:
            return TorchWork([], self._epoch)
        is_even = min(num_rows_of) == most
        whole = received if is_even else rows.new_empty(self._size * most, width)
        sent = _padded(rows, most)
        with blaming_peers(self._epoch):
            work = self._group._allgather_base(whole, sent)
        if is_even:
            return TorchWork([work], self._epoch, sent=sent)

        def cut() -> None:
            parts = whole.view(self._size, most, width)
            kept = [part[:num] for part, num in zip(parts, num_rows_of, strict=True)]
            torch.cat(kept, out=received)

        return TorchWork([work], self._epoch, sent=sent, then=cut)

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[TorchWork, Tensor] | None:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if not (self._spans_nodes and rows.dtype in _SUMMED and most):
            return None
        if min(num_rows_of) < most:
            parts = [_padded(part, most) for part in torch.split(rows, list(num_rows_of))]
            rows = torch.cat(parts)
        own = rows.new_empty(most, width)
        with blaming_peers(self._epoch):
            work = self._group._reduce_scatter_base(own, rows)
        return TorchWork([work], self._epoch, sent=rows), own[: num_rows_of[self._place]]


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """Rows padded to [num_rows, width] with uninitialized rows."""
    if len(rows) == num_rows:
        return rows
    padded = rows.new_empty(num_rows, rows.shape[1])
    padded[: len(rows)] = rows
    return padded


_HEAD = struct.Struct("<II")  # bytes of a key, and of its value
_POLL_S = 0.005
_BOUND = timedelta(minutes=5)  # the default of torch's stores


class FileStore(Store):
    """A `Store` with the operations that process groups need: set a key once, wait for it, get it.

    Args:
        descriptor: the file's, opened by this rank alone, and closed with the store.
        epoch: its end ends any wait.
    """

    def __init__(self, descriptor: int, epoch: Epoch) -> None:
        super().__init__()
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # writes of several ranks do not mix
        self._descriptor, self._epoch = descriptor, epoch
        weakref.finalize(self, os.close, descriptor)
        self._end = 0  # of what was read
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Add a key and its value, in one write, so that other ranks see all of it or nothing."""
        name, data = key.encode(), value.encode() if isinstance(value, str) else bytes(value)
        os.write(self._descriptor, _HEAD.pack(len(name), len(data)) + name + data)

    def get(self, key: str) -> bytes:
        """Wait for a key, and give its value."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta = _BOUND) -> None:
        """Wait until all keys are set.

        Raises:
            EpochEndedError: a later epoch has begun.
            RuntimeError: they were not set within `timeout`.
        """
        deadline_s = time.monotonic() + timeout.total_seconds()
        while not self._values.keys() >= set(keys):
            if self._read():
                continue
            self._epoch.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nobody has set {', '.join({*keys} - self._values.keys())}")
            time.sleep(_POLL_S)

    def _read(self) -> bool:
        """Read new records that are complete; gives whether there were any."""
        data, at = os.pread(self._descriptor, 1 << 20, self._end), 0
        while len(data) - at >= _HEAD.size:
            key_bytes, value_bytes = _HEAD.unpack_from(data, at)
            begin = at + _HEAD.size
            end = begin + key_bytes + value_bytes
            if end > len(data):
                break
            self._values[data[begin : begin + key_bytes].decode()] = data[begin + key_bytes : end]
            at = end
        self._end += at
        return at > 0


ResultT = TypeVar("ResultT")


def _settle(future: Future[ResultT], make: Callable[[], ResultT]) -> None:
    """Set a future to the result of `make`, or to the error that it raises."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # or its error would keep this frame, and this epoch's memory


class TorchTransport:
    """Implements `Transport` by a process group for each group.

    Args:
        device: device of the rows; nccl between GPUs, gloo otherwise.
        store: the rendezvous of this epoch's ranks, perhaps also that of other epochs.
        rank: this rank's global number.
        timeout_s: the bound on any wait.
        epoch: its end ends any wait, and any `make`.
        ranks_per_node: consecutive ranks that share a node.
    """

    def __init__(
        self,
        device: torch.device,
        store: Store,
        rank: int,
        timeout_s: float,
        epoch: Epoch,
        *,
        ranks_per_node: int,
    ) -> None:
        self._device, self._store, self._rank = device, store, rank
        self._timeout, self._epoch = timedelta(seconds=timeout_s), epoch
        self._ranks_per_node = ranks_per_node
        self._num_groups = 0
        self._backends: dict[tuple[int, ...], Backend] = {}
        self._is_left = threading.Event()
        self._watch = threading.Thread(target=self._abort_in_time, daemon=True)
        self._watch.start()

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group: its ranks meet; the others only count it, for the names of later groups."""
        name = f"epoch-{self._epoch.number}/group-{self._num_groups}"
        self._num_groups += 1
        if self._rank in ranks:
            self._backends[ranks] = self._meet(PrefixStore(name, self._store), ranks)
            self._epoch.check()  # once it is among those that the watch aborts

    def _meet(self, store: Store, ranks: tuple[int, ...]) -> Backend:
        """Make the process group in another thread, as a wait for a lost rank cannot be ended.

        A thread that is left behind ends within the bound, or with its rank.
        """
        met: Future[Backend] = Future()
        make: Callable[[], Backend]
        arguments = store, ranks.index(self._rank), len(ranks), self._timeout
        if self._device.type == "cuda":
            make = partial(Nccl, *arguments, self._device)
        else:
            make = partial(Gloo, *arguments)
        threading.Thread(target=_settle, args=(met, make), daemon=True).start()
        try:
            with blaming_peers(self._epoch):
                while True:
                    try:
                        return met.result(LOOK_S)
                    except TimeoutError:
                        self._epoch.check()
        finally:
            del met  # or its error would keep the frames that led here, and this epoch's memory

    def link(self, ranks: tuple[int, ...]) -> TorchLink:
        backend, place = self._backends[ranks], ranks.index(self._rank)
        spans_nodes = len({rank // self._ranks_per_node for rank in ranks}) > 1
        kind = NcclLink if isinstance(backend, Nccl) else TorchLink
        return kind(backend, place, len(ranks), self._device, self._epoch, spans_nodes=spans_nodes)

    def leave(self) -> None:
        self._is_left.set()
        self._watch.join()
        self._abort()
        self._backends.clear()

    def _abort_in_time(self) -> None:
        while not self._is_left.wait(LOOK_S):
            if self._epoch.has_ended:
                self._abort()
                return

    def _abort(self) -> None:
        """Abort all groups at the same time: each abort waits for its streams and graphs.

        Their work may be queued behind a kernel of another group, which waits for a lost rank until
        that group is aborted too.
        """
        ends: list[Future[None]] = []
        for backend in list(self._backends.values()):
            ends.append(Future())
            threading.Thread(target=_settle, args=(ends[-1], backend.abort), daemon=True).start()
        for end in ends:
            end.result()


class NodesTransport:
    """Implements `Transport` by one of two transports for each group.

    Args:
        in_node: transport of groups within this rank's node.
        among_nodes: transport of groups that span nodes.
        rank: global rank.
        ranks_per_node: consecutive ranks that share a node.
    """

    def __init__(
        self, in_node: SharedTransport, among_nodes: TorchTransport, rank: int, ranks_per_node: int
    ) -> None:
        self._in_node, self._among_nodes = in_node, among_nodes
        self._rank, self._ranks_per_node = rank, ranks_per_node

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group; collective over all ranks if it spans nodes, else over its node's ranks."""
        nodes = {rank // self._ranks_per_node for rank in ranks}
        if len(nodes) > 1:
            self._among_nodes.make(ranks)
        elif self._rank // self._ranks_per_node in nodes:
            self._in_node.make(ranks)

    def link(self, ranks: tuple[int, ...]) -> Link:
        is_in_node = len({rank // self._ranks_per_node for rank in ranks}) == 1
        return self._in_node.link(ranks) if is_in_node else self._among_nodes.link(ranks)

    def leave(self) -> None:
        self._in_node.leave()
        self._among_nodes.leave()


class _StagedWork(Work):
    """A transfer between hosts, and the copy to the device after it.

    Args:
        came: rows received, on the host; None for a send.
        received: on the device, of the same size; filled with them after the wait.
    """

    def __init__(
        self, work: Work, came: Tensor | None = None, received: Tensor | None = None
    ) -> None:
        self._work, self._came, self.received = work, came, received

    def wait(self) -> None:
        self._work.wait()
        if self._came is not None and self.received is not None:
            # Pinned memory: torch does not reuse it before the copy is over.
            self.received.copy_(self._came, non_blocking=True)
            self._came = None

    def let_go(self) -> None:
        self._work.let_go()


class StagedLink(Link):
    """A link for a device by a link between hosts."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _StagedWork:
        came = self._host_buffer(received)
        work = self._link.all_to_all(self._on_host(rows), send, came, receive)
        return _StagedWork(work, came, received)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _StagedWork:
        came = self._host_buffer(received)
        work = self._link.all_gather(self._on_host(rows), came, num_rows_of)
        return _StagedWork(work, came, received)

    def send(self, rows: Tensor, to: int) -> _StagedWork:
        return _StagedWork(self._link.send(self._on_host(rows), to))

    def receive(self, rows: Tensor, source: int) -> _StagedWork:
        came = self._host_buffer(rows)
        return _StagedWork(self._link.receive(came, source), came, rows)

    def _on_host(self, rows: Tensor) -> Tensor:
        """Copy rows to the host and wait, since a transport between hosts sends at once."""
        return self._host_buffer(rows).copy_(rows)

    def _host_buffer(self, like: Tensor) -> Tensor:
        is_pinned = self._device.type == "cuda"
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=is_pinned)


class StagedTransport:
    """Implements `Transport` for a device.

    Args:
        hosts: the transport between hosts.
    """

    def __init__(self, hosts: Transport, device: torch.device) -> None:
        self._hosts, self._device = hosts, device

    def make(self, ranks: tuple[int, ...]) -> None:
        self._hosts.make(ranks)

    def link(self, ranks: tuple[int, ...]) -> StagedLink:
        return StagedLink(self._hosts.link(ranks), self._device)

    def leave(self) -> None:
        self._hosts.leave()
