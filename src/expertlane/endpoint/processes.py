"""A server's processes on this machine, the ports and shared memory that they hold, what remains.

All of it from Linux's /proc: elsewhere nothing is known.
"""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from expertlane.errors import UserError
from expertlane.printable import printable
from expertlane.results.drill_record import LeftRecord
from expertlane.spec.layout import Layout

_SHM = "/dev/shm/"
_GONE = " (deleted)"
_LISTENS = "0A"
_STOPPED, _ZOMBIE = "Tt", "Z"
_MOST_TITLE = 48
_MOST_BYTES = 2**24  # of a file in /proc


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        began: when it began, in ticks since the machine was started: numbers are used again.
        state: as /proc has it: R, S, D, T, Z…
        name, line: its name, and its command line, which some change into a title.
    """

    pid: int
    began: int
    parent: int
    state: str
    name: str
    line: str

    @property
    def title(self) -> str:
        """Its command line, else its name; printable and short."""
        found = printable(self.name if "expertlane r" in self.name else self.line or self.name)
        return found if len(found) <= _MOST_TITLE else f"{found[:_MOST_TITLE]}…"


def processes() -> dict[int, Process]:
    """All processes that this one may see, by number; none where there is no /proc."""
    if sys.platform != "linux":
        return {}
    found = (_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {each.pid: each for each in found if each is not None}


def _process(pid: int) -> Process | None:
    stat, line = _read(f"/proc/{pid}/stat"), _read(f"/proc/{pid}/cmdline")
    # The name, in brackets, may have any character in it.
    head, _, rest = stat.rpartition(")")
    fields = rest.split()
    if len(fields) < 20:
        return None
    line = " ".join(line.replace("\0", " ").split())
    name = head.partition("(")[2]
    return Process(pid, int(fields[19]), int(fields[1]), fields[0], name, line)


def _read(path: str) -> str:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace")
    return ""


def below(root: int, found: Mapping[int, Process]) -> dict[int, Process]:
    """A process and all below it; empty if it is not there."""
    tree = {root} & found.keys()
    while more := {pid for pid, each in found.items() if each.parent in tree} - tree:
        tree |= more
    return {pid: found[pid] for pid in sorted(tree)}


def is_here(host: str) -> bool:
    """Whether a host's address is one of this machine."""
    try:
        addresses = {each[4][0] for each in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    for address in addresses:
        with suppress(ValueError, OSError):
            if ipaddress.ip_address(address).is_loopback:
                return True
            family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as own:
                own.bind((str(address), 0))  # only own addresses can be bound to
                return True
    return False


def server_at(port: int) -> int | None:
    """The process of this machine that listens at a port, the topmost of several; None without."""
    found, inodes = processes(), {inode for inode, at in _listening().items() if at == port}
    holders = {pid for pid in found if _sockets(pid) & inodes}
    tops = [pid for pid in holders if found[pid].parent not in holders]
    return min(tops, default=None)


def _listening() -> dict[str, int]:
    """Ports that are listened at, by the socket's inode."""
    ports = {}
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _read(path).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTENS:
                ports[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return ports


def _links(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                yield os.readlink(f"{folder}/{name}")


def _sockets(pid: int) -> set[str]:
    return {each[8:-1] for each in _links(pid) if each.startswith("socket:[")}


def _shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that a process has open or mapped."""
    maps = (line.split(maxsplit=5)[-1] for line in _read(f"/proc/{pid}/maps").splitlines())
    return {
        each for each in (*_links(pid), *maps) if each.startswith(_SHM) and not each.endswith(_GONE)
    }


@dataclass(frozen=True)
class Footprint:
    """Processes, ports and shared memory of a server on this machine at one moment.

    Attributes:
        root: its first process.
        tree: it and all below it.
        ports: ports that they listen at.
        files: files in /dev/shm that they have open or mapped.
    """

    root: Process
    tree: Mapping[int, Process] = field(default_factory=dict)
    ports: frozenset[int] = frozenset()
    files: frozenset[str] = frozenset()

    @classmethod
    def of(cls, root: int | None) -> "Footprint | None":
        """Footprint of a process and all below it; None if there is no such process."""
        tree = {} if root is None else below(root, processes())
        if root not in tree:
            return None
        listening = _listening()
        ports = {listening[each] for pid in tree for each in _sockets(pid) & listening.keys()}
        files = {each for pid in tree for each in _shared_memory(pid)}
        return cls(tree[root], tree, frozenset(ports), frozenset(files))

    def with_later(self, later: "Footprint | None") -> "Footprint":
        """With what it held later too."""
        if later is None:
            return self
        return Footprint(
            self.root,
            {**self.tree, **later.tree},
            self.ports | later.ports,
            self.files | later.files,
        )

    def left(self) -> list[LeftRecord]:
        """The parts of it that are still there and serve nobody.

        Processes and ports of a server that has ended, or processes that are stopped or dead where
        it goes on; shared memory that no process has open any more.
        """
        now = processes()
        same = {pid: each for pid, each in now.items() if _is_same(each, self.tree.get(pid))}
        goes_on = self.root.pid in same and same[self.root.pid].state != _ZOMBIE
        found = list(_left_processes(self.tree, same, goes_on=goes_on))
        if not goes_on:
            listening = {*_listening().values()}
            found += [LeftRecord("port", str(each)) for each in sorted(self.ports & listening)]
        there = {each for each in self.files if os.path.exists(each)}
        used = {each for pid in now for each in _shared_memory(pid)} if there else set()
        return [*found, *map(_shm_record, sorted(there - used))]


def _is_same(one: Process, other: Process | None) -> bool:
    return other is not None and one.began == other.began


def _left_processes(
    tree: Mapping[int, Process], same: Mapping[int, Process], *, goes_on: bool
) -> Iterator[LeftRecord]:
    for pid, each in same.items():
        how = "" if goes_on else "runs on"
        if each.state in _STOPPED:
            how = "is stopped"
        elif each.state == _ZOMBIE:
            how = "is dead, and not waited for" if goes_on else ""
        if how:
            yield LeftRecord("process", f"{pid} ({tree[pid].title}) {how}")


def _shm_record(path: str) -> LeftRecord:
    size = 0
    with suppress(OSError):
        size = Path(path).stat().st_size
    return LeftRecord("shared memory", printable(path), size)


def rank_process(root: int, patterns: Sequence[str], layout: Layout, rank: int) -> Process:
    """The process of a rank of a layout.

    Args:
        root: the server's first process.
        patterns: of the titles of ranks, one of each engine that the server may be, with groups
            `rank`, or `dp`, `pp`, `tp` and `in_stage`; what a title lacks is looked for in those of
            the processes above it.

    Raises:
        UserError: there is none, or another layout's.
    """
    tree = below(root, processes())
    several = (_places(tree, pattern) for pattern in patterns)
    places = next((each for each in several if each), {})
    parents = {tree[pid].parent for pid in places}
    ranks: dict[int, Process] = {}
    for pid in places.keys() - parents:
        place, above = dict(places[pid]), tree[pid].parent
        while above in tree:
            for name, value in places.get(above, {}).items():
                place[name] = place.get(name) or value
            above = tree[above].parent
        found = _rank_at({name: int(value or 0) for name, value in place.items()}, layout)
        if found in ranks:
            raise UserError(
                f"--rank {rank}: {ranks[found].title} and {tree[pid].title} are the same rank in "
                f"layout {layout}; give the server's --layout"
            )
        ranks[found] = tree[pid]
    if rank not in ranks:
        known = ", ".join(map(str, sorted(ranks))) or "none were found"
        raise UserError(f"--rank {rank}: the server's ranks are {known}")
    return ranks[rank]


def _places(tree: Mapping[int, Process], pattern: str) -> dict[int, dict[str, str | None]]:
    """Groups that a pattern matches in the titles of processes, by process id."""
    return {
        pid: found.groupdict()
        for pid, each in tree.items()
        if (found := re.search(pattern, each.line) or re.search(pattern, each.name)) is not None
    }


def _rank_at(place: Mapping[str, int], layout: Layout) -> int:
    if "rank" in place:
        return place["rank"]
    in_stage = place.get("in_stage", 0)
    if layout.dp == 1 or in_stage < layout.tp:  # within its data-parallel rank
        in_stage = place.get("dp", 0) * layout.tp + (in_stage or place.get("tp", 0))
    return place.get("pp", 0) * layout.stage_size + in_stage
