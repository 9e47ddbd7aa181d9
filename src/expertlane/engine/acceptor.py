"""How the launcher takes the connections of nodes and their ranks, and refuses others."""

import contextlib
import itertools
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from expertlane.engine.rendezvous import (
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
    """

    connection: socket.socket
    address: str
    deadline_s: float
    received: bytearray = field(default_factory=bytearray)
    claim: Claim | None = None
    secret: bytes = b""


class NodeAcceptor:
    """Accepts the connections of nodes, in parallel, so that no other client makes them wait.

    Args:
        listener: not blocking; the acceptor's own from now on.
        num_nodes: the first one is the launcher's own and does not connect.
        ranks_per_node: a node has as many connections, and one more.
        report: called with a line for each connection that is refused, the first ten.
    """

    def __init__(
        self,
        listener: socket.socket,
        num_nodes: int,
        ranks_per_node: int,
        report: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._num_nodes, self._per_node = num_nodes, 1 + ranks_per_node
        self._report = report
        self._num_reported = 0
        self._hashes: Sequence[bytes] = []
        self._pending: list[_PendingConnection] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        first = itertools.product(range(1, num_nodes), range(self._per_node), (0,))
        self._missing = set(itertools.starmap(Claim, first))
        self._accepted: dict[Claim, socket.socket] = {}

    def accept_all(self, control: int, read_control: Callable[[], Sequence[bytes]]) -> None:
        """Wait for all connections; `take` has them then.

        Args:
            control: a descriptor, from which the hashes of nodes 1, … can be read.
            read_control: called when it is readable; gives the hashes, or none yet.

        Raises:
            RankError: not all connected in time; or `read_control` raises.
        """
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self._selector.register(control, selectors.EVENT_READ)
        while self._missing:
            if time.monotonic() > deadline_s:
                nodes = sorted({claim.node for claim in self._missing})
                raise RankError(f"nodes {nodes} did not connect within {CONNECT_TIMEOUT_S:g} s")
            if self._accept(0.5, control):
                self._hashes = read_control() or self._hashes
                for pending in [each for each in self._pending if each.claim]:
                    self._check(pending)
        self._selector.unregister(control)
        self._refuse_all()

    def expect(self, claims: Iterable[Claim]) -> None:
        """From now on wait for these too."""
        self._missing.update(claims)

    @property
    def is_expecting(self) -> bool:
        """Whether there is anyone to wait for."""
        return bool(self._missing)

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to accept."""
        return self._selector.fileno()

    def accept_available(self) -> None:
        """Accept what has come; does not wait."""
        self._accept(0)
        if not self._missing:
            self._refuse_all()

    def take(self) -> dict[Claim, socket.socket]:
        """What was accepted since the last time."""
        accepted, self._accepted = self._accepted, {}
        return accepted

    def close(self) -> None:
        """Accept nothing any more; closes what nobody has taken."""
        self._refuse_all()
        for connection in (*self._accepted.values(), self._listener):
            connection.close()
        self._selector.close()

    def _accept(self, timeout_s: float, control: int | None = None) -> bool:
        """Take what comes in that time; gives whether `control` is readable."""
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
        """Read what has arrived; never more than a handshake has."""
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
        is_one = 0 < claim.node < self._num_nodes and claim.connection < self._per_node
        if magic != MAGIC or not is_one:
            self._refuse(pending, "it sent no valid handshake")
            return
        pending.claim, pending.secret = claim, secret
        pending.deadline_s = float("inf")  # until all nodes have told the store their hashes
        self._selector.unregister(pending.connection)
        self._check(pending)

    def _check(self, pending: _PendingConnection) -> None:
        assert pending.claim is not None, "its handshake is complete"
        if not self._hashes:
            return
        known = self._hashes[pending.claim.node - 1]
        if not secrets.compare_digest(hash_of(pending.secret), known):
            self._refuse(pending, f"it is not node {pending.claim.node}")
            return
        if pending.claim not in self._missing:
            self._refuse(pending, f"node {pending.claim.node} is not to connect, or has done so")
            return
        self._pending.remove(pending)
        set_options(pending.connection, keep_alive=pending.claim.connection == 0)
        self._missing.remove(pending.claim)
        self._accepted[pending.claim] = pending.connection

    def _refuse(self, pending: _PendingConnection, why: str) -> None:
        self._pending.remove(pending)
        with contextlib.suppress(KeyError):
            self._selector.unregister(pending.connection)
        pending.connection.close()
        self._num_reported += 1
        if self._num_reported <= _MAX_REPORTED:
            more = "; more are not reported" if self._num_reported == _MAX_REPORTED else ""
            self._report(f"refused a connection from {pending.address}: {why}{more}")
