"""Ranks of this machine: started through the fork server; none is left when they end."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from expertlane.comm.progress import ProgressBoard
from expertlane.comm.region import Region
from expertlane.engine.fork_server import RankSettings, ServerSettings, python_command
from expertlane.engine.messages import (
    Channel,
    Decoder,
    Exit,
    Failure,
    FailureKind,
    Heartbeat,
    Message,
    MessageError,
    MessageKind,
    encode,
)
from expertlane.engine.rendezvous import Meeting, Place
from expertlane.errors import CapacityError, RankError, TerminatedError, UserError
from expertlane.ops.host import num_cores
from expertlane.spec.names import CpuIsa

MAX_RANKS_PER_CORE = 32
_KILL_TIMEOUT_S = 5.0
_PING_S = 1.0
_PING, _END = encode(MessageKind.PING, None), encode(MessageKind.END, None)
_SPIN_COUNT = "10000"  # some 0.2 ms


def check_num_ranks(num_ranks: int, *, oversubscribe: bool) -> None:
    """Refuse a number of local ranks that would only crawl.

    Raises:
        CapacityError: more than `MAX_RANKS_PER_CORE` a core, and not asked for explicitly.
    """
    limit = MAX_RANKS_PER_CORE * num_cores()
    if num_ranks > limit and not oversubscribe:
        raise CapacityError(
            f"{num_ranks} ranks are more than {MAX_RANKS_PER_CORE} × {num_cores()} cores; "
            f"use at most {limit}, or add --oversubscribe"
        )


class RunFiles:
    """Files that the ranks of a node share; those in memory have no name and leave nothing.

    Attributes:
        board: of the run's ranks, in the file `board_fd`; those of this node write to it.
        memory_fd: of the memory for messages; None where the system has no unnamed shared memory.
        wake_fds: [num_local_ranks]; eventfds, or none.
        store_path: the rendezvous file of ranks that are all on this node; where it is in memory,
            they inherit its descriptor.

    Raises:
        CapacityError: there is no room for them.
    """

    def __init__(self, world_size: int, num_local_ranks: int) -> None:
        self._descriptors: list[int] = []
        self.store_fd: int | None = None
        self.memory_fd: int | None = None
        self.wake_fds: list[int] = []
        self.store_path = ""
        try:
            self.board_fd = self._unnamed_file()
            self.board = ProgressBoard(world_size, self.board_fd)
            if hasattr(os, "memfd_create"):
                self.store_fd = self._unnamed_file()
                self.store_path = f"/proc/self/fd/{self.store_fd}"
                self.memory_fd = self._unnamed_file()
                os.ftruncate(self.memory_fd, Region(num_local_ranks).num_bytes)
                for _ in range(num_local_ranks):
                    self.wake_fds.append(os.eventfd(0, os.EFD_NONBLOCK))
                    self._descriptors.append(self.wake_fds[-1])
            else:
                descriptor, self.store_path = tempfile.mkstemp(prefix="expertlane-")
                os.close(descriptor)
        except OSError as error:
            self.close()
            raise CapacityError(f"no room for temporary files: {error}") from None

    def _unnamed_file(self) -> int:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("expertlane")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Leave nothing behind; the board can still be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self.store_fd is None and self.store_path:
            Path(self.store_path).unlink(missing_ok=True)


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    The first node of several is such a one too: `NodeRanks` adds the others.

    Args:
        cpu_isa: the largest instruction set that kernels may use; None as the environment says.
        meeting: where the ranks meet those of other nodes; None without.

    Attributes:
        channels: one a rank.
        controls: one a node; readable when it has news, such as that a rank has ended.
        board: where the ranks report their progress.
        ranks_per_node: how many a node has.
        stopped: ranks whose processes were stopped when their nodes last said so.
        on_told_to_end: called where a node was told to end; None to end all nodes at once.

    Raises:
        CapacityError: not enough file descriptors or temporary space for so many ranks.
    """

    def __init__(
        self,
        num_ranks: int,
        timeout_s: float,
        dtype: str | None,
        server_module: str = "expertlane.engine.fork_server",
        *,
        cpu_isa: CpuIsa | None = None,
        meeting: Meeting | None = None,
        launcher: Place | None = None,
    ) -> None:
        num_nodes = meeting.num_nodes if meeting else 1
        self.ranks_per_node = num_ranks
        self.stopped: set[int] = set()
        self._names = ["the fork server"]
        self._exit_codes: dict[int, int] = {}
        self._asked_s: dict[int, float] = {}  # when nodes were pinged that have not answered yet
        self._pinged_s = 0.0
        self._is_server_hung = False
        self.on_told_to_end: Callable[[], None] | None = None
        self._files = RunFiles(num_nodes * num_ranks, num_ranks)
        self.board = self._files.board
        self.channels: list[Channel] = []
        self.controls: list[Channel] = []
        first_rank = RankSettings(
            rank=0,
            world_size=num_nodes * num_ranks,
            local_rank=0,
            num_local_ranks=num_ranks,
            board_fd=self._files.board_fd,
            memory_fd=self._files.memory_fd,
            wake_fds=self._files.wake_fds,
            store_path=self._files.store_path,
            meeting=meeting,
            timeout_s=timeout_s,
            dtype=dtype,
        )
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._files.close)
            try:
                self._start(first_rank, launcher, server_module, cpu_isa)
            except OSError as error:
                raise CapacityError(f"cannot start {num_ranks} ranks: {error.strerror}") from error
            on_failure.pop_all()

    def _start(
        self,
        first_rank: RankSettings,
        launcher: Place | None,
        server_module: str,
        cpu_isa: CpuIsa | None,
    ) -> None:
        pairs = [socket.socketpair() for _ in range(1 + first_rank.num_local_ranks)]
        control, *of_ranks = [theirs.fileno() for _, theirs in pairs]
        settings = ServerSettings(
            parent_pid=os.getpid(),
            control_fd=control,
            rank_fds=of_ranks,
            store_fd=self._files.store_fd,
            first_rank=first_rank,
            launcher=launcher,
        )
        self._server = subprocess.Popen(
            python_command(server_module, [msgspec.json.encode(settings).decode()]),
            pass_fds=settings.descriptors(),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print in ranks must not mix with results
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the ranks
            env=rank_environment(cpu_isa, on_one_node=first_rank.meeting is None),
        )
        for _, theirs in pairs:
            theirs.close()
        self._add_node([ours for ours, _ in pairs], first_rank.timeout_s)

    def _add_node(self, connections: Sequence[socket.socket], timeout_s: float) -> None:
        control, *of_ranks = [Channel(connection, timeout_s) for connection in connections]
        self.controls.append(control)
        self.channels += of_ranks

    def ping(self) -> None:
        """Ask each node once a second how its ranks are; call it while waiting for them."""
        now_s = time.monotonic()
        if now_s - self._pinged_s < _PING_S:
            return
        self._pinged_s = now_s
        for node, control in enumerate(self.controls):
            if node not in self._asked_s:
                self._asked_s[node] = now_s
                with contextlib.suppress(OSError):  # its end is noticed elsewhere
                    control.send(_PING)

    def check_answers(self, bound_s: float, resumed_s: float) -> None:
        """Look for a node that is silent.

        Args:
            resumed_s: when this process went on after it was stopped itself.

        Raises:
            RankError: it has not answered for so long.
        """
        for node, asked_s in self._asked_s.items():
            if time.monotonic() - max(asked_s, resumed_s) > bound_s:
                self._is_server_hung = node == 0
                raise RankError(
                    f"{self._names[node]} hung: no answer for {bound_s:g} s; all ranks were ended"
                )

    def read_news(self, ready: Container[int]) -> None:
        """Read what nodes report, a message each.

        Args:
            ready: descriptors; only of these.

        Raises:
            RankError: a node has ended.
            TerminatedError, UserError: it could not go on.
        """
        for node, control in enumerate(self.controls):
            if control.fileno() in ready:
                self._read_node(node)

    def _read_node(self, node: int) -> Message | None:
        """Read one message; gives those that are not about ranks."""
        try:
            message = self.controls[node].receive()
            if message.kind is MessageKind.EXIT:
                self._take_exit(node, Decoder(Exit).decode(message))
            elif message.kind is MessageKind.HEARTBEAT:
                self._take_heartbeat(node, Decoder(Heartbeat).decode(message))
            elif message.kind is MessageKind.FAILURE:
                failure = Decoder(Failure).decode(message)
                if failure.kind is FailureKind.TERMINATED and self.on_told_to_end is not None:
                    self.on_told_to_end()
                    return None
                of_kind = {FailureKind.USER: UserError, FailureKind.TERMINATED: TerminatedError}
                raise of_kind.get(failure.kind, RankError)(failure.text)
            else:
                return message
        except BlockingIOError:
            name = self._names[node]
            raise RankError(f"{name} hung in a message; all ranks were ended") from None
        except (EOFError, OSError):
            raise self._lost(node) from None
        except MessageError as error:
            raise RankError(f"{self._names[node]} sent an invalid message: {error}") from None
        return None

    def _take_exit(self, node: int, report: Exit) -> None:
        if report.rank // self.ranks_per_node != node:
            raise MessageError(f"rank {report.rank} is not its own")
        self._exit_codes[report.rank] = report.code
        if node:  # those of this one write to the board themselves
            self.board.update(report.rank, report.line)

    def _take_heartbeat(self, node: int, heartbeat: Heartbeat) -> None:
        self._asked_s.pop(node, None)
        ranks = range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)
        if len(heartbeat.lines) != len(ranks):
            raise MessageError(f"{len(heartbeat.lines)} lines for {len(ranks)} ranks")
        self.stopped = self.stopped.difference(ranks).union(heartbeat.stopped)
        for rank, line in zip(ranks, heartbeat.lines if node else (), strict=bool(node)):
            self.board.update(rank, line)

    def _lost(self, node: int) -> RankError:
        if node:
            return RankError(f"{self._names[node]} is gone; all ranks were ended")
        code = self._server.wait(_KILL_TIMEOUT_S)
        return RankError(f"the fork server ended with exit code {code}; all ranks were ended")

    def exit_code(self, rank: int, timeout_s: float) -> int | None:
        """How a rank ended, negative for a signal; None if its node does not say in time.

        Raises:
            ExpertlaneError: as `read_news`.
        """
        node, until_s = rank // self.ranks_per_node, time.monotonic() + timeout_s
        while rank not in self._exit_codes and time.monotonic() < until_s:
            if wait([self.controls[node].fileno()], until_s - time.monotonic()):
                self._read_node(node)
        return self._exit_codes.get(rank)

    def close(self, *, failed: bool = False) -> None:
        """End all ranks and servers; leaves nothing behind here.

        Args:
            failed: whether supervisors are to end with an error.
        """
        if not failed:
            for control in self.controls[1:]:
                with contextlib.suppress(OSError):
                    control.send(_END)
        for channel in [*self.channels, *self.controls]:
            channel.close()  # a server kills what is left when it sees this
        try:
            self._server.wait(0 if self._is_server_hung else _KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_TIMEOUT_S)
        self._files.close()


def rank_environment(cpu_isa: CpuIsa | None, *, on_one_node: bool) -> dict[str, str]:
    """The environment of ranks.

    Kernels are chosen by it, since every process that computes chooses for itself.
    On one node, gloo goes over loopback, whatever the host's name resolves to. A thread of a
    parallel kernel waits a short while for the others, then sleeps: libgomp's own default keeps a
    core spinning for milliseconds, which other processes on it, the launcher first of all, need.
    """
    environment = dict(os.environ)
    environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if cpu_isa is not None:
        environment["EXPERTLANE_CPU_ISA"] = cpu_isa
    interfaces = {name for _, name in socket.if_nameindex()} if on_one_node else ()
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
