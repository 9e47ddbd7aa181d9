"""This host, without torch: cores and memory that this process may use, a rank's share, settings.

The ranks of a host divide its cores evenly, each within one NUMA node where that is possible, so
that the memory which a rank writes first lies on its own node. Ranks are pinned to their shares,
except where there are more ranks than cores, where a container's CPU quota is below its cores
(which others then use too), and where another engine is pinned to them (engines in other containers
are not seen). `EXPERTLANE_PIN=0` pins no rank; `EXPERTLANE_PIN=1` pins also beside other engines.
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from expertlane.errors import UserError


def _chosen(variable: str, *valid: str) -> str | None:
    """An environment variable's value; None where it is not set.

    Raises:
        UserError: it is not valid.
    """
    value = os.environ.get(variable) or None
    if value not in (None, *valid):
        raise UserError(f"{variable} is {value!r}; valid: {', '.join(valid)}")
    return value


def asked_backend() -> str | None:
    """`EXPERTLANE_BACKEND`; None where it is not set.

    Raises:
        UserError: there is no such backend.
    """
    return _chosen("EXPERTLANE_BACKEND", "cpu", "cuda", "torch")


def asked_transport() -> str | None:
    """`EXPERTLANE_TRANSPORT`; None where it is not set.

    Raises:
        UserError: there is no such transport.
    """
    return _chosen("EXPERTLANE_TRANSPORT", "shared_memory", "gloo")


def asked_set() -> str | None:
    """`EXPERTLANE_CPU_ISA`, not checked; None where it is not set."""
    return os.environ.get("EXPERTLANE_CPU_ISA") or None


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


def _asked_pin() -> str | None:
    return _chosen("EXPERTLANE_PIN", "0", "1")


Core = tuple[int, ...]  # its hardware threads, by the system's numbers

_SYSTEM = Path("/sys/devices/system")
_THREADS = Path("/proc/self/task")


@dataclass(frozen=True)
class Share:
    """Cores and threads of a rank.

    Attributes:
        num_cores: hardware threads of all ranks of this host, or a container's quota if less.
        num_threads: threads that this rank computes with: one for each core of its share.
        cpus: hardware threads that the rank is pinned to; empty where it is not pinned.
    """

    num_cores: int
    num_threads: int
    cpus: tuple[int, ...]


def allowed_cpus() -> frozenset[int]:
    """Hardware threads that this process may use; empty where the system cannot tell."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ())


def share_of(
    local_rank: int,
    num_local_ranks: int,
    system: Path = _SYSTEM,
    allowed: frozenset[int] | None = None,
) -> Share:
    """The share of one of this host's ranks.

    Args:
        allowed: hardware threads of all ranks together; by default those of this process, which is
            not pinned yet.

    Raises:
        UserError: `EXPERTLANE_PIN` is not valid.
    """
    wanted = _asked_pin()
    allowed = allowed_cpus() if allowed is None else allowed
    nodes, limit = read_nodes(allowed, system), num_cores()
    shares = divide(nodes, num_local_ranks)
    own = shares[local_rank] if shares and limit >= len(allowed) > 0 and wanted != "0" else ()
    num_each = min(sum(map(len, nodes)) or limit, limit) // num_local_ranks
    return Share(limit, max(1, num_each), tuple(sorted(cpu for core in own for cpu in core)))


def read_nodes(allowed: Iterable[int], system: Path = _SYSTEM) -> list[list[Core]]:
    """Usable cores by NUMA node.

    Args:
        allowed: hardware threads that may be used.
        system: a folder laid out as `/sys/devices/system`. Threads that no node lists count as one
            node more; a thread whose siblings are not listed is a core of its own.
    """
    cores: dict[int, Core] = {}
    for cpu in sorted(allowed):
        siblings = _read_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu]
        core = tuple(sorted(set(siblings) & {*allowed}))
        cores[min(core, default=cpu)] = core or (cpu,)
    folders = sorted(system.glob("node/node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    of_nodes = [set(_read_list(folder / "cpulist")) for folder in folders]
    nodes = [[core for first, core in cores.items() if first in node] for node in of_nodes]
    nodes.append([core for first, core in cores.items() if not any(first in n for n in of_nodes)])
    return [node for node in nodes if node]


def _read_list(path: Path) -> list[int]:
    """Numbers in a file with a list such as `0-3,8`; none where there is no such file."""
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",") if part]
    except OSError:
        return []
    return [cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)]


def divide(nodes: Sequence[Sequence[Core]], num_ranks: int) -> list[list[Core]]:
    """Cores of each rank, equally many; an empty list where there are more ranks than cores.

    Consecutive ranks are neighbours. Where the shares do not fit into nodes, ranks take cores in
    order across nodes: they wait for each other, so equal shares matter more.
    """
    num_each = sum(map(len, nodes)) // num_ranks
    if num_each == 0:
        return []
    pieces = [
        list(node[first : first + num_each])
        for node in nodes
        for first in range(0, len(node) - num_each + 1, num_each)
    ]
    if len(pieces) < num_ranks:
        cores = [core for node in nodes for core in node]
        pieces = [cores[rank * num_each : (rank + 1) * num_each] for rank in range(num_ranks)]
    return pieces[:num_ranks]


def pin(cpus: Sequence[int], system: Path = _SYSTEM, held: list[int] | None = None) -> bool:
    """Pin all present and later threads of this process to some hardware threads.

    Args:
        held: receives the descriptors of the locks on those threads; `unpin` takes it.

    Returns:
        Whether the process is pinned; False where another engine holds one of those threads.
    """
    if not cpus or {*cpus} == os.sched_getaffinity(0):
        return bool(cpus)
    if not _hold(cpus, system, [] if held is None else held) and _asked_pin() != "1":
        return False
    _move_threads(cpus)
    return True


def unpin(allowed: Iterable[int], held: list[int]) -> None:
    """Let all threads of this process run where they might before `pin`."""
    while held:
        os.close(held.pop())
    _move_threads([*allowed])


def _move_threads(cpus: Sequence[int]) -> None:
    for thread in _THREADS.iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cpus)


def _hold(cpus: Sequence[int], system: Path, held: list[int]) -> bool:
    """Lock some hardware threads until this process ends; False if another process holds one.

    The locks are on the system's own folders, which every user sees, so no file of ours is needed.
    Other containers do not see them: each has folders of its own.
    """
    for cpu in cpus:
        try:
            held.append(os.open(system / f"cpu/cpu{cpu}", os.O_RDONLY))
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            while held:
                os.close(held.pop())
            return False
        except OSError:  # no such folder, or no locks there: nobody can tell
            continue
    return True
