"""How ranks that torchrun has started connect to the launcher, and how it authenticates them.

Each rank makes a secret, puts its hash into the store that all ranks share, and sends the secret
itself to the launcher alone. So whoever can only read the store cannot pass for a rank. The first
rank, a child of the launcher, gets its secret from it and sends the others' hashes.
"""

import contextlib
import hashlib
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from expertlane.errors import RankError, UserError

SECRET_BYTES = 32
HASH_BYTES = hashlib.sha256().digest_size
CONNECT_TIMEOUT_S = 120.0
_HANDSHAKE_TIMEOUT_S = 5.0  # for a few bytes that are sent at once
_HANDSHAKE = struct.Struct(f"<8sI{SECRET_BYTES}s")  # magic, rank, secret
_MAGIC = b"XLRANK01"
_MAX_PENDING = 1024  # connections; beyond, the oldest is refused
_MAX_REPORTED = 10


def new_secret() -> bytes:
    """Random bytes, for one rank of one run."""
    return secrets.token_bytes(SECRET_BYTES)


def hash_of(secret: bytes) -> bytes:
    """What others may know of a secret: its SHA-256."""
    return hashlib.sha256(secret).digest()


def handshake(rank: int, secret: bytes) -> bytes:
    """What a rank sends first, once connected; the first rank adds the others' hashes."""
    return _HANDSHAKE.pack(_MAGIC, rank, secret)


def listen(master_address: str, num_ranks: int, *, several_nodes: bool) -> socket.socket:
    """Listen for ranks at `master_address`, on a port of the system's choice.

    Where that name resolves to loopback, as Debian sets up a host's own name, but there are ranks
    on other nodes, the host's only other address is taken.

    Raises:
        UserError: the address is not one of this host, or there are several to choose from.
    """
    try:
        found = socket.getaddrinfo(master_address, None, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        address = str(place[0])
        if several_nodes and _is_loopback(address):
            family, address = socket.AF_INET, _only_address()
        listener = socket.create_server((address, 0), family=family, backlog=num_ranks + 64)
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
        rank: the one that it claims to be; None before its handshake.
    """

    connection: socket.socket
    address: str
    deadline_s: float
    received: bytearray = field(default_factory=bytearray)
    rank: int | None = None


class RankAcceptor:
    """Accepts the connections of ranks, in parallel, so that no other client makes them wait.

    Args:
        listener: not blocking; stays the caller's.
        secret: of the first rank.
        report: called with a line for each connection that is refused, the first ten.
        has_parent_ended: whether it is of no use to wait any longer.
    """

    def __init__(
        self,
        listener: socket.socket,
        num_ranks: int,
        secret: bytes,
        report: Callable[[str], None],
        has_parent_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._has_parent_ended = has_parent_ended
        self._listener = listener
        self._num_ranks = num_ranks
        self._report = report
        self._num_reported = 0
        self._hashes = {0: hash_of(secret)}
        self._pending: list[_PendingConnection] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._accepted: dict[int, socket.socket] = {}

    def accept_all(self) -> list[socket.socket]:
        """The connections of all ranks, [num_ranks].

        Raises:
            RankError: not all connected in time, or torchrun has ended.
        """
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        try:
            while len(self._accepted) < self._num_ranks:
                if time.monotonic() > deadline_s:
                    missing = sorted(set(range(self._num_ranks)) - set(self._accepted))
                    raise RankError(
                        f"ranks {missing} did not connect within {CONNECT_TIMEOUT_S:g} s"
                    )
                if self._has_parent_ended():
                    raise RankError("torchrun ended before all ranks had connected")
                for key, _ in self._selector.select(0.5):
                    if key.fileobj is self._listener:
                        self._accept_connection()
                    else:
                        self._receive(key.data)
                self._refuse_overdue()
        except BaseException:
            for connection in self._accepted.values():
                connection.close()
            raise
        finally:
            for pending in list(self._pending):
                self._refuse(pending, "all ranks are connected")
            self._selector.close()
        return [self._accepted[rank] for rank in range(self._num_ranks)]

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
            oldest = next(each for each in self._pending if each.rank != 0)
            self._refuse(oldest, "too many connections are pending")

    def _receive(self, pending: _PendingConnection) -> None:
        """Read what has arrived; never more than a handshake has."""
        wanted = _HANDSHAKE.size
        if pending.rank == 0:
            wanted += HASH_BYTES * (self._num_ranks - 1)
        try:
            data = pending.connection.recv(wanted - len(pending.received))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(pending, error.strerror or str(error))
            return
        if not data:
            self._refuse(pending, "it closed the connection")
            return
        pending.received += data
        if len(pending.received) < wanted:
            return
        magic, rank, secret = _HANDSHAKE.unpack_from(pending.received)
        if magic != _MAGIC or rank >= self._num_ranks:
            self._refuse(pending, "it sent no valid handshake")
        elif rank == 0:
            self._check_first(pending, secret)
        else:
            pending.rank = rank
            self._selector.unregister(pending.connection)
            pending.deadline_s = float("inf")  # until the first rank has sent the hashes
            self._check(pending)

    def _check_first(self, pending: _PendingConnection, secret: bytes) -> None:
        if not secrets.compare_digest(hash_of(secret), self._hashes[0]) or 0 in self._accepted:
            self._refuse(pending, "it is not rank 0")
            return
        pending.rank = 0
        if len(pending.received) < _HANDSHAKE.size + HASH_BYTES * (self._num_ranks - 1):
            pending.deadline_s = (
                time.monotonic() + CONNECT_TIMEOUT_S
            )  # the others have to start first
            return
        hashes = bytes(pending.received[_HANDSHAKE.size :])
        for rank in range(1, self._num_ranks):
            self._hashes[rank] = hashes[HASH_BYTES * (rank - 1) : HASH_BYTES * rank]
        self._selector.unregister(pending.connection)
        self._accept_rank(pending, 0)
        for other in [each for each in self._pending if each.rank is not None]:
            self._check(other)

    def _check(self, pending: _PendingConnection) -> None:
        assert pending.rank is not None, "its handshake is complete"
        known = self._hashes.get(pending.rank)
        if known is None:
            return
        _, _, secret = _HANDSHAKE.unpack_from(pending.received)
        if pending.rank in self._accepted or not secrets.compare_digest(hash_of(secret), known):
            self._refuse(pending, f"it is not rank {pending.rank}")
        else:
            self._accept_rank(pending, pending.rank)

    def _accept_rank(self, pending: _PendingConnection, rank: int) -> None:
        self._pending.remove(pending)
        self._accepted[rank] = pending.connection

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
