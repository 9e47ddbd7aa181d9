"""Memory of a rank's device: what is free, and the most that work has taken."""

from pathlib import Path
from typing import Protocol

import torch

from expertlane.engine.ops import host


class DeviceMemory(Protocol):
    """Bytes of a device, and of this process on it."""

    def free_and_total(self) -> tuple[int, int]:
        """What anybody can still allocate, and what there is."""
        ...

    def begin(self) -> None:
        """Forget the most so far."""
        ...

    def peak_bytes(self) -> int:
        """The most that this process has taken since, beyond what it had then; it is free again."""
        ...


def memory_of(device: torch.device) -> DeviceMemory:
    """That of a GPU, or of the host."""
    return GpuMemory(device) if device.type == "cuda" else HostMemory()


class GpuMemory:
    """By the driver's count and that of torch's allocator, which keeps what work has freed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def free_and_total(self) -> tuple[int, int]:
        """As `DeviceMemory`."""
        return torch.cuda.mem_get_info(self._device)

    def begin(self) -> None:
        """As `DeviceMemory`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        """As `DeviceMemory`."""
        torch.cuda.synchronize(self._device)
        num_bytes = torch.cuda.max_memory_reserved(self._device) - self._before
        torch.cuda.empty_cache()
        return num_bytes


_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


class HostMemory:
    """By the kernel's count of pages that are resident; Linux has it."""

    def __init__(self) -> None:
        self._before = 0

    def free_and_total(self) -> tuple[int, int]:
        """As `DeviceMemory`."""
        return host.memory_bytes()

    def begin(self) -> None:
        """As `DeviceMemory`."""
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        self._before = _status("VmRSS")

    def peak_bytes(self) -> int:
        """As `DeviceMemory`."""
        return max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """Bytes of a line of this process's status, which is in KiB."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
