"""Waiting for what a GPU was asked to do: it may itself wait for a rank that is lost."""

import time
from typing import Protocol

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.transport import PeerLostError

_SPIN_S = 1e-3  # looks without a pause: most of a step's wait is over by then, or takes far longer
_NAP_S = 5e-5  # between later ones


class Event(Protocol):
    """A place in a stream of work, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the stream has passed it; never waits."""
        ...


def await_event(event: Event, epoch: Epoch, timeout_s: float) -> None:
    """Block the host until the device has passed an event.

    Raises:
        EpochEndedError: a later one has begun, also if the event has passed: kernels of nccl that
            are aborted end with whatever is there.
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
