"""The seam to `torch.distributed`: gloo and nccl, by process groups of our own.

Nearly everything is built on the uneven all-to-all, because gloo has it uneven, empty and
asynchronous, and because on few cores it is several times cheaper there than gloo's own all-gather,
reduce-scatter or all-reduce of the same rows (docs/log.md). Only an all-gather
of many bytes goes by single sends and receives: an all-to-all would need a copy of the rows for
every rank.

There is no default group: each epoch has its groups, made under names of their own, and they are
aborted when it ends. No operation of torch can be waited for in slices (a wait for one of gloo's
receives that is over in time closes its connections), so a thread looks for the end of the epoch.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from expertlane.comm.epoch import LOOK_S, Epoch
from expertlane.comm.transport import AtOnce, PeerLostError
from expertlane.ops.row_parts import RowParts

_MANY_BYTES = 256 * 1024  # of a rank's rows in an all-gather
_TAG, _GATHER_TAG, _PAIRWISE_TAG, _ABORT_TAG = range(4)  # keep sends between the same ranks apart
_AT_ONCE = timedelta(milliseconds=1)

ResultT = TypeVar("ResultT")


@contextlib.contextmanager
def _blaming_peers(epoch: Epoch) -> Iterator[None]:
    """Turn the backend's errors into `PeerLostError`, or after its end `EpochEndedError`."""
    try:
        yield
    except RuntimeError as error:
        epoch.check()
        raise PeerLostError(str(error).splitlines()[0]) from error


class _Gloo:
    """A process group of gloo.

    Args:
        store: where its ranks meet.
        place: this rank's, of `size`.
    """

    def __init__(self, store: Store, place: int, size: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        self.group: Any = ProcessGroupGloo(store, place, size, timeout)
        self._others = [other for other in range(size) if other != place]
        self._num_devices = os.environ.get("GLOO_SOCKET_IFNAME", "").count(",") + 1

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives."""
        yield

    def abort(self) -> None:
        """End all operations: a receive that is over in time closes its device's connections.

        One whose connection is broken already fails earlier, and closes none.
        """
        tags = range(_ABORT_TAG, _ABORT_TAG + self._num_devices)
        for other, tag in itertools.product(self._others, tags):
            with contextlib.suppress(RuntimeError):
                self.group.recv([torch.empty(1)], other, tag).wait(_AT_ONCE)


class _Nccl:
    """A process group of nccl. Its abort has never run: docs/validation.md.

    Args:
        store: where its ranks meet.
        place: this rank's, of `size`.
    """

    def __init__(
        self, store: Store, place: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        self.group: Any = ProcessGroupNCCL(store, place, size, options)
        self.group.eager_connect_single_device(device)

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives, none of which can be waited for before all are."""
        self.group._start_coalescing()
        yield
        works[:] = [self.group._end_coalescing()]

    def abort(self) -> None:
        """End all operations."""
        self.group.abort()


class _TorchWork:
    def __init__(self, works: Sequence[Any], epoch: Epoch, received: Tensor | None = None) -> None:
        self._works, self._epoch, self._received = works, epoch, received

    def wait(self) -> None:
        with _blaming_peers(self._epoch):
            for work in self._works:
                work.wait()

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        assert self._received is not None, "it came in parts"
        return finish(RowParts.of(self._received))

    def let_go(self) -> None:
        """Threads of gloo and nccl see to it."""


class TorchLink:
    """Implements `Link`.

    Args:
        place: this rank's in the group, of `size`.
        device: of what is sent.
        over_links: gloo's messages go from node to node, where bytes take longer than calls.
    """

    at_once: AtOnce | None = None

    def __init__(
        self,
        backend: _Gloo | _Nccl,
        place: int,
        size: int,
        device: torch.device,
        epoch: Epoch,
        *,
        over_links: bool,
    ) -> None:
        self._backend, self._group = backend, backend.group
        self._place, self._size = place, size
        self._device, self._epoch = device, epoch
        self._over_links = over_links

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all_parts(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> _TorchWork:
        return self.all_to_all(rows, send, rows.new_empty(sum(receive), rows.shape[1]), receive)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _TorchWork:
        if self._over_links:
            return self._pairwise(rows, send, received, receive)
        with _blaming_peers(self._epoch):
            work = self._group.alltoall_base(received, rows, list(receive), list(send))
        return _TorchWork([work], self._epoch, received)

    def _pairwise(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _TorchWork:
        """An all-to-all whose receives are all posted before its sends.

        gloo sends nothing before the receiver has said that it is ready, on the connection that
        carries its own rows too: in gloo's all-to-all a late rank says so behind its rows.
        """
        parts, into = torch.split(rows, list(send)), torch.split(received, list(receive))
        group = self._group
        to = [(self._place + away) % self._size for away in range(1, self._size)]
        with _blaming_peers(self._epoch):
            works = [
                group.recv([into[place]], place, _PAIRWISE_TAG)
                for place in reversed(to)  # who sends to this rank first comes first
                if receive[place]
            ]
            works += [
                group.send([parts[place]], place, _PAIRWISE_TAG) for place in to if send[place]
            ]
        into[self._place].copy_(parts[self._place])
        return _TorchWork(works, self._epoch, received)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _TorchWork:
        size = self._size
        if max(num_rows_of) * rows.shape[1] * rows.itemsize < _MANY_BYTES:
            rows = rows.repeat(size, 1)
            return self.all_to_all(rows, [len(rows) // size] * size, received, num_rows_of)
        parts = torch.split(received, list(num_rows_of))
        works: list[Any] = []
        with _blaming_peers(self._epoch), self._backend.together(works):
            for away in range(1, size):  # every rank begins with another
                to, source = (self._place + away) % size, (self._place - away) % size
                if len(rows):
                    works.append(self._group.send([rows], to, _GATHER_TAG))
                if len(parts[source]):
                    works.append(self._group.recv([parts[source]], source, _GATHER_TAG))
        parts[self._place].copy_(rows)
        return _TorchWork(works, self._epoch)

    def send(self, rows: Tensor, to: int) -> _TorchWork:
        with _blaming_peers(self._epoch):
            return _TorchWork([self._group.send([rows], to, _TAG)], self._epoch)

    def receive(self, rows: Tensor, source: int) -> _TorchWork:
        with _blaming_peers(self._epoch):
            return _TorchWork([self._group.recv([rows], source, _TAG)], self._epoch)


def _settle(future: Future[ResultT], make: Callable[[], ResultT]) -> None:
    """Give a future what `make` gives, or raises."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # as above: errors keep the frames that they went through


class TorchTransport:
    """Implements `Transport` by a process group for each group.

    Args:
        device: of what is sent; nccl between GPUs, gloo otherwise.
        store: where the ranks of this epoch meet, and perhaps those of others.
        rank: the global one.
        timeout_s: the bound on any wait.
        epoch: its end ends any wait, and any `make`.
        over_links: as a `TorchLink`'s.
    """

    def __init__(
        self,
        device: torch.device,
        store: Store,
        rank: int,
        timeout_s: float,
        epoch: Epoch,
        *,
        over_links: bool,
    ) -> None:
        self._device, self._store, self._rank = device, store, rank
        self._timeout, self._epoch = timedelta(seconds=timeout_s), epoch
        self._over_links = over_links
        self._num_groups = 0
        self._backends: dict[tuple[int, ...], _Gloo | _Nccl] = {}
        self._is_left = threading.Event()
        self._watch = threading.Thread(target=self._abort_in_time, daemon=True)
        self._watch.start()

    def make(self, ranks: tuple[int, ...]) -> None:
        """The ranks of the group meet; the others only count it."""
        name = f"epoch-{self._epoch.number}/group-{self._num_groups}"
        self._num_groups += 1
        if self._rank in ranks:
            self._backends[ranks] = self._meet(PrefixStore(name, self._store), ranks)
            self._epoch.check()  # once it is among those that the watch aborts

    def _meet(self, store: Store, ranks: tuple[int, ...]) -> _Gloo | _Nccl:
        """In another thread, since nothing else ends a wait for who never comes.

        One that is left alone ends within the bound, or with its rank.
        """
        met: Future[_Gloo | _Nccl] = Future()
        make: Callable[[], _Gloo | _Nccl]
        arguments = store, ranks.index(self._rank), len(ranks), self._timeout
        if self._device.type == "cuda":
            make = partial(_Nccl, *arguments, self._device)
        else:
            make = partial(_Gloo, *arguments)
        threading.Thread(target=_settle, args=(met, make), daemon=True).start()
        try:
            with _blaming_peers(self._epoch):
                while True:
                    try:
                        return met.result(LOOK_S)
                    except TimeoutError:
                        self._epoch.check()
        finally:
            del met  # or its error would keep what led here, and so this epoch's memory

    def link(self, ranks: tuple[int, ...]) -> TorchLink:
        return TorchLink(
            self._backends[ranks],
            ranks.index(self._rank),
            len(ranks),
            self._device,
            self._epoch,
            over_links=self._over_links,
        )

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
        for backend in list(self._backends.values()):
            backend.abort()
