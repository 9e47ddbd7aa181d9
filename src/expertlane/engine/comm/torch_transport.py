"""The transport by `torch.distributed`: process groups of gloo and nccl that we make ourselves.

There is no default group: each epoch has its groups, made under names of their own, and they are
aborted when it ends. No operation of torch can be waited for in slices (a wait for one of gloo's
receives that times out closes its connections), so a thread watches for the end of the epoch.
"""

import fcntl
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from expertlane.engine.comm.epoch import LOOK_S, Epoch
from expertlane.engine.comm.torch_link import (
    Backend,
    Gloo,
    Nccl,
    NcclLink,
    TorchLink,
    blaming_peers,
)

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
