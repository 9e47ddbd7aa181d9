"""Copies of weights from mapped files to a GPU, through two pinned buffers of a fixed size.

A copy from pageable memory waits for the device. Here the two buffers take turns: one is filled
while the other is copied, in the order of the device's stream. Not yet run on a GPU
(docs/validation.md).
"""

from collections.abc import Callable
from itertools import cycle
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STAGED_BYTES = 16 * 1024**2  # of a buffer
_NUM_BUFFERS = 2


class Event(Protocol):
    """An event on a device's stream, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Record it after all work that the stream has been given so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has reached it; return at once if it was not recorded."""
        ...


class _Slot(NamedTuple):
    buffer: Tensor  # [STAGED_BYTES] uint8
    is_free: Event


class Staging:
    """Copies to a GPU that the host does not wait for.

    Args:
        new_buffer: makes a buffer of that many bytes, pinned, so that the device can read it.
    """

    def __init__(self, new_buffer: Callable[[int], Tensor], new_event: Callable[[], Event]) -> None:
        slots = [_Slot(new_buffer(STAGED_BYTES), new_event()) for _ in range(_NUM_BUFFERS)]
        self._slots = cycle(slots)

    def copy(self, to: Tensor, values: Tensor) -> None:
        """Fill a tensor on the device with values of the same shape on the host.

        A change of dtype happens on the device. The host waits for values larger than a buffer.
        """
        if values.nbytes > STAGED_BYTES:
            to.copy_(values)
            return
        buffer, is_free = next(self._slots)
        is_free.synchronize()
        staged = buffer[: values.nbytes].view(values.dtype).view(values.shape)
        staged.copy_(values)
        # `copy_` alone would change types on the host, in pageable memory.
        to.copy_(staged.to(to.device, non_blocking=True))
        is_free.record()


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def copier_to(device: torch.device) -> Callable[[Tensor, Tensor], object]:
    """A function (to, values) that fills a tensor on the device with values on the host."""
    if device.type == "cuda":
        return Staging(_pinned, torch.cuda.Event).copy
    return Tensor.copy_
