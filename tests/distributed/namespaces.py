"""Nodes with networks of their own on one machine: network namespaces, and links between them.

Needs root, `ip` and a kernel that has virtual links. Addresses begin with 10.213 or 10.214, and
should not be in use here.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

_LINK, _TO_CLIENTS = "node", "front"


def why_not() -> str:
    """Why this machine cannot have such nodes; empty if it can."""
    if os.geteuid():
        return "only root may make network namespaces"
    name = f"expertlane-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
        finally:
            _ip("netns", "del", name)
    except FileNotFoundError:
        return "there is no `ip` (package iproute2)"
    except subprocess.CalledProcessError as error:
        return f"the system makes no network namespaces: {error.stderr.strip()}"
    return ""


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def clear_left() -> None:
    """End what is in namespaces of processes that were killed before they could."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        kind, _, number = name.partition("-")
        if kind != "expertlane" or psutil.pid_exists(int(number.partition("-")[0])):
            continue
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", name)


class TwoHosts:
    """Two hosts that reach each other by one link, and the first one from here by another.

    Attributes:
        address: of each, on the link between them.
        front: of the first one, as it is reached from here.
    """

    def __init__(self) -> None:
        self.names = [f"expertlane-{os.getpid()}-{number}" for number in range(2)]
        own = os.getpid() % 250  # others may run at the same time
        self.address = [f"10.213.{own}.{number + 1}" for number in range(2)]
        self.front, self._client = f"10.214.{own}.1", f"10.214.{own}.2"
        self.processes: list[list[subprocess.Popen[str]]] = [[], []]
        self._outside = f"el{os.getpid()}"[:15]
        clear_left()
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        peer = ["peer", "name", _LINK, "netns", second]
        _ip("-n", first, "link", "add", _LINK, "type", "veth", *peer)
        for name, address in zip(self.names, self.address, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", _LINK)
            _ip("-n", name, "link", "set", _LINK, "up")
        peer = ["peer", "name", _TO_CLIENTS, "netns", first]
        _ip("link", "add", self._outside, "type", "veth", *peer)
        _ip("-n", first, "addr", "add", f"{self.front}/24", "dev", _TO_CLIENTS)
        _ip("-n", first, "link", "set", _TO_CLIENTS, "up")
        _ip("addr", "add", f"{self._client}/24", "dev", self._outside)
        _ip("link", "set", self._outside, "up")

    def run(
        self, host: int, command: Sequence[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own; both outputs are added to a file."""
        with log.open("a") as file:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": _LINK} | environment,
            )
        self.processes[host].append(started)
        return started

    def cut(self) -> None:
        """Take the link between the hosts down, on the second one's side."""
        _ip("-n", self.names[1], "link", "set", _LINK, "down")

    def mend(self) -> None:
        """Bring it up again."""
        _ip("-n", self.names[1], "link", "set", _LINK, "up")

    def mute(self, host: int) -> None:
        """Drop all that a host sends to the other one; what that sends still arrives."""
        self._queue(host, "add", "pfifo", "limit", "0")

    def unmute(self, host: int) -> None:
        """No longer."""
        self._queue(host, "del")

    def _queue(self, host: int, action: str, *kind: str) -> None:
        command = ["tc", "-n", self.names[host], "qdisc", action, "dev", _LINK, "root", *kind]
        subprocess.run(command, check=True, capture_output=True)

    def pids(self, host: int) -> list[int]:
        """All processes of a host."""
        return sorted(int(line) for line in _ip("netns", "pids", self.names[host]).split())

    def supervisors(self, host: int) -> list[psutil.Process]:
        """Processes that fork the ranks of a host."""
        return list(
            self._running(host, ("ranks.supervisor import main", "ranks.fork_server import main"))
        )

    def ranks(self, host: int) -> list[psutil.Process]:
        """Processes that compute on a host."""
        found = []
        for supervisor in self.supervisors(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += supervisor.children()
        return found

    def _running(self, host: int, words: Sequence[str]) -> Iterator[psutil.Process]:
        """Those with one of these in their commands, and not forked from another such one."""
        for pid in self.pids(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                command, parent = process.cmdline(), process.parent()
                is_one = any(word in " ".join(command) for word in words)
                if is_one and (parent is None or parent.cmdline() != command):
                    yield process

    def crash(self, host: int) -> None:
        """End all processes of a host at once, as when its power is lost."""
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes[host]:
            process.wait()
        self.processes[host].clear()

    def close(self) -> None:
        """Leave no process, no namespace and no link."""
        for host, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.crash(host)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._outside)
