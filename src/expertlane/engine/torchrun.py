"""Ranks on nodes where torchrun, or anything that sets its variables, has started processes.

Every process runs the same command. Of each node's, the one with LOCAL_RANK 0 stays. That of the
first node becomes the launcher; those of the others become *supervisors*: they connect to it and
fork the ranks of their nodes. Nodes find the launcher through torchrun's own store.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import msgspec

from expertlane.engine.acceptor import NodeAcceptor
from expertlane.engine.fork_server import python_command, serve
from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.messages import (
    Channel,
    Decoder,
    Failure,
    FailureKind,
    MessageKind,
    encode,
)
from expertlane.engine.node_messages import ChangeRanks, Nodes
from expertlane.engine.processes import end_with_parent
from expertlane.engine.rank_environment import check_num_ranks, rank_environment
from expertlane.engine.rank_settings import RankSettings, ServerSettings
from expertlane.engine.rendezvous import (
    Claim,
    Meeting,
    Place,
    connect,
    connect_once,
    listen,
    new_secret,
)
from expertlane.engine.run_files import RunFiles
from expertlane.errors import CapacityError, RankError, UserError
from expertlane.spec.names import CpuIsa

if TYPE_CHECKING:
    from expertlane.engine.worker import Handlers

_PARENT = os.getppid()  # as early as can be: it may end at any time


def is_under_torchrun() -> bool:
    """Whether this process is one of several that run the same command."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def num_nodes() -> int:
    """On how many nodes ranks will run.

    Raises:
        UserError: torchrun's variables do not fit together.
    """
    return TorchrunNode.from_environment().num_nodes if is_under_torchrun() else 1


@dataclass(frozen=True)
class TorchrunNode:
    """This process's node, as torchrun's variables say.

    Attributes:
        is_supervisor: whether this process stays; one a node does.
        num_processes: that torchrun has started on each node.
        meeting: None where there is one node.

    Raises:
        UserError: a variable is missing, or they do not fit together.
    """

    number: int
    is_supervisor: bool
    num_nodes: int
    num_processes: int
    meeting: Meeting | None

    @classmethod
    def from_environment(cls) -> "TorchrunNode":
        """As the environment says."""
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        local_rank, num_processes = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
        if num_processes < 1 or world_size % num_processes:
            raise UserError(
                f"{num_processes} of {world_size} processes are on this node; start equally many "
                "on all nodes"
            )
        num_nodes, meeting = world_size // num_processes, None
        if num_nodes > 1:
            meeting = Meeting(
                os.environ.get("MASTER_ADDR", ""),
                _number("MASTER_PORT"),
                os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                f"expertlane-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
                num_nodes,
            )
        return cls(rank // num_processes, local_rank == 0, num_nodes, num_processes, meeting)

    def num_ranks(self, needed: int) -> int:
        """How many ranks each node gets: one a process, or as needed where there is one process.

        Raises:
            CapacityError: torchrun has started several a node, but too few in all.
        """
        if self.num_processes == 1:
            return -(-needed // self.num_nodes)
        started = self.num_nodes * self.num_processes
        if started < needed:
            raise CapacityError(
                f"the experiment needs {needed} ranks but torchrun started {started} processes; "
                f"start {needed} in all, or one per node, which starts as many ranks as are needed"
            )
        return self.num_processes


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}; torchrun sets it to a number, set it likewise")
    return int(value)


def _watched_parent() -> int | None:
    """torchrun's agent, which outlives its processes unless killed; None for other parents."""
    return _PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None


def end_with_torchrun() -> None:
    """From now on, end this process when torchrun has ended."""
    if (parent := _watched_parent()) is not None:
        end_with_parent(parent)


class NodeRanks(LocalRanks):
    """Ranks of several nodes, in the launcher; the first of them are its own children.

    Args:
        ranks_per_node: on each node.
        recovers: as of `LocalRanks`. The listener stays open, for ranks that replace lost ones; a
            supervisor that is lost is not replaced: it ends all ranks.

    Raises:
        RankError: not all nodes connected in time.
        UserError: they cannot reach this host by MASTER_ADDR.
    """

    def __init__(
        self,
        meeting: Meeting,
        ranks_per_node: int,
        timeout_s: float,
        dtype: str | None,
        server_module: str = "expertlane.engine.fork_server",
        *,
        cpu_isa: CpuIsa | None = None,
        recovers: bool = False,
    ) -> None:
        self._acceptor: NodeAcceptor | None = None
        self._claims: dict[int, Claim] = {}  # by rank, of its process
        listener = listen(meeting.address, meeting.num_nodes * (1 + ranks_per_node))
        acceptor = NodeAcceptor(listener, meeting.num_nodes, ranks_per_node, _report)
        with ExitStack() as on_failure:
            on_failure.callback(acceptor.close)
            super().__init__(
                ranks_per_node,
                timeout_s,
                dtype,
                server_module,
                cpu_isa=cpu_isa,
                meeting=meeting,
                launcher=Place(*listener.getsockname()[:2]),
                recovers=recovers,
            )
            try:
                acceptor.accept_all(self.nodes[0].control.fileno(), self._read_hashes)
            except BaseException:
                self.close(failed=True)
                raise
            accepted = acceptor.take()
            if recovers:
                self._acceptor = acceptor
                on_failure.pop_all()
        for node in range(1, meeting.num_nodes):
            claims = [Claim(node, index, 0) for index in range(1 + ranks_per_node)]
            connections = [accepted[claim] for claim in claims]
            address = connections[0].getpeername()[0]
            self._add_node(f"the supervisor of node {node} ({address})", connections)

    def _pairs(self, node: int, asked: ChangeRanks) -> list[tuple[socket.socket, socket.socket]]:
        """As of `LocalRanks`, but none for another node's ranks: they connect by themselves."""
        if node == 0:
            return super()._pairs(node, asked)
        if self._acceptor is not None:
            first = node * self.ranks_per_node
            claims = {rank: Claim(node, 1 + rank - first, asked.number) for rank in asked.starts}
            self._claims.update(claims)
            self._acceptor.expect(claims.values())
        return []

    def acceptor(self) -> int | None:
        """As of `LocalRanks`."""
        acceptor = self._acceptor
        return acceptor.fileno() if acceptor is not None and acceptor.is_expecting else None

    def has_connected(self) -> bool:
        """As of `LocalRanks`."""
        if self._acceptor is not None:
            self._acceptor.accept_available()
            for claim, connection in self._acceptor.take().items():
                rank = claim.node * self.ranks_per_node + claim.connection - 1
                if self._claims.get(rank) == claim:
                    self._connect(rank, connection)
                else:  # of one that is to end
                    self.nodes[claim.node].fence(Channel(connection))
        return super().has_connected()

    def close(self, *, failed: bool = False) -> None:
        """As of `LocalRanks`; nobody can connect any more."""
        super().close(failed=failed)
        if self._acceptor is not None:
            self._acceptor.close()

    def _read_hashes(self) -> Sequence[bytes]:
        """Of the other nodes, once the fork server has them; none with other news."""
        message = self._read_node(0)
        return Decoder(Nodes).decode(message).hashes if message is not None else []


def _report(line: str) -> None:
    print(f"expertlane: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class SupervisorSettings:
    """What a supervisor needs to start the ranks of its node.

    Attributes:
        parent_pid: it ends with this process; None where its parent does not matter.
    """

    node: int
    num_ranks: int
    meeting: Meeting
    parent_pid: int | None
    timeout_s: float
    dtype: str | None
    oversubscribe: bool


def supervisor_command(
    settings: SupervisorSettings, module: str = "expertlane.engine.torchrun"
) -> list[str]:
    """The command of a supervisor: `main` of a module, which is this one's or calls it."""
    return python_command(module, [msgspec.json.encode(settings).decode()])


def become_supervisor(
    node: TorchrunNode,
    num_ranks: int,
    timeout_s: float,
    dtype: str | None,
    *,
    oversubscribe: bool,
    cpu_isa: CpuIsa | None,
) -> NoReturn:
    """Replace this process by the supervisor of its node.

    By another program, since ranks are forked from it: nothing that ran here is left there.
    """
    assert node.meeting is not None, "the first node has the launcher"
    parent = _watched_parent()
    settings = SupervisorSettings(
        node.number, num_ranks, node.meeting, parent, timeout_s, dtype, oversubscribe
    )
    command = supervisor_command(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print in ranks must not mix with results
    os.execve(command[0], command, rank_environment(cpu_isa, on_one_node=False))


def main(handlers: "Handlers | None" = None) -> None:
    """Be a supervisor until the launcher is done. The command line holds `SupervisorSettings`.

    Args:
        handlers: as of `serve`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    settings = msgspec.json.decode(sys.argv[1], type=SupervisorSettings)
    parent = settings.parent_pid
    end_watch = end_with_parent(parent) if parent is not None else None  # it may wait minutes
    secret = new_secret()
    launcher, connections = _connect(settings, secret)
    try:
        check_num_ranks(settings.num_ranks, oversubscribe=settings.oversubscribe)
        files = RunFiles(settings.meeting.num_nodes * settings.num_ranks, settings.num_ranks)
    except UserError as error:
        failure = Failure(FailureKind.USER, f"{socket.gethostname()}: {error}")
        Channel(connections[0]).send(encode(MessageKind.FAILURE, failure))
        sys.exit(error.exit_code)
    if end_watch is not None:
        end_watch()  # no thread while ranks are forked
    control, *of_ranks = [connection.detach() for connection in connections]
    first_rank = RankSettings(
        rank=settings.node * settings.num_ranks,
        world_size=settings.meeting.num_nodes * settings.num_ranks,
        local_rank=0,
        num_local_ranks=settings.num_ranks,
        board_fd=files.board_fd,
        memory_fd=files.memory_fd,
        wake_fds=files.wake_fds,
        store_path=files.store_path,
        meeting=settings.meeting,
        timeout_s=settings.timeout_s,
        dtype=settings.dtype,
    )

    def reconnect(number: int, ranks: Sequence[int]) -> list[int]:
        claims = [Claim(settings.node, 1 + rank - first_rank.rank, number) for rank in ranks]
        made = [connect_once(launcher, claim, secret) for claim in claims]
        return [connection.detach() for connection in made]

    server = ServerSettings(parent, control, of_ranks, files.store_fd, first_rank)
    # torchrun waits long for the first node where this one ended well and that one did not.
    if not serve(server, handlers, reconnect):
        sys.exit(RankError.exit_code)


def _connect(settings: SupervisorSettings, secret: bytes) -> tuple[Place, list[socket.socket]]:
    try:
        launcher = settings.meeting.find_launcher(settings.node, secret)
        return launcher, connect(launcher, settings.node, settings.num_ranks, secret)
    except (OSError, RuntimeError) as error:  # of torch's store, too
        why = str(error).splitlines()[0]
        _report(f"error: node {settings.node} cannot reach the launcher: {why}")
        sys.exit(RankError.exit_code)
