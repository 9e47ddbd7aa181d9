"""Ranks of this machine: started through the fork server; none is left when they end."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Container, Sequence
from multiprocessing.connection import wait

import msgspec

from expertlane.engine.fork_server import RankSettings, ServerSettings, python_command
from expertlane.engine.messages import (
    BeginEpoch,
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
from expertlane.engine.run_files import RunFiles
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


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    The first node of several is such a one too: `NodeRanks` adds the others.

    Args:
        cpu_isa: the largest instruction set that kernels may use; None as the environment says.
        meeting: where the ranks meet those of other nodes; None without.
        recovers: whether other ranks can take the places of lost ones, by `begin_epoch`.

    Attributes:
        channels: one a rank.
        controls: one a node; readable when it has news, such as that a rank has ended.
        board: where the ranks report their progress.
        ranks_per_node: how many a node has.
        pids: of ranks of this node that are up.
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
        recovers: bool = False,
    ) -> None:
        num_nodes = meeting.num_nodes if meeting else 1
        self.ranks_per_node = num_ranks
        self._timeout_s = timeout_s
        self.recovers = recovers
        self.pids: dict[int, int] = {}
        self.stopped: set[int] = set()
        self._names = ["the fork server"]
        self._exit_codes: dict[int, int] = {}
        self._asked_s: dict[int, float] = {}  # when nodes were pinged that have not answered yet
        self._pinged_s = 0.0
        self._is_server_hung = False
        self._epoch = 0
        self._not_begun: set[int] = set()  # nodes that are to say that they are in this epoch
        self._fenced: dict[int, list[Channel]] = {}  # by node, until it says so: see `begin_epoch`
        self._replaced: list[int] = []
        self._connected: list[int] = []
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
        self._files.leave_to_server()
        self._add_node([ours for ours, _ in pairs], first_rank.timeout_s)

    def _add_node(self, connections: Sequence[socket.socket], timeout_s: float) -> None:
        control, *of_ranks = [Channel(connection, timeout_s) for connection in connections]
        self.controls.append(control)
        self.channels += of_ranks

    def begin_epoch(self, epoch: int, lost: Collection[int], num_ranks: int | None = None) -> None:
        """Have nodes end ranks for certain, and start others; `is_beginning` until they have.

        The channels of the others are in `channels` once `take_connected` has given them.

        Args:
            num_ranks: that there are from then on, where all are of one node; the last ones end,
                and those to be started that are missing are in `lost`.

        Raises:
            CapacityError: no descriptors are left.
            RankError: a node is gone, or does not read.
        """
        self._epoch, self._not_begun = epoch, set(range(len(self.controls)))
        self._replaced = sorted(lost)
        if num_ranks is not None and num_ranks != len(self.channels):
            self._resize(num_ranks)
        for node, control in enumerate(self.controls):
            ranks = [rank for rank in self._replaced if rank // self.ranks_per_node == node]
            for rank in [rank for rank in ranks if self.channels[rank].fileno() >= 0]:
                self.pids.pop(rank, None)
                # Open until it is dead: one of another node that sees the end would end its server.
                self._fenced.setdefault(node, []).append(self.channels[rank])
            try:
                command = BeginEpoch(ranks, self.ranks_per_node)
                control.send(encode(MessageKind.BEGIN_EPOCH, command, epoch))
                self._connect_others(node, ranks)
            except BlockingIOError:
                raise self._hung_in_a_message(node) from None
            except OSError:
                raise self._lost(node) from None

    def _resize(self, num_ranks: int) -> None:
        """Have that many ranks on the only node; there are no channels of new ones yet."""
        assert len(self.controls) == 1, "ranks of several nodes keep their numbers"
        self._fenced.setdefault(0, []).extend(self.channels[num_ranks:])
        for rank in range(num_ranks, len(self.channels)):
            self.pids.pop(rank, None)
        missing = [_closed_channel() for _ in range(len(self.channels), num_ranks)]
        self.channels[:] = [*self.channels[:num_ranks], *missing]
        self.ranks_per_node = num_ranks

    def _connect_others(self, node: int, ranks: Sequence[int]) -> None:
        """New channels for ranks of a node; its server gets their other ends."""
        with contextlib.ExitStack() as sent:
            try:
                pairs = [socket.socketpair() for _ in ranks]
            except OSError as error:
                raise CapacityError(f"cannot replace ranks {ranks}: {error.strerror}") from error
            theirs = [sent.enter_context(end) for _, end in pairs]
            for rank, (ours, _) in zip(ranks, pairs, strict=True):
                self.channels[rank] = Channel(ours, self._timeout_s)
                self._connected.append(rank)
            self.controls[node].send_descriptors([end.fileno() for end in theirs])

    def connected(self) -> dict[int, Channel]:
        """Channels of ranks that were not replaced, or by others that are connected by now."""
        fenced = [channel for of_node in self._fenced.values() for channel in of_node]
        return {
            rank: channel
            for rank, channel in enumerate(self.channels)
            if channel.fileno() >= 0 and channel not in fenced
        }

    @property
    def is_beginning(self) -> bool:
        """Whether a node has yet to end ranks, and to start others."""
        return bool(self._not_begun)

    def acceptor(self) -> int | None:
        """A descriptor that is readable when ranks of other nodes connect; None without."""
        return None

    def take_connected(self) -> list[int]:
        """Ranks that have come to be connected since the last call; does not wait."""
        connected, self._connected = self._connected, []
        return connected

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
            elif message.kind is MessageKind.EPOCH_BEGUN:
                if message.epoch == self._epoch:
                    self._take_begun(node)
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
            raise self._hung_in_a_message(node) from None
        except (EOFError, OSError):
            raise self._lost(node) from None
        except MessageError as error:
            raise RankError(f"{self._names[node]} sent an invalid message: {error}") from None
        return None

    def _hung_in_a_message(self, node: int) -> RankError:
        return RankError(f"{self._names[node]} hung in a message; all ranks were ended")

    def _take_exit(self, node: int, report: Exit) -> None:
        if report.rank // self.ranks_per_node != node and node not in self._not_begun:
            raise MessageError(f"rank {report.rank} is not its own")
        self._exit_codes[report.rank] = report.code
        if node:  # those of this one write to the board themselves
            self.board.update(report.rank, report.line)

    def _take_heartbeat(self, node: int, heartbeat: Heartbeat) -> None:
        self._asked_s.pop(node, None)
        if node in self._not_begun:
            return  # it may have been of other ranks
        ranks = range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)
        if len(heartbeat.lines) != len(ranks):
            raise MessageError(f"{len(heartbeat.lines)} lines for {len(ranks)} ranks")
        self.stopped = self.stopped.difference(ranks).union(heartbeat.stopped)
        for rank, line in zip(ranks, heartbeat.lines if node else (), strict=bool(node)):
            self.board.update(rank, line)

    def _take_begun(self, node: int) -> None:
        """All that the node has said before was of older epochs."""
        self._not_begun.discard(node)
        for channel in self._fenced.pop(node, []):
            channel.close()
        for rank in self._replaced:
            if rank // self.ranks_per_node == node:
                self._exit_codes.pop(rank, None)
                self.stopped.discard(rank)
                if node:
                    self.board.reporter(rank)  # writes "setting up", as the node itself has

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
        fenced = [channel for of_node in self._fenced.values() for channel in of_node]
        for channel in [*self.channels, *self.controls, *fenced]:
            channel.close()  # a server kills what is left when it sees this
        try:
            self._server.wait(0 if self._is_server_hung else _KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_TIMEOUT_S)
        self._files.close()


def _closed_channel() -> Channel:
    channel = Channel(socket.socket())
    channel.close()
    return channel


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
