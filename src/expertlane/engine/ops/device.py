"""A rank's device, beside what it computes: transfers, recorded graphs, and memory.

A step has one transfer each way, and the host waits for none that it need not. On GPUs the host's
side is pinned memory, which torch keeps until a transfer from or to it is over. Not yet run on a
GPU (docs/validation.md).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.ops import host

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


STAGED_BYTES = 16 * 1024**2  # of a buffer
_NUM_BUFFERS = 2


class _Slot(NamedTuple):
    buffer: Tensor  # [STAGED_BYTES] uint8
    is_free: Any  # an event on the device's stream


class Staging:
    """Copies to a GPU that the host does not wait for.

    Args:
        new_buffer: makes a buffer of that many bytes, pinned, so that the device can read it.
    """

    def __init__(self, new_buffer: Callable[[int], Tensor], new_event: Callable[[], Any]) -> None:
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


def is_recorded(device: torch.device) -> bool:
    """Whether the current stream is being captured, so that operations are recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CudaGraphs:
    """CUDA graphs: operations recorded once, and launched together without the host's work.

    They share one memory pool: a graph's results are gone once another graph runs, unless they were
    copied to memory from outside. Never run (docs/validation.md).
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._graphs: WeakSet[Any] = WeakSet()  # of that pool that are still there
        self._failed: list[Any] = []  # torch's allocator of pinned memory goes on asking them

    def capture(self, run: Callable[[], None], until: Callable[[Any], None]) -> Callable[[], None]:
        """Call `run` twice: once to execute it, which compiles kernels; once to record it.

        The graph keeps the addresses that operations used, and the values that the host had.

        Args:
            until: waits, with a bound, for an event of the stream: the first call may wait for
                ranks that are lost.

        Returns:
            A function that launches the recorded operations again.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                run()
                until(recorded_event())  # torch waits too when a capture begins, without a bound
        finally:  # of a call that is given up, too: it may still write where others will
            torch.cuda.current_stream().wait_stream(self._stream)
        if not self._graphs:  # torch takes no pool again whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # left for sure, as a capture that fails is not
            self._record(graph, run)
        self._graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def _record(self, graph: Any, run: Callable[[], None]) -> None:
        """Capture `run`; raise what it raises, also if the end of the capture fails then.

        The end fails where a group is aborted between a transfer's begin and the wait for it, which
        leaves a stream that nothing joins. Torch then leaves its allocator as if still capturing.
        """
        errors: list[Exception] = []
        try:
            # Other threads (nccl's watchdog asks for events) may go on meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    run()
                except Exception as error:
                    errors.append(error)
        except RuntimeError as error:
            errors.append(error)
            self._failed.append(graph)
            self._graphs = WeakSet()  # so the next capture has another pool
            with suppress(RuntimeError):  # it had not begun
                device = torch.cuda.current_device()
                torch._C._cuda_endAllocateToPool(device, self._pool)
                torch._C._cuda_releasePool(device, self._pool)
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()  # they keep the frames that they went through


class GpuMemory:
    """A GPU's memory, counted by the driver and by torch's allocator, which keeps freed blocks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def free_and_total(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        return torch.cuda.mem_get_info(self._device)

    def begin(self) -> None:
        """Release cached blocks, and reset the peak of torch's allocator."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        """Bytes that torch's allocator has reserved at most since `begin`, beyond those before."""
        torch.cuda.synchronize(self._device)
        num_bytes = torch.cuda.max_memory_reserved(self._device) - self._before
        torch.cuda.empty_cache()
        return num_bytes


_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


class HostMemory:
    """The host's memory, by the kernel's count of resident pages; Linux only."""

    def __init__(self) -> None:
        self._before = 0

    def free_and_total(self) -> tuple[int, int]:
        """Free and total bytes of the host, or of its container."""
        return host.memory_bytes()

    def begin(self) -> None:
        """Reset the peak of resident memory."""
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        self._before = _status("VmRSS")

    def peak_bytes(self) -> int:
        """Resident bytes at most since `begin`, beyond those before."""
        return max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """Bytes in a line of this process's status, which counts in KiB."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


DeviceMemory = GpuMemory | HostMemory


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of a GPU, or of the host."""
    return GpuMemory(device) if device.type == "cuda" else HostMemory()
