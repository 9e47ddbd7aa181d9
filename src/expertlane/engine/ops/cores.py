"""CPU cores of a rank: its share of those that this process may use, and pinning to them.

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

from expertlane.engine.ops.host import num_cores
from expertlane.errors import UserError

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
    wanted = _wanted()
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
    if not _hold(cpus, system, [] if held is None else held) and _wanted() != "1":
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


def _wanted() -> str | None:
    value = os.environ.get("EXPERTLANE_PIN") or None
    if value not in (None, "0", "1"):
        raise UserError(f"EXPERTLANE_PIN is {value!r}; valid: 0, 1")
    return value
