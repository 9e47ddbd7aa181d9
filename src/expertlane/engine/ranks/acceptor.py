"""Accepts the connections of nodes and their ranks at the launcher, and authenticates them."""

import contextlib
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from expertlane.engine.ranks.rendezvous import (
    CONNECT_TIMEOUT_S,
    HANDSHAKE,
    MAGIC,
    Claim,
    hash_of,
    set_options,
)
from expertlane.errors import RankError

_HANDSHAKE_TIMEOUT_S = 5.0  # for a few bytes that are sent at once
_MAX_PENDING = 1024  # connections; beyond, the oldest is refused
_MAX_REPORTED = 10


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
        with contextlib.suppress(KeyError):
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
