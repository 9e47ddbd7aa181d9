"""The rendezvous store of one node's ranks, in a file that they share.

torch's own `FileStore` ends the process if the file has been replaced when the store is destroyed,
and reads no further after a record that a killed rank has left half written.
"""

import fcntl
import os
import struct
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from expertlane.engine.comm.epoch import Epoch

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
