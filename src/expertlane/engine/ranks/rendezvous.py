"""The rendezvous of a run's nodes: by torchrun's store, or one like it.

Each node makes a secret, puts its hash into the store that all nodes share, and sends the secret
itself to the launcher alone, on each of its connections. So read access to the store is not enough
to pass for a node. The first node's fork server, a child of the launcher, reads the hashes for it.
A node that is started again does the same with another secret.
"""

import hashlib
import secrets
import socket
import struct
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from expertlane.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SECRET_BYTES = 32
CONNECT_TIMEOUT_S = 120.0
_RETRY_S = 0.5
HANDSHAKE = struct.Struct(f"<8sIII{SECRET_BYTES}s")  # magic, claim, secret
MAGIC = b"XLNODE04"
_MEETING, _LAUNCHER = "expertlane", "launcher"  # the prefix of all keys; the launcher's place
# A node whose machine or network is gone says nothing: both ends lose the connection after 10 s
# without an answer, or up to 2 s more.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
# After the launcher has closed its connections to a node, no rank of it lives longer: the node sees
# the end of its connections in those 12 s; where its server does not, its ranks do, and end 3 s
# later. The rest is for a busy machine.
LEASE_S = 20.0


class Place(msgspec.Struct, frozen=True):
    """The address at which the launcher listens.

    Attributes:
        run: prefix of the keys that this launcher's ranks put into the store.
    """

    address: str
    port: int
    run: str = ""


@dataclass(frozen=True)
class Meeting:
    """The store in which the nodes of a run meet.

    Attributes:
        is_hosted: torchrun's agent hosts the store; otherwise the first node's fork server does.
        run: see `Place`; empty until `of_run` sets it.
    """

    address: str
    port: int
    is_hosted: bool
    run: str
    num_nodes: int

    def of_run(self, run: str) -> "Meeting":
        """The meeting for the ranks of the launcher with this `Place.run`."""
        return replace(self, run=run)

    def open(self, *, as_host: bool = False) -> "Store":
        """The store with the keys of nodes; waits until it can be reached.

        Raises:
            RuntimeError: it cannot be reached in time.
        """
        return self._open(_MEETING, as_host=as_host)

    def open_for_ranks(self) -> "Store":
        """The store with the keys of this run's ranks; waits until it can be reached.

        Raises:
            RuntimeError: it cannot be reached in time.
        """
        return self._open(f"{_MEETING}-{self.run}", as_host=False)

    def _open(self, prefix: str, *, as_host: bool) -> "Store":
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            self.address,
            self.port,
            is_master=as_host and not self.is_hosted,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
        )
        return PrefixStore(prefix, store)

    def publish(self, store: "Store", launcher: Place) -> None:
        """Put the launcher's place into the store, for the other nodes."""
        store.set(_LAUNCHER, msgspec.json.encode(launcher).decode())

    def hashes(self, store: "Store") -> list[bytes]:
        """The published hashes of the other nodes, [num_nodes - 1]; b"" where there is none."""
        keys = [_key(node) for node in range(1, self.num_nodes)]
        return [
            bytes.fromhex(store.get(key).decode()) if store.check([key]) else b"" for key in keys
        ]

    def join(self, node: int, secret: bytes) -> tuple[Place, socket.socket]:
        """Publish the hash of a node's secret, and connect to the launcher.

        For a while the published place may be an earlier launcher's, so connecting is retried.

        Raises:
            OSError: the launcher cannot be reached in time.
            RuntimeError: the store cannot be reached in time.
        """
        store, until_s = self.open(), time.monotonic() + CONNECT_TIMEOUT_S
        store.set(_key(node), hash_of(secret).hex())
        while True:
            launcher = msgspec.json.decode(store.get(_LAUNCHER), type=Place)
            try:
                return launcher, connect(launcher, Claim(node, 0, 0), secret)
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(_RETRY_S)


def _key(node: int) -> str:
    return f"node {node}"


def new_secret() -> bytes:
    """A new random secret, for one node of one run."""
    return secrets.token_bytes(SECRET_BYTES)


def hash_of(secret: bytes) -> bytes:
    """The SHA-256 of a secret, which others may know."""
    return hashlib.sha256(secret).digest()


class Claim(NamedTuple):
    """The node and rank that a connection claims to be from.

    Attributes:
        node: number of the node.
        place: 0 for the node's own connection, 1 + local rank for a rank's.
        change: the number of the change that started the rank; 0 for the node's own.
    """

    node: int
    place: int
    change: int


def handshake(claim: Claim, secret: bytes) -> bytes:
    """The first bytes that a node sends on a connection."""
    return HANDSHAKE.pack(MAGIC, *claim, secret)


def connect(
    launcher: Place, claim: Claim, secret: bytes, timeout_s: float = CONNECT_TIMEOUT_S
) -> socket.socket:
    """Make one of a node's connections to the launcher.

    Raises:
        ConnectionRefusedError: no process listens there.
        OSError: the launcher cannot be reached in time.
    """
    place = launcher.address, launcher.port
    connection = socket.create_connection(place, timeout=timeout_s)
    connection.sendall(handshake(claim, secret))
    connection.settimeout(None)
    set_options(connection, keep_alive=True)
    return connection


def set_options(connection: socket.socket, *, keep_alive: bool) -> None:
    """Send small messages at once; with `keep_alive`, notice a peer that is silently gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keep_alive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(master_address: str, num_connections: int) -> socket.socket:
    """Listen for nodes at `master_address`, on a port of the system's choice.

    Where that name resolves to loopback, as Debian sets up a host's own name, the host's only other
    address is used; a loopback address itself is used as it is.

    Raises:
        UserError: the address is not one of this host; or it is loopback, and the host has not
            exactly one other.
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
