"""CPU cores and memory that this process may use on its host, with containers' limits."""

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: its affinity, or a container's quota if that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Microseconds of CPU time, and of the period; the first version of cgroups has two files.
    quota = _read("cpu.max").split() or [
        _read(f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        cores = min(cores or 1, max(1, int(quota[0]) // int(quota[1])))
    return cores or 1


def memory_bytes() -> tuple[int, int]:
    """Free and total bytes of memory, of the host or of the container if that has less."""
    memory = psutil.virtual_memory()
    limit = _read("memory.max").strip()
    if not limit.isdigit():
        return memory.available, memory.total
    used = int(_read("memory.current") or 0)
    return min(memory.available, max(0, int(limit) - used)), min(memory.total, int(limit))


def _read(name: str) -> str:
    try:
        return (_CGROUP / name).read_text()
    except OSError:
        return ""


class ForeignLoad:
    """CPU time that processes other than this one and its descendants use."""

    def __init__(self) -> None:
        self._began = self._used()

    def share(self) -> float:
        """The share of all cores that others used since this was made; 0 on an idle host."""
        busy, total, own = (now - then for now, then in zip(self._used(), self._began, strict=True))
        return min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0

    def _used(self) -> tuple[float, float, float]:
        """CPU seconds of all cores since boot: busy, in total, and used by us."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        own = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += used.user + used.system
        return sum(times[:8]) - idle, sum(times[:8]), own
