"""How the nodes of a run meet: torchrun's store, and how the launcher authenticates them.

Each node makes a secret, puts its hash into the store that all nodes share, and sends the secret
itself to the launcher alone, on each of its connections. So whoever can only read the store cannot
pass for a node. The first node's fork server, a child of the launcher, reads the hashes for it.
"""

import hashlib
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from expertlane.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SECRET_BYTES = 32
CONNECT_TIMEOUT_S = 120.0
_STORE_POLL_S = 0.05
HANDSHAKE = struct.Struct(f"<8sIII{SECRET_BYTES}s")  # magic, claim, secret
MAGIC = b"XLNODE03"
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


class Claim(NamedTuple):
    """What a connection is, as it says itself.

    Attributes:
        node: that it comes from.
        connection: 0 is the node's own, then one for each of its ranks.
        change: the number of that which has started the rank; 0 at the start of the run.
    """

    node: int
    connection: int
    change: int


def handshake(claim: Claim, secret: bytes) -> bytes:
    """What a node sends first on a connection."""
    return HANDSHAKE.pack(MAGIC, *claim, secret)


def connect(launcher: Place, node: int, num_ranks: int, secret: bytes) -> list[socket.socket]:
    """A node's connections to the launcher, [1 + num_ranks]; the first is its own.

    Raises:
        OSError: it cannot be reached.
    """
    claims = [Claim(node, index, 0) for index in range(1 + num_ranks)]
    return [connect_once(launcher, claim, secret) for claim in claims]


def connect_once(launcher: Place, claim: Claim, secret: bytes) -> socket.socket:
    """One of a node's connections to the launcher.

    Raises:
        OSError: it cannot be reached.
    """
    place = launcher.address, launcher.port
    connection = socket.create_connection(place, timeout=CONNECT_TIMEOUT_S)
    connection.sendall(handshake(claim, secret))
    set_options(connection, keep_alive=claim.connection == 0)
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
