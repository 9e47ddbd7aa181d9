"""Bounded waits for a GPU, whose work may itself wait for a rank that is lost."""

import time
from typing import Protocol

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.transport import PeerLostError

_SPIN_S = 1e-3  # polls without a pause: a wait is mostly over by then, or takes far longer
_NAP_S = 5e-5  # between later polls


class Event(Protocol):
    """An event on a stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the stream has passed it; does not block."""
        ...


def await_event(event: Event, epoch: Epoch, timeout_s: float) -> None:
    """Block the host until the device has passed an event.

    Raises:
        EpochEndedError: a later epoch has begun, even if the event has passed: nccl's kernels end
            with any values when they are aborted.
        PeerLostError: it took longer than `timeout_s`.
    """
    began_s = time.monotonic()
    while not event.query():
        epoch.check()
        waited_s = time.monotonic() - began_s
        if waited_s >= timeout_s:
            raise PeerLostError(f"waited {timeout_s:g} s for the GPU, or for ranks it waits for")
        time.sleep(0.0 if waited_s < _SPIN_S else _NAP_S)  # other threads go on meanwhile
    epoch.check()
