"""How the nodes of a run meet: torchrun's store, and how the launcher authenticates them.

Each node makes a secret, puts its hash into the store that all nodes share, and sends the secret
itself to the launcher alone, on each of its connections. So whoever can only read the store cannot
pass for a node. The first node's fork server, a child of the launcher, reads the hashes for it.
"""

import contextlib
import hashlib
import itertools
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec
import psutil

from expertlane.errors import RankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SECRET_BYTES = 32
CONNECT_TIMEOUT_S = 120.0
_STORE_POLL_S = 0.05
_HANDSHAKE_TIMEOUT_S = 5.0  # for a few bytes that are sent at once
_HANDSHAKE = struct.Struct(f"<8sIII{SECRET_BYTES}s")  # magic, node, its connection, epoch, secret
_MAGIC = b"XLNODE02"
_MAX_PENDING = 1024  # connections; beyond, the oldest is refused
_MAX_REPORTED = 10
_LAUNCHER = "launcher"  # the key of its address in the store
# A node whose machine or network is gone says nothing: the connection is lost after some 10 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


class Place(msgspec.Struct, frozen=True):
    """Where the launcher listens."""

    address: str
    port: int


@dataclass(frozen=True)
class Meeting:
    """The store in which the nodes of a run meet.

    Attributes:
        is_hosted: by torchrun's agent; the first node's fork server hosts it otherwise.
        name: begins all keys.
    """

    address: str
    port: int
    is_hosted: bool
    name: str
    num_nodes: int

    def open(self, *, as_host: bool = False) -> "Store":
        """The store; waits until it is there.

        Raises:
            RuntimeError: it is not, in time.
        """
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            self.address,
            self.port,
            is_master=as_host and not self.is_hosted,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
        )
        return PrefixStore(self.name, store)

    def publish(self, store: "Store", launcher: Place, go_on: Callable[[], bool]) -> list[bytes]:
        """Tell the other nodes where the launcher is; gives their hashes once all have come.

        Args:
            go_on: asked while it waits.

        Returns:
            [num_nodes - 1]; none if it was told not to go on.
        """
        store.set(_LAUNCHER, msgspec.json.encode(launcher).decode())
        keys = [_key(node) for node in range(1, self.num_nodes)]
        while not store.check(keys):
            if not go_on():
                return []
            time.sleep(_STORE_POLL_S)
        return [bytes.fromhex(store.get(key).decode()) for key in keys]

    def find_launcher(self, node: int, secret: bytes) -> Place:
        """Publish the hash of a node's secret, and wait for the launcher's place."""
        store = self.open()
        store.set(_key(node), hash_of(secret).hex())
        return msgspec.json.decode(store.get(_LAUNCHER), type=Place)


def _key(node: int) -> str:
    return f"node {node}"


def new_secret() -> bytes:
    """Random bytes, for one node of one run."""
    return secrets.token_bytes(SECRET_BYTES)


def hash_of(secret: bytes) -> bytes:
    """What others may know of a secret: its SHA-256."""
    return hashlib.sha256(secret).digest()


def handshake(node: int, index: int, secret: bytes, epoch: int = 0) -> bytes:
    """What a node sends first on a connection: 0 is its own, then one for each of its ranks."""
    return _HANDSHAKE.pack(_MAGIC, node, index, epoch, secret)


def connect(launcher: Place, node: int, num_ranks: int, secret: bytes) -> list[socket.socket]:
    """A node's connections to the launcher, [1 + num_ranks]; the first is its own.

    Raises:
        OSError: it cannot be reached.
    """
    return [connect_once(launcher, node, index, secret) for index in range(1 + num_ranks)]


def connect_once(
    launcher: Place, node: int, index: int, secret: bytes, epoch: int = 0
) -> socket.socket:
    """One of a node's connections to the launcher, for an epoch.

    Raises:
        OSError: it cannot be reached.
    """
    place = launcher.address, launcher.port
    connection = socket.create_connection(place, timeout=CONNECT_TIMEOUT_S)
    connection.sendall(handshake(node, index, secret, epoch))
    set_options(connection, keep_alive=index == 0)
    return connection


def set_options(connection: socket.socket, *, keep_alive: bool) -> None:
    """Messages leave at once; with `keep_alive`, an end that is silent is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keep_alive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(master_address: str, num_connections: int) -> socket.socket:
    """Listen for nodes at `master_address`, on a port of the system's choice.

    Where that name resolves to loopback, as Debian sets up a host's own name, the host's only other
    address is taken; an address of loopback is taken as it is.

    Raises:
        UserError: the address is not one of this host, or there are several to choose from.
    """
    try:
        found = socket.getaddrinfo(master_address, None, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        address = str(place[0])
        if _is_loopback(address) and master_address not in (address, "localhost"):
            family, address = socket.AF_INET, _only_address()
        listener = socket.create_server((address, 0), family=family, backlog=num_connections + 64)
    except OSError as error:
        raise UserError(
            f"cannot listen at MASTER_ADDR {master_address}: {error.strerror or error}; set it to "
            "an address of the first node that the others reach"
        ) from None
    listener.setblocking(False)
    return listener


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def _only_address() -> str:
    """The one IPv4 address of this host that is not loopback."""
    addresses = sorted(
        each.address
        for of_interface in psutil.net_if_addrs().values()
        for each in of_interface
        if each.family == socket.AF_INET and not _is_loopback(each.address)
    )
    if len(addresses) != 1:
        found = ", ".join(addresses) or "none"
        raise UserError(
            "MASTER_ADDR means this host alone, where other nodes cannot come; set it to the "
            f"address that they reach (found here: {found})"
        )
    return addresses[0]


@dataclass(eq=False)
class _PendingConnection:
    """A connection that is not authenticated yet.

    Attributes:
        claim: the node and the connection of it that it claims to be; None before its handshake.
    """

    connection: socket.socket
    address: str
    deadline_s: float
    received: bytearray = field(default_factory=bytearray)
    claim: tuple[int, int] | None = None
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
        self._epoch = 0
        self._missing = set(itertools.product(range(1, num_nodes), range(self._per_node)))
        self._accepted: dict[tuple[int, int], socket.socket] = {}

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
                nodes = sorted({node for node, _ in self._missing})
                raise RankError(f"nodes {nodes} did not connect within {CONNECT_TIMEOUT_S:g} s")
            if self._accept(0.5, control):
                self._hashes = read_control() or self._hashes
                for pending in [each for each in self._pending if each.claim]:
                    self._check(pending)
        self._selector.unregister(control)
        self._refuse_all()

    def expect(self, epoch: int, missing: Iterable[tuple[int, int]]) -> None:
        """From now on wait for these alone, of an epoch: nodes, and connections of them."""
        self._epoch, self._missing = epoch, set(missing)

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to accept."""
        return self._selector.fileno()

    def accept_available(self) -> None:
        """Accept what has come; does not wait."""
        self._accept(0)
        if not self._missing:
            self._refuse_all()

    def take(self) -> dict[tuple[int, int], socket.socket]:
        """What was accepted since the last time, by node and connection of it: 0 is its own."""
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
            data = pending.connection.recv(_HANDSHAKE.size - len(pending.received))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(pending, error.strerror or str(error))
            return
        if not data:
            self._refuse(pending, "it closed the connection")
            return
        pending.received += data
        if len(pending.received) < _HANDSHAKE.size:
            return
        magic, node, index, epoch, secret = _HANDSHAKE.unpack(pending.received)
        if magic != _MAGIC or not 0 < node < self._num_nodes or index >= self._per_node:
            self._refuse(pending, "it sent no valid handshake")
            return
        if epoch != self._epoch:
            self._refuse(pending, f"it is of epoch {epoch}, not {self._epoch}")
            return
        pending.claim, pending.secret = (node, index), secret
        pending.deadline_s = float("inf")  # until all nodes have told the store their hashes
        self._selector.unregister(pending.connection)
        self._check(pending)

    def _check(self, pending: _PendingConnection) -> None:
        assert pending.claim is not None, "its handshake is complete"
        if not self._hashes:
            return
        known = self._hashes[pending.claim[0] - 1]
        is_known = secrets.compare_digest(hash_of(pending.secret), known)
        if not is_known or pending.claim not in self._missing:
            self._refuse(pending, f"it is not node {pending.claim[0]}")
            return
        self._pending.remove(pending)
        set_options(pending.connection, keep_alive=pending.claim[1] == 0)
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
