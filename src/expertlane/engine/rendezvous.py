"""How the nodes of a run meet: torchrun's store, and how the launcher authenticates them.

Each node makes a secret, puts its hash into the store that all nodes share, and sends the secret
itself to the launcher alone, on each of its connections. So whoever can only read the store cannot
pass for a node. The first node's fork server, a child of the launcher, reads the hashes for it.
"""

import contextlib
import hashlib
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
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
_HANDSHAKE = struct.Struct(f"<8sII{SECRET_BYTES}s")  # magic, node, connection of it, secret
_MAGIC = b"XLNODE01"
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


def handshake(node: int, index: int, secret: bytes) -> bytes:
    """What a node sends first on a connection: 0 is its own, then one for each of its ranks."""
    return _HANDSHAKE.pack(_MAGIC, node, index, secret)


def connect(launcher: Place, node: int, num_ranks: int, secret: bytes) -> list[socket.socket]:
    """A node's connections to the launcher, [1 + num_ranks]; the first is its own.

    Raises:
        OSError: it cannot be reached.
    """
    connections = []
    for index in range(1 + num_ranks):
        place = launcher.address, launcher.port
        connections.append(socket.create_connection(place, timeout=CONNECT_TIMEOUT_S))
        connections[-1].sendall(handshake(node, index, secret))
        set_options(connections[-1], keep_alive=index == 0)
    return connections


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
        listener: not blocking; stays the caller's.
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
        self._accepted: dict[tuple[int, int], socket.socket] = {}

    def accept_all(self, control: int, read_control: Callable[[], Sequence[bytes]]) -> None:
        """Wait for all connections; `of_node` has them then.

        Args:
            control: a descriptor, from which the hashes of nodes 1, … can be read.
            read_control: called when it is readable; gives the hashes, or none yet.

        Raises:
            RankError: not all connected in time; or `read_control` raises.
        """
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self._selector.register(control, selectors.EVENT_READ)
        try:
            while len(self._accepted) < (self._num_nodes - 1) * self._per_node:
                if time.monotonic() > deadline_s:
                    raise RankError(
                        f"nodes {self._missing()} did not connect within {CONNECT_TIMEOUT_S:g} s"
                    )
                for key, _ in self._selector.select(0.5):
                    if key.fileobj is self._listener:
                        self._accept_connection()
                    elif key.fileobj == control:
                        self._hashes = read_control() or self._hashes
                        for pending in [each for each in self._pending if each.claim]:
                            self._check(pending)
                    else:
                        self._receive(key.data)
                self._refuse_overdue()
        except BaseException:
            for connection in self._accepted.values():
                connection.close()
            raise
        finally:
            for pending in list(self._pending):
                self._refuse(pending, "all nodes are connected")
            self._selector.close()

    def of_node(self, node: int) -> list[socket.socket]:
        """The connections of a node, [1 + ranks_per_node]; the first is its own."""
        return [self._accepted[node, index] for index in range(self._per_node)]

    def _missing(self) -> list[int]:
        connected = [node for node, _ in self._accepted]
        nodes = range(1, self._num_nodes)
        return [node for node in nodes if connected.count(node) < self._per_node]

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
        magic, node, index, secret = _HANDSHAKE.unpack(pending.received)
        if magic != _MAGIC or not 0 < node < self._num_nodes or index >= self._per_node:
            self._refuse(pending, "it sent no valid handshake")
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
        if not is_known or pending.claim in self._accepted:
            self._refuse(pending, f"it is not node {pending.claim[0]}")
            return
        self._pending.remove(pending)
        set_options(pending.connection, keep_alive=pending.claim[1] == 0)
        self._accepted[pending.claim] = pending.connection

    def _refuse_overdue(self) -> None:
        now_s = time.monotonic()
        for pending in [each for each in self._pending if each.deadline_s < now_s]:
            self._refuse(pending, "it sent no handshake in time")

    def _refuse(self, pending: _PendingConnection, why: str) -> None:
        self._pending.remove(pending)
        with contextlib.suppress(KeyError):
            self._selector.unregister(pending.connection)
        pending.connection.close()
        self._num_reported += 1
        if self._num_reported <= _MAX_REPORTED:
            more = "; more are not reported" if self._num_reported == _MAX_REPORTED else ""
            self._report(f"refused a connection from {pending.address}: {why}{more}")
