"""Transfers of a step between host and device: one each way, without blocking the host.

On GPUs the host's side is pinned memory, which torch keeps until a transfer from or to it is over.
Not yet run on a GPU (docs/validation.md).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Bytes, of each array among the others: Triton compiles a kernel anew for another alignment to 16.
_ALIGNMENT = 16

Array = npt.NDArray[Any]


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device in one transfer; on a CPU they are not copied."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpacked(packed(arrays).to(device, non_blocking=True), arrays)


def packed(arrays: Sequence[Array]) -> Tensor:
    """Concatenate the bytes of arrays, in pinned memory where there is a GPU."""
    *begins, num_bytes = _places(arrays)
    room = pinned(num_bytes)
    bytes_of_room = room.numpy()
    for array, begin in zip(arrays, begins, strict=True):
        place = bytes_of_room[begin : begin + array.nbytes].view(array.dtype)
        place.reshape(array.shape)[...] = array
    return room


def unpacked(room: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of the arrays in the result of `packed`, on any device.

    Args:
        arrays: arrays of the shapes and types that were packed.
    """
    return [
        room[begin : begin + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, begin in zip(arrays, _places(arrays), strict=False)
    ]


def _places(arrays: Sequence[Array]) -> list[int]:
    """The offset in bytes of each array, and the end of the last one."""
    sizes = (-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)
    return list(accumulate(sizes, initial=0))


_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


def pinned(num_bytes: int) -> Tensor:
    """[num_bytes] uint8; pinned where there is a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def to_host(tensors: Sequence[Tensor], until: Callable[[Any], None]) -> Sequence[Tensor]:
    """Copy tensors to the host in one transfer; on a CPU they are returned as they are.

    Args:
        until: waits for an event of the stream; not called where nothing is copied.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return tensors
    whole = joined(tensors)
    room = pinned(whole.numel())
    room.copy_(whole, non_blocking=True)
    arrived = parted(room, tensors)
    until(recorded_event())
    return arrived


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate the bytes of tensors, those of the widest types first."""
    parts = [tensors[number].contiguous() for number in _widest_first(tensors)]
    # A single value may have any stride, which a view as bytes refuses.
    flat = [part.as_strided((part.numel(),), (1,)) for part in parts]
    return torch.cat([part.view(torch.uint8) for part in flat])


def parted(whole: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the tensors in the result of `joined`, on any device.

    Args:
        tensors: tensors of the shapes and types that were joined.
    """
    order, found = _widest_first(tensors), list(tensors)
    pieces = torch.split(whole, [tensors[number].nbytes for number in order])
    for number, piece in zip(order, pieces, strict=True):
        like = tensors[number]
        found[number] = piece.view(like.dtype).view(like.shape)
    return found


def _widest_first(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda number: -tensors[number].itemsize)


def recorded_event() -> Any:
    """An event recorded on the current stream, after all work that it has been given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@contextmanager
def waits_raise(device: torch.device) -> Iterator[None]:
    """Within this, operations that make the host wait for a GPU raise RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)
