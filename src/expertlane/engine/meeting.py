"""How ranks that others have started find the launcher, and how it knows them from strangers.

Each rank makes a secret, tells its hash through the ranks' common store, and shows the secret
itself to the launcher alone. So whoever can only read the store cannot pass for a rank. The first
rank, a child of the launcher, gets its secret from it and brings the others' hashes.
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
MEET_TIMEOUT_S = 120.0
_GREETING_TIMEOUT_S = 5.0  # for a few bytes that are sent at once
_GREETING = struct.Struct(f"<8sI{SECRET_BYTES}s")  # magic, rank, secret
_MAGIC = b"XLRANK01"
_MOST_GUESTS = 1024  # not yet known; more push out those that have waited longest
_MOST_REPORTED = 10


def new_secret() -> bytes:
    """Random; for one rank of one run."""
    return secrets.token_bytes(SECRET_BYTES)


def hash_of(secret: bytes) -> bytes:
    """What may be told of a secret."""
    return hashlib.sha256(secret).digest()


def greeting(rank: int, secret: bytes) -> bytes:
    """What a rank sends first, once connected; the first rank adds the others' hashes."""
    return _GREETING.pack(_MAGIC, rank, secret)


def listen(master_address: str, num_ranks: int, *, several_nodes: bool) -> socket.socket:
    """Listen for ranks where `master_address` is, on a port of the system's choice.

    Where that name means this host alone, as Debian's own name for a host does, but ranks of
    other nodes are to come, the host's only other address serves.

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
class _Guest:
    """A connection that is not known to be a rank yet."""

    connection: socket.socket
    address: str
    until_s: float
    said: bytearray = field(default_factory=bytearray)
    rank: int | None = None


class Reception:
    """Accepts ranks side by side, so that no stranger makes them wait.

    Args:
        listener: not blocking; stays the caller's.
        secret: of the first rank.
        report: called with a line for each stranger, the first few.
    """

    def __init__(
        self,
        listener: socket.socket,
        num_ranks: int,
        secret: bytes,
        report: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._num_ranks = num_ranks
        self._report = report
        self._num_reported = 0
        self._hashes = {0: hash_of(secret)}
        self._guests: list[_Guest] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self.met: dict[int, socket.socket] = {}

    def meet_all(self) -> list[socket.socket]:
        """All ranks' connections, [num_ranks].

        Raises:
            RankError: not all came in time.
        """
        until_s = time.monotonic() + MEET_TIMEOUT_S
        try:
            while len(self.met) < self._num_ranks:
                if time.monotonic() > until_s:
                    missing = sorted(set(range(self._num_ranks)) - set(self.met))
                    raise RankError(f"ranks {missing} did not come within {MEET_TIMEOUT_S:g} s")
                for key, _ in self._selector.select(0.5):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._listen_to(key.data)
                self._see_off_the_late()
        except BaseException:
            for connection in self.met.values():
                connection.close()
            raise
        finally:
            for guest in list(self._guests):
                self._refuse(guest, "all ranks are there")
            self._selector.close()
        return [self.met[rank] for rank in range(self._num_ranks)]

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it has gone away again
            return
        connection.setblocking(False)
        until_s = time.monotonic() + _GREETING_TIMEOUT_S
        guest = _Guest(connection, f"{address[0]}:{address[1]}", until_s)
        self._guests.append(guest)
        self._selector.register(connection, selectors.EVENT_READ, guest)
        if len(self._guests) > _MOST_GUESTS:
            oldest = next(each for each in self._guests if each.rank != 0)
            self._refuse(oldest, "too many wait to be known")

    def _listen_to(self, guest: _Guest) -> None:
        """Read what was said so far; never more than a greeting has."""
        wanted = _GREETING.size
        if guest.rank == 0:
            wanted += HASH_BYTES * (self._num_ranks - 1)
        try:
            said = guest.connection.recv(wanted - len(guest.said))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(guest, error.strerror or str(error))
            return
        if not said:
            self._refuse(guest, "it closed the connection")
            return
        guest.said += said
        if len(guest.said) < wanted:
            return
        magic, rank, secret = _GREETING.unpack_from(guest.said)
        if magic != _MAGIC or rank >= self._num_ranks:
            self._refuse(guest, "it does not speak as a rank")
        elif rank == 0:
            self._take_first(guest, secret)
        else:
            guest.rank = rank
            self._selector.unregister(guest.connection)
            guest.until_s = float("inf")  # until the first rank has brought the hashes
            self._check(guest)

    def _take_first(self, guest: _Guest, secret: bytes) -> None:
        if not secrets.compare_digest(hash_of(secret), self._hashes[0]) or 0 in self.met:
            self._refuse(guest, "it is not rank 0")
            return
        guest.rank = 0
        if len(guest.said) < _GREETING.size + HASH_BYTES * (self._num_ranks - 1):
            guest.until_s = time.monotonic() + MEET_TIMEOUT_S  # the others have to come up first
            return
        brought = bytes(guest.said[_GREETING.size :])
        for rank in range(1, self._num_ranks):
            self._hashes[rank] = brought[HASH_BYTES * (rank - 1) : HASH_BYTES * rank]
        self._selector.unregister(guest.connection)
        self._welcome(guest, 0)
        for waiting in [each for each in self._guests if each.rank is not None]:
            self._check(waiting)

    def _check(self, guest: _Guest) -> None:
        assert guest.rank is not None, "it has said which it is"
        known = self._hashes.get(guest.rank)
        if known is None:
            return
        _, _, secret = _GREETING.unpack_from(guest.said)
        if guest.rank in self.met or not secrets.compare_digest(hash_of(secret), known):
            self._refuse(guest, f"it is not rank {guest.rank}")
        else:
            self._welcome(guest, guest.rank)

    def _welcome(self, guest: _Guest, rank: int) -> None:
        self._guests.remove(guest)
        self.met[rank] = guest.connection

    def _see_off_the_late(self) -> None:
        now_s = time.monotonic()
        for guest in [each for each in self._guests if each.until_s < now_s]:
            self._refuse(guest, "it was silent")

    def _refuse(self, guest: _Guest, why: str) -> None:
        self._guests.remove(guest)
        with contextlib.suppress(KeyError):
            self._selector.unregister(guest.connection)
        guest.connection.close()
        self._num_reported += 1
        if self._num_reported <= _MOST_REPORTED:
            more = "; more are not reported" if self._num_reported == _MOST_REPORTED else ""
            self._report(f"refused a connection from {guest.address}: {why}{more}")
