"""Ranks of this machine, which a fork server starts; no process is left behind when they end.

A node is what the launcher knows of a machine: a connection to its fork server, and the changes of
ranks that it has not confirmed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

import msgspec

from expertlane.engine.ranks.fork_server import python_command
from expertlane.engine.ranks.messages import (
    ChangeRanks,
    Channel,
    Decoder,
    Exit,
    Failure,
    FailureKind,
    Heartbeat,
    Message,
    MessageError,
    MessageKind,
    StartResult,
    encode,
)
from expertlane.engine.ranks.processes import is_stopped
from expertlane.engine.ranks.rank_settings import (
    RankSettings,
    RunFiles,
    ServerSettings,
    rank_environment,
)
from expertlane.engine.ranks.rendezvous import Meeting, Place
from expertlane.errors import CapacityError, RankError, TerminatedError, UserError, no_room
from expertlane.spec.names import CpuIsa

_KILL_TIMEOUT_S = 5.0
_END = encode(MessageKind.END, None)
_PING = encode(MessageKind.PING, None)
_ANSWERS = {
    MessageKind.BEGIN_EPOCH: MessageKind.EPOCH_BEGUN,
    MessageKind.START_RANKS: MessageKind.RANKS_STARTED,
}
GONE = "is gone"


def gone(error: Exception) -> str:
    """A text for the loss of a node whose connection broke."""
    why = getattr(error, "strerror", None)
    return f"is gone ({why})" if why else GONE


@dataclass(frozen=True, eq=False)
class NodeChange:
    """Ranks that a node ends and starts.

    Attributes:
        kind: kind of the message that requests the change.
        fenced: channels of ranks that end, kept open until these are dead: a rank of another node
            that sees its channel closed would end its server.
    """

    kind: MessageKind
    starts: Collection[int]
    fenced: list[Channel]


class Node:
    """A node of the run.

    Args:
        control: a channel to the fork server of its ranks.
        name: that server's name in messages.

    Attributes:
        asked_s: time of the last ping, if it is not answered yet.
        changes: changes that are requested and not confirmed yet, in order.
    """

    def __init__(self, control: Channel, name: str) -> None:
        self.control, self.name = control, name
        self.asked_s: float | None = None
        self.changes: deque[NodeChange] = deque()

    def ping(self, now_s: float) -> None:
        """Ping it, unless the last ping is not answered yet.

        Raises:
            OSError: the connection is closed.
        """
        if self.asked_s is None and self.control.fileno() >= 0:
            self.asked_s = now_s
            self.control.send(_PING)

    def change(self, change: NodeChange, asked: ChangeRanks, epoch: int) -> None:
        """Request a change; the node makes changes in order.

        Raises:
            BlockingIOError, OSError: the node does not read, or is gone.
        """
        self.changes.append(change)
        self.control.send(encode(change.kind, asked, epoch))

    def take_changed(self, kind: MessageKind) -> NodeChange:
        """Confirm the first pending change; earlier messages of the node were about older ranks.

        Raises:
            MessageError: no such change was requested.
        """
        if not self.changes or _ANSWERS[self.changes[0].kind] is not kind:
            raise MessageError(f"{kind.name} was not expected")
        change = self.changes.popleft()
        for channel in change.fenced:
            channel.close()
        return change

    def fence(self, channel: Channel) -> None:
        """Close a rank's channel, but not before the pending changes have ended the rank."""
        if self.changes:
            self.changes[-1].fenced.append(channel)
        else:
            channel.close()

    @property
    def is_beginning(self) -> bool:
        """Whether the node has not begun the requested epoch yet."""
        return any(change.kind is MessageKind.BEGIN_EPOCH for change in self.changes)

    def is_starting(self, rank: int) -> bool:
        """Whether its messages about a rank may be about an earlier process of that number."""
        return any(rank in change.starts for change in self.changes)

    def lose(self) -> None:
        """Close the connection of a lost node, and drop its unanswered requests."""
        self.close()
        self.asked_s = None
        self.changes.clear()

    def close(self) -> None:
        """Close the connection, which ends the node's server and ranks."""
        for channel in [self.control, *(each for c in self.changes for each in c.fenced)]:
            channel.close()


def socket_pair(on_failure: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection, which the stack closes.

    Raises:
        OSError: no descriptors are left.
    """
    ours, theirs = socket.socketpair()
    return on_failure.enter_context(ours), on_failure.enter_context(theirs)


def connections_for(ranks: Sequence[int]) -> list[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection for each rank.

    Raises:
        CapacityError: no descriptors are left.
    """
    with contextlib.ExitStack() as on_failure:
        try:
            pairs = [socket_pair(on_failure) for _ in ranks]
        except OSError as error:
            raise CapacityError(f"cannot start ranks {ranks}: {no_room(error)}") from None
        on_failure.pop_all()
    return pairs


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    They are also the first node of several: `NodeRanks` adds the others.

    Args:
        cpu_isa: the largest instruction set that kernels may use; None leaves it to the
            environment.
        meeting: the rendezvous with other nodes; None without any.
        launcher: this process's place, to be published to them; None without any.
        recovers: whether other ranks can take the places of lost ones, by `begin_epoch`.

    Attributes:
        channels: one for each rank; closed while a rank has no process, or none that has connected.
        nodes: the nodes, the launcher's own first.
        board: the progress board of all ranks.
        ranks_per_node: ranks of each node in this epoch; a single node may have more ahead of it.
        pids: processes of this node's ranks that are up.
        missing: by rank, why its node could not start it ahead of an epoch. The reader removes
            entries.
        stopped: ranks whose processes were stopped at their nodes' last report.
        accepts: ranks and nodes may connect later, and nodes may be lost and come back.
        on_told_to_end: called when a node was told to end; None to end all nodes at once.

    Raises:
        CapacityError: not enough file descriptors or temporary space for so many ranks.
    """

    accepts = False

    def __init__(
        self,
        num_ranks: int,
        timeout_s: float,
        dtype: str | None,
        server_module: str = "expertlane.engine.ranks.fork_server",
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
        self._exit_codes: dict[int, int] = {}
        self.missing: dict[int, str] = {}
        self._is_server_hung = False
        self._num_changes = 0
        self._has_connected = False
        self._nobody = Channel(socket.socket())
        self._nobody.close()
        self.on_told_to_end: Callable[[], None] | None = None
        self._files = RunFiles(num_nodes * num_ranks, num_ranks)
        self.board = self._files.board
        first_rank = RankSettings.of_first(0, num_ranks, self._files, meeting, timeout_s, dtype)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._files.close)
            try:
                pairs = [socket_pair(on_failure) for _ in range(1 + num_ranks)]
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
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends ranks
                    env=rank_environment(cpu_isa, on_one_node=meeting is None),
                )
            except OSError as error:
                raise CapacityError(f"cannot start the ranks: {no_room(error)}") from error
            on_failure.pop_all()
        for _, theirs in pairs:
            theirs.close()
        self._files.leave_to_server()
        own, *self.channels = [Channel(ours, timeout_s) for ours, _ in pairs]
        self.nodes = [Node(own, "the fork server")]

    def node_of(self, rank: int) -> int:
        """The number of the node that a rank is on, or will be."""
        return rank // self.ranks_per_node if len(self.nodes) > 1 else 0

    def begin_epoch(
        self, epoch: int, ends: Collection[int], starts: Collection[int], num_ranks: int
    ) -> None:
        """Have nodes end ranks for certain, and start others; `is_beginning` until they have.

        Args:
            num_ranks: ranks of the epoch; as many as before where there are several nodes.

        Raises:
            CapacityError: no descriptors are left.
            RankError: a node is gone, or does not read.
        """
        if len(self.nodes) == 1:
            self.ranks_per_node = num_ranks
        assert num_ranks == len(self.nodes) * self.ranks_per_node, "nodes keep their ranks"
        for node in range(len(self.nodes)):
            self._change(node, MessageKind.BEGIN_EPOCH, ends, starts, epoch)

    def change(self, *, ends: Collection[int] = (), starts: Collection[int] = ()) -> None:
        """Have nodes end ranks that are ahead of the next epoch, and start others that will be.

        Raises:
            CapacityError: no descriptors are left.
            RankError: a node is gone, or does not read.
        """
        for node in sorted({*map(self.node_of, (*ends, *starts))}):
            self._change(node, MessageKind.START_RANKS, ends, starts)

    def _change(
        self,
        node: int,
        kind: MessageKind,
        ends: Collection[int],
        starts: Collection[int],
        epoch: int = 0,
    ) -> None:
        """Have one node end and start those of the ranks that are on it."""
        ends, starts = (
            sorted(rank for rank in ranks if self.node_of(rank) == node) for ranks in (ends, starts)
        )
        self._num_changes += 1
        asked = ChangeRanks(self._num_changes, ends, starts, self.ranks_per_node)
        pairs = self._pairs(node, asked)
        change = NodeChange(kind, starts, self._forget([*ends, *starts]))
        for rank, (ours, _) in zip(starts, pairs, strict=False):
            self._connect(rank, ours)
        try:
            self.nodes[node].change(change, asked, epoch)
            self.nodes[node].control.send_descriptors([theirs.fileno() for _, theirs in pairs])
        except BlockingIOError:
            raise self._lost(node, "hung in a message") from None
        except OSError as error:
            raise self._lost(node, gone(error)) from None
        finally:
            for _, theirs in pairs:
                theirs.close()

    def _forget(self, ranks: Collection[int]) -> list[Channel]:
        """Clear these ranks' channels and pids; gives the open channels of their old processes."""
        fenced, channels = [], self.channels
        channels += [self._nobody] * (max(ranks, default=-1) + 1 - len(channels))
        for rank in ranks:
            self.pids.pop(rank, None)
            if channels[rank].fileno() >= 0:
                fenced.append(channels[rank])
            channels[rank] = self._nobody
        return fenced

    def _pairs(self, node: int, asked: ChangeRanks) -> list[tuple[socket.socket, socket.socket]]:
        """Connections for new ranks, in order; the node's server gets their other ends."""
        return connections_for(asked.starts)

    def _connect(self, rank: int, connection: socket.socket) -> None:
        self.channels[rank] = Channel(connection, self._timeout_s)
        self._has_connected = True

    def connected(self) -> dict[int, Channel]:
        """Open channels by rank: of ranks with a process, on other nodes once it has connected."""
        return {r: channel for r, channel in enumerate(self.channels) if channel.fileno() >= 0}

    @property
    def away(self) -> frozenset[int]:
        """Ranks of nodes that are lost; none can be started before its node is back."""
        return frozenset()

    @property
    def awaited(self) -> frozenset[int]:
        """Ranks of this epoch that start when their nodes are back."""
        return frozenset()

    @property
    def is_beginning(self) -> bool:
        """Whether a node has not ended and started ranks for the epoch yet."""
        return any(node.is_beginning for node in self.nodes)

    def acceptor(self) -> int | None:
        """A descriptor that is readable when ranks of other nodes connect; None if none will."""
        return None

    def has_connected(self) -> bool:
        """Whether ranks have connected since the last call; does not wait."""
        had, self._has_connected = self._has_connected, False
        return had

    def ping(self) -> None:
        """Ask each node how its ranks are; to be called once a second or so in waits for them."""
        now_s = time.monotonic()
        for node in self.nodes:
            with contextlib.suppress(OSError):  # its end is noticed elsewhere
                node.ping(now_s)

    def check_answers(self, bound_s: float, resumed_s: float) -> None:
        """Look for a node that is silent.

        Args:
            bound_s: the longest time that a node may take to answer.
            resumed_s: when this process went on after it was stopped itself.

        Raises:
            RankError: a node has not answered for longer.
        """
        now_s = time.monotonic()
        for number, node in enumerate(self.nodes):
            silent_s = now_s - max(now_s if node.asked_s is None else node.asked_s, resumed_s)
            is_still = number == 0 and silent_s > self._timeout_s and is_stopped(self._server.pid)
            if is_still or silent_s > bound_s:
                self._is_server_hung = number == 0
                why = "hung (its process is stopped)" if is_still else "hung"
                own_s = self._timeout_s if is_still else bound_s
                raise self._lost(number, f"{why}: no answer for {own_s:g} s")

    def check_nodes_of(self, ranks: Collection[int], bound_s: float) -> None:
        """Check the nodes of ranks that are silent; nothing to do for a single node."""

    def read_news(self, ready: Container[int]) -> None:
        """Read one message of each node that has sent some.

        Args:
            ready: descriptors that are readable; other nodes are not read.

        Raises:
            RankError: a node has ended.
            TerminatedError, UserError: a node could not go on.
        """
        for number, node in enumerate(self.nodes):
            if node.control.fileno() in ready:
                self._read_node(number)

    def _read_node(self, node: int) -> Message | None:
        """Read and handle one message of a node; gives it back if it is not about ranks."""
        try:
            message = self.nodes[node].control.receive()
            if message.kind is MessageKind.EXIT:
                self._take_exit(node, Decoder(Exit).decode(message))
            elif message.kind is MessageKind.HEARTBEAT:
                self._take_heartbeat(node, Decoder(Heartbeat).decode(message))
            elif message.kind is MessageKind.EPOCH_BEGUN:
                self._take_changed(node, message.kind)
            elif message.kind is MessageKind.RANKS_STARTED:
                started = Decoder(StartResult).decode(message)
                self._take_changed(node, message.kind)
                self.missing.update(dict.fromkeys(started.missing, started.why))
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
            raise self._lost(node, "hung in a message") from None
        except (EOFError, OSError) as error:
            raise self._lost(node, gone(error)) from None
        except MessageError as error:
            raise RankError(f"{self.nodes[node].name} sent an invalid message: {error}") from None
        return None

    def _take_exit(self, node: int, report: Exit) -> None:
        if self.node_of(report.rank) != node:
            raise MessageError(f"rank {report.rank} is not its own")
        self._exit_codes[report.rank] = report.code
        if node:  # those of this one write to the board themselves
            self.board.update(report.rank, report.line)

    def _take_heartbeat(self, node: int, heartbeat: Heartbeat) -> None:
        self.nodes[node].asked_s = None
        if self.nodes[node].changes:
            return  # it may be about earlier ranks
        ranks = range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)
        if len(heartbeat.lines) != len(ranks):
            raise MessageError(f"{len(heartbeat.lines)} lines for {len(ranks)} ranks")
        others = {rank for rank in self.stopped if self.node_of(rank) != node}
        self.stopped = others.union(heartbeat.stopped)
        for rank, line in zip(ranks, heartbeat.lines if node else (), strict=bool(node)):
            self.board.update(rank, line)

    def _take_changed(self, node: int, kind: MessageKind) -> None:
        """Handle a node's confirmation: earlier messages of it concern older ranks."""
        for rank in self.nodes[node].take_changed(kind).starts:
            self._exit_codes.pop(rank, None)
            self.stopped.discard(rank)
            if node:
                self.board.reporter(rank)  # writes "setting up", as the node itself has

    def _lost(self, node: int, how: str) -> RankError:
        """The error for a node that is gone or hangs."""
        if node == 0 and how.startswith(GONE):
            code = self._server.wait(_KILL_TIMEOUT_S)
            return RankError(f"the fork server ended with exit code {code}; all ranks were ended")
        return RankError(f"{self.nodes[node].name} {how}; all ranks were ended")

    def exit_code(self, rank: int, timeout_s: float) -> int | None:
        """A rank's exit code, negative for a signal; None if its node does not report it in time.

        Raises:
            ExpertlaneError: a node has ended, or could not go on.
        """
        number, until_s = self.node_of(rank), time.monotonic() + timeout_s
        node = self.nodes[number]
        while (wait_s := until_s - time.monotonic()) > 0 and node.control.fileno() >= 0:
            if rank in self._exit_codes and not node.is_starting(rank):
                break
            if wait([node.control.fileno()], wait_s):
                self._read_node(number)
        return self._exit_codes.get(rank)

    def close(self, *, failed: bool = False) -> None:
        """End all ranks and servers; leaves no process or file behind here.

        Args:
            failed: whether supervisors of other nodes end with an error.
        """
        if not failed:
            for node in self.nodes[1:]:
                with contextlib.suppress(OSError):
                    node.control.send(_END)
        for channel in self.channels:
            channel.close()
        for node in self.nodes:
            node.close()  # a server kills what is left when it sees this
        try:
            self._server.wait(0 if self._is_server_hung else _KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_TIMEOUT_S)
        self._files.close()
