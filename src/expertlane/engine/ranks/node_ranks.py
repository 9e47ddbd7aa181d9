"""Ranks of several nodes at the launcher: nodes connect, are lost, and rejoin.

When a node's connection breaks, all of its ranks are lost. The launcher closes its connections to
that node, so the node ends its ranks (`engine/ranks/supervisor.py`), whichever side has noticed
first. It comes back by a new connection of its supervisor, which has ended its ranks before. A
supervisor that was started anew takes its place only when no rank of the old one can live
(`LEASE_S`).
"""

import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from expertlane.engine.ranks.local_ranks import LocalRanks, Node
from expertlane.engine.ranks.messages import (
    ChangeRanks,
    Channel,
    Decoder,
    Message,
    MessageKind,
    Nodes,
    encode,
)
from expertlane.engine.ranks.rendezvous import (
    CONNECT_TIMEOUT_S,
    HANDSHAKE,
    LEASE_S,
    MAGIC,
    Claim,
    Meeting,
    Place,
    hash_of,
    listen,
    set_options,
)
from expertlane.errors import RankError, RanksLostError
from expertlane.spec.names import CpuIsa

_HANDSHAKE_TIMEOUT_S = 5.0  # for a few bytes that are sent at once
_MAX_PENDING = 1024  # connections; beyond, the oldest is refused
_MAX_REPORTED = 10
_READ_NODES = encode(MessageKind.READ_NODES, None)


@dataclass(eq=False)
class _PendingConnection:
    """A connection that is not authenticated yet.

    Attributes:
        claim: None before its handshake.
        question: the number of the request that reads its node's hash from the store; 0 before.
    """

    connection: socket.socket
    address: str
    deadline_s: float
    received: bytearray = field(default_factory=bytearray)
    claim: Claim | None = None
    secret: bytes = b""
    question: int = 0


class NodeAcceptor:
    """Accepts the connections of nodes, in parallel, so that no other client makes them wait.

    Args:
        listener: a socket that does not block; the acceptor owns it from now on.
        num_nodes: nodes of the run; the first one is the launcher's own and does not connect.
        ranks_per_node: a node has a connection for each of its ranks, and one of its own.
        report: called with a line for each of the first ten connections that are refused.
        ask: called when the hashes are to be read from the store, for `tell`.
    """

    def __init__(
        self,
        listener: socket.socket,
        num_nodes: int,
        ranks_per_node: int,
        report: Callable[[str], None],
        ask: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._num_nodes, self._per_node = num_nodes, 1 + ranks_per_node
        self._report, self._ask = report, ask
        self._num_reported = 0
        self._hashes: dict[int, bytes] = {}  # of nodes that have connected
        self._found: dict[int, bytes] = {}  # in the store, when it was last read
        self._num_asked = self._num_told = 0
        self._pending: list[_PendingConnection] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._nodes: dict[int, float] = {}  # missing, and when others may take their places
        self._ranks: set[Claim] = set()  # missing
        self._accepted: dict[Claim, socket.socket] = {}

    def expect_node(self, node: int, others_from_s: float = 0.0) -> None:
        """Expect a node's own connection, and none of its ranks.

        Args:
            others_from_s: time on the monotonic clock, before which only a process with the node's
                known secret is accepted.
        """
        self._nodes[node] = others_from_s
        self._ranks = {claim for claim in self._ranks if claim.node != node}

    def expect_ranks(self, claims: Iterable[Claim]) -> None:
        """Expect the connections of these ranks too, of a node that has connected."""
        self._ranks.update(claims)

    @property
    def is_expecting(self) -> bool:
        """Whether a connection is expected."""
        return bool(self._nodes or self._ranks)

    def accept_nodes(self, control: int, read_control: Callable[[], object]) -> None:
        """Wait for all expected nodes; `take` returns them.

        Args:
            control: a descriptor; `read_control` is called when it is readable, and calls `tell`.

        Raises:
            RankError: not all connected in time; or `read_control` raises.
        """
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self._selector.register(control, selectors.EVENT_READ)
        while self._nodes:
            if time.monotonic() > deadline_s:
                nodes = sorted(self._nodes)
                raise RankError(f"nodes {nodes} did not connect within {CONNECT_TIMEOUT_S:g} s")
            if self._accept(0.5, control):
                read_control()
        self._selector.unregister(control)

    def tell(self, hashes: Sequence[bytes]) -> None:
        """Take the hashes of the store, [num_nodes - 1]: the answer to the oldest request."""
        self._found = dict(enumerate(hashes, 1))
        self._num_told += 1
        for pending in [each for each in self._pending if each.claim]:
            self._check(pending)

    def fileno(self) -> int:
        """A descriptor that is readable when a connection arrives."""
        return self._selector.fileno()

    def accept_available(self) -> None:
        """Accept connections that have arrived, without waiting.

        To be called at least once a second while a node is expected.
        """
        self._accept(0)
        for pending in [each for each in self._pending if each.claim]:
            self._check(pending)
        if not self.is_expecting:
            self._refuse_all()

    def take(self) -> dict[Claim, socket.socket]:
        """Connections accepted since the last call."""
        accepted, self._accepted = self._accepted, {}
        return accepted

    def close(self) -> None:
        """Stop accepting; closes connections that were not taken."""
        self._refuse_all()
        for connection in (*self._accepted.values(), self._listener):
            connection.close()
        self._selector.close()

    def _accept(self, timeout_s: float, control: int | None = None) -> bool:
        """Handle what arrives within `timeout_s`; gives whether `control` is readable."""
        has_news = False
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept_connection()
            elif key.fileobj == control:
                has_news = True
            else:
                self._receive(key.data)
        now_s = time.monotonic()
        for pending in [each for each in self._pending if each.deadline_s < now_s]:
            self._refuse(pending, "it sent no handshake in time")
        return has_news

    def _refuse_all(self) -> None:
        for pending in list(self._pending):
            self._refuse(pending, "all nodes are connected")

    def _accept_connection(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it was closed meanwhile
            return
        connection.setblocking(False)
        deadline_s = time.monotonic() + _HANDSHAKE_TIMEOUT_S
        pending = _PendingConnection(connection, f"{address[0]}:{address[1]}", deadline_s)
        self._pending.append(pending)
        self._selector.register(connection, selectors.EVENT_READ, pending)
        if len(self._pending) > _MAX_PENDING:
            self._refuse(self._pending[0], "too many connections are pending")

    def _receive(self, pending: _PendingConnection) -> None:
        """Read bytes that have arrived, but no more than a handshake has."""
        try:
            data = pending.connection.recv(HANDSHAKE.size - len(pending.received))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(pending, error.strerror or str(error))
            return
        if not data:
            self._refuse(pending, "it closed the connection")
            return
        pending.received += data
        if len(pending.received) < HANDSHAKE.size:
            return
        magic, *numbers, secret = HANDSHAKE.unpack(pending.received)
        claim = Claim(*numbers)
        if magic != MAGIC or not 0 < claim.node < self._num_nodes or claim.place >= self._per_node:
            self._refuse(pending, "it sent no valid handshake")
            return
        pending.claim, pending.secret = claim, secret
        pending.deadline_s = float("inf")  # the store has to be read
        self._selector.unregister(pending.connection)
        self._check(pending)

    def _check(self, pending: _PendingConnection) -> None:
        """Accept or refuse a connection, or leave it pending until the store is read."""
        assert pending.claim is not None, "its handshake is complete"
        node, shown = pending.claim.node, hash_of(pending.secret)
        is_known = node in self._hashes and secrets.compare_digest(shown, self._hashes[node])
        if pending.claim.place == 0 and node in self._nodes:
            if not is_known and not self._is_found(pending, node, shown):
                return
            if not is_known and time.monotonic() < self._nodes[node]:
                return  # its predecessor may not have noticed yet that it is lost
            if _is_closed(pending.connection):
                self._refuse(pending, "it closed the connection")
                return
            del self._nodes[node]
            self._hashes[node] = shown
        elif not is_known:
            self._refuse(pending, f"it is not node {node}")
            return
        elif pending.claim not in self._ranks:
            self._refuse(pending, f"no {pending.claim} is expected")
            return
        self._ranks.discard(pending.claim)
        self._pending.remove(pending)
        set_options(pending.connection, keep_alive=pending.claim.place == 0)
        self._accepted[pending.claim] = pending.connection

    def _is_found(self, pending: _PendingConnection, node: int, shown: bytes) -> bool:
        """Whether the store holds the hash of the connection's secret; if not, it is refused.

        A node puts its hash there before it connects, so a read that begins now decides.
        """
        if not pending.question:
            if self._num_asked == self._num_told:  # one at a time
                self._num_asked += 1
                pending.question = self._num_asked
                self._ask()
            return False
        if pending.question > self._num_told:
            return False
        if secrets.compare_digest(shown, self._found.get(node, b"")):
            return True
        self._refuse(pending, f"it is not node {node}")
        return False

    def _refuse(self, pending: _PendingConnection, why: str) -> None:
        self._pending.remove(pending)
        with suppress(KeyError):
            self._selector.unregister(pending.connection)
        pending.connection.close()
        self._num_reported += 1
        if self._num_reported <= _MAX_REPORTED:
            more = "; more are not reported" if self._num_reported == _MAX_REPORTED else ""
            self._report(f"refused a connection from {pending.address}: {why}{more}")


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection, and no bytes are left to be read."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@dataclass(eq=False)
class _Absence:
    """The state of a lost node.

    Attributes:
        since_s: time of its loss, on the monotonic clock.
        starts: ranks that it will start when it is back.
        epoch: the epoch of these ranks.
    """

    since_s: float
    starts: Collection[int] = ()
    epoch: int = 0


class NodeRanks(LocalRanks):
    """Ranks of several nodes, in the launcher; the first of them are its own children.

    Args:
        ranks_per_node: ranks of each node.
        recovers: see `LocalRanks`.
        rejoin_s: how long an epoch waits for a node that is lost; 0 if its loss ends all ranks, as
            it does without `recovers`.

    Raises:
        RankError: not all nodes connected in time.
        UserError: nodes cannot reach this host by MASTER_ADDR.
    """

    accepts = True

    def __init__(
        self,
        meeting: Meeting,
        ranks_per_node: int,
        timeout_s: float,
        dtype: str | None,
        server_module: str = "expertlane.engine.ranks.fork_server",
        *,
        cpu_isa: CpuIsa | None = None,
        recovers: bool = False,
        rejoin_s: float = 0.0,
    ) -> None:
        self._rejoin_s = rejoin_s if recovers else 0.0
        self._away: dict[int, _Absence] = {}
        self._lost_meanwhile: RanksLostError | None = None
        self._claims: dict[int, Claim] = {}  # by rank, of its process
        listener = listen(meeting.address, meeting.num_nodes * (1 + ranks_per_node))
        address, port = listener.getsockname()[:2]
        launcher = Place(address, port, secrets.token_hex(8))
        self._acceptor = NodeAcceptor(
            listener, meeting.num_nodes, ranks_per_node, _report, self._ask_for_hashes
        )
        with ExitStack() as on_failure:
            on_failure.callback(self._acceptor.close)
            super().__init__(
                ranks_per_node,
                timeout_s,
                dtype,
                server_module,
                cpu_isa=cpu_isa,
                meeting=meeting.of_run(launcher.run),
                launcher=launcher,
                recovers=recovers,
            )
            on_failure.pop_all()
        try:
            self._wait_for_nodes(meeting.num_nodes)
        except BaseException:
            self.close(failed=True)
            raise

    def _wait_for_nodes(self, num_nodes: int) -> None:
        """Wait until all nodes have connected; then they start their ranks."""
        for node in range(1, num_nodes):
            self._acceptor.expect_node(node)
        self._acceptor.accept_nodes(self.nodes[0].control.fileno(), lambda: self._read_node(0))
        accepted = {claim.node: made for claim, made in self._acceptor.take().items()}
        for node in range(1, num_nodes):
            self.nodes.append(self._node(node, accepted[node]))
        for node in range(1, num_nodes):
            self._change(node, MessageKind.BEGIN_EPOCH, (), self._ranks_of(node))

    def _node(self, node: int, connection: socket.socket) -> Node:
        name = f"the supervisor of node {node} ({connection.getpeername()[0]})"
        return Node(Channel(connection, self._timeout_s), name)

    def _ranks_of(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    @property
    def away(self) -> frozenset[int]:
        """Ranks of nodes that are lost; none can be started before its node is back."""
        return frozenset(rank for node in self._away for rank in self._ranks_of(node))

    @property
    def awaited(self) -> frozenset[int]:
        """Ranks of this epoch that start when their nodes are back."""
        return frozenset(rank for absence in self._away.values() for rank in absence.starts)

    @property
    def is_beginning(self) -> bool:
        """Whether a node has not ended and started ranks for the epoch yet.

        A lost node may have ranks until its lease is over.
        """
        until_s = [each.since_s + LEASE_S for each in self._away.values() if each.starts]
        return super().is_beginning or time.monotonic() < max(until_s, default=0.0)

    def _change(
        self,
        node: int,
        kind: MessageKind,
        ends: Collection[int],
        starts: Collection[int],
        epoch: int = 0,
    ) -> None:
        """Have one node end and start ranks; a lost node will when it is back."""
        if node not in self._away:
            try:
                super()._change(node, kind, ends, starts, epoch)
                return
            except RanksLostError as error:
                self._lost_meanwhile = error  # raised once the other nodes know of the change
        if kind is MessageKind.BEGIN_EPOCH:
            absence = self._away[node]
            absence.starts = sorted(rank for rank in starts if self.node_of(rank) == node)
            absence.epoch = epoch

    def _pairs(self, node: int, asked: ChangeRanks) -> list[tuple[socket.socket, socket.socket]]:
        """Connections for new ranks of this node; ranks of other nodes connect by themselves."""
        if node == 0:
            return super()._pairs(node, asked)
        for rank in asked.ends:
            self._claims.pop(rank, None)
        for rank in asked.starts:
            self.board.reporter(rank)  # the old line is that of an earlier process
        first = node * self.ranks_per_node
        claims = {rank: Claim(node, 1 + rank - first, asked.number) for rank in asked.starts}
        self._claims.update(claims)
        self._acceptor.expect_ranks(claims.values())
        return []

    def acceptor(self) -> int | None:
        """A descriptor that is readable when nodes or ranks connect; None if none will."""
        return self._acceptor.fileno() if self._acceptor.is_expecting else None

    def has_connected(self) -> bool:
        """Whether ranks or nodes have connected since the last call; does not wait."""
        self._acceptor.accept_available()
        for claim, connection in self._acceptor.take().items():
            rank = claim.node * self.ranks_per_node + claim.place - 1
            if claim.place == 0:
                self._take_back(claim.node, connection)
            elif self._claims.get(rank) == claim:
                self._connect(rank, connection)
            else:  # the rank is to end
                self.nodes[claim.node].fence(Channel(connection))
        return super().has_connected()

    def _take_back(self, node: int, connection: socket.socket) -> None:
        absence = self._away.pop(node)
        self.nodes[node] = self._node(node, connection)
        away_s = time.monotonic() - absence.since_s
        _report(f"{self.nodes[node].name} is back after {away_s:.1f} s")
        self._has_connected = True
        if absence.starts:
            self._change(node, MessageKind.BEGIN_EPOCH, (), absence.starts, absence.epoch)

    def _lost(self, node: int, how: str) -> RankError:
        """The error for a node that is gone or hangs; all its ranks are lost with it."""
        if node == 0 or not self._rejoin_s:
            return super()._lost(node, how)
        ranks = self._ranks_of(node)
        self._away[node] = _Absence(time.monotonic())
        self.nodes[node].lose()
        for channel in self._forget(ranks):
            channel.close()
        self._acceptor.expect_node(node, time.monotonic() + LEASE_S)
        return RanksLostError(f"{self.nodes[node].name} {how}", frozenset(ranks))

    def read_news(self, ready: Container[int]) -> None:
        """Read one message of each node that has sent some.

        Raises:
            RanksLostError: a node was lost.
            RankError: the first node has ended.
            TerminatedError, UserError: a node could not go on.
        """
        if (lost := self._lost_meanwhile) is not None:
            self._lost_meanwhile = None
            raise lost
        super().read_news(ready)

    def check_answers(self, bound_s: float, resumed_s: float) -> None:
        """Look for a node that is silent; see `LocalRanks.check_answers`.

        Raises:
            RanksLostError: a node has not answered for too long.
            RankError: the first node has not; or a lost node has not come back in time.
        """
        super().check_answers(bound_s, resumed_s)
        for node, absence in self._away.items():
            if absence.starts and time.monotonic() - absence.since_s > self._rejoin_s:
                raise RankError(
                    f"{self.nodes[node].name} did not come back within {self._rejoin_s:g} s; all "
                    "ranks were ended"
                )

    def check_nodes_of(self, ranks: Collection[int], bound_s: float) -> None:
        """Check the nodes of ranks that are silent.

        Raises:
            RanksLostError: one has not answered for half of `bound_s`; all its ranks are lost.
        """
        now_s = time.monotonic()
        for node in sorted({*map(self.node_of, ranks)} - {0}):
            asked_s = self.nodes[node].asked_s
            if self._rejoin_s and asked_s is not None and now_s - asked_s > bound_s / 2:
                raise self._lost(node, f"has not answered for {now_s - asked_s:.1f} s")

    def _read_node(self, node: int) -> Message | None:
        """Read and handle one message of a node, hashes of other nodes included."""
        message = super()._read_node(node)
        if message is not None and message.kind is MessageKind.NODES and node == 0:
            self._acceptor.tell(Decoder(Nodes).decode(message).hashes)
            return None
        return message

    def _ask_for_hashes(self) -> None:
        with suppress(OSError):  # its end is noticed elsewhere
            self.nodes[0].control.send(_READ_NODES)

    def close(self, *, failed: bool = False) -> None:
        """End all ranks and servers, and close the listening socket."""
        super().close(failed=failed)
        self._acceptor.close()


def _report(line: str) -> None:
    print(f"expertlane: {line}", file=sys.stderr, flush=True)
