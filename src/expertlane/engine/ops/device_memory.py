"""Memory of a rank's device: what is free, and the peak that work has taken."""

from pathlib import Path
from typing import Protocol

import torch

from expertlane.engine.ops import host


class DeviceMemory(Protocol):
    """Free and total memory of a device, and the peak of this process on it."""

    def free_and_total(self) -> tuple[int, int]:
        """Bytes that any process can still allocate, and bytes in total."""
        ...

    def begin(self) -> None:
        """Reset the peak, and measure from now on."""
        ...

    def peak_bytes(self) -> int:
        """Peak bytes of this process since `begin`, beyond those it had then.

        Memory that work has freed is given back to the device.
        """
        ...


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of a GPU, or of the host."""
    return GpuMemory(device) if device.type == "cuda" else HostMemory()


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
