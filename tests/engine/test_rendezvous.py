"""Ranks that torchrun starts, and strangers who connect to the same port."""

import contextlib
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from expertlane.engine import rendezvous
from expertlane.engine.rendezvous import RankAcceptor, handshake, hash_of, listen, new_secret
from expertlane.errors import RankError, UserError

NUM_RANKS = 3


class Launcher:
    """A launcher that waits for its ranks in a thread.

    Attributes:
        secrets: of the ranks.
        lines: what it reported of refused connections.
    """

    def __init__(self):
        self.listener = listen("127.0.0.1", NUM_RANKS, several_nodes=False)
        self.place = self.listener.getsockname()
        self.secrets = [new_secret() for _ in range(NUM_RANKS)]
        self.lines = []
        self.accepted = None
        self._connections = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
        with contextlib.suppress(RankError):
            acceptor = RankAcceptor(self.listener, NUM_RANKS, self.secrets[0], self.lines.append)
            self.accepted = acceptor.accept_all()

    def connect(self):
        """A new connection."""
        connection = socket.create_connection(self.place, timeout=10)
        self._connections.append(connection)
        return connection

    def connect_ranks(self, *ranks):
        """Ranks connect as they should, the first with the others' hashes."""
        for rank in ranks:
            hashes = b"".join(map(hash_of, self.secrets[1:])) if rank == 0 else b""
            self.connect().sendall(handshake(rank, self.secrets[rank]) + hashes)

    def wait(self, seconds=30):
        """Until all are connected; by rank, the peer's address as the launcher sees it."""
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        assert self.accepted is not None
        return [connection.getpeername() for connection in self.accepted]

    def close(self):
        """Let go of everything."""
        for connection in [*self._connections, *(self.accepted or [])]:
            connection.close()
        self._thread.join(10)
        self.listener.close()


@pytest.fixture
def launcher():
    started = Launcher()
    yield started
    started.close()


def is_refused(connection):
    """Whether the launcher closes a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_connect_in_any_order(launcher, order):
    launcher.connect_ranks(*order)
    at = launcher.wait()
    ours = [connection.getsockname() for connection in launcher._connections]
    assert at == [ours[order.index(rank)] for rank in range(NUM_RANKS)]
    assert launcher.lines == []


def test_silent_strangers_do_not_make_ranks_wait(launcher):
    strangers = [launcher.connect() for _ in range(5)]
    began_s = time.monotonic()
    launcher.connect_ranks(0, 1, 2)
    launcher.wait()
    assert time.monotonic() - began_s < 3
    assert all(map(is_refused, strangers))
    assert len(launcher.lines) == 5


def test_a_silent_stranger_is_refused_in_time(launcher, monkeypatch):
    monkeypatch.setattr(rendezvous, "_HANDSHAKE_TIMEOUT_S", 0.2)
    stranger = launcher.connect()
    assert is_refused(stranger)
    launcher.connect_ranks(0, 1, 2)
    launcher.wait()
    assert launcher.lines == [
        f"refused a connection from 127.0.0.1:{port(stranger)}: it sent no handshake in time"
    ]


def port(connection):
    return connection.getsockname()[1]


def test_a_stranger_who_resets_the_connection(launcher):
    stranger = launcher.connect()
    stranger.sendall(b"XL")
    reset = struct.pack("ii", 1, 0)
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    stranger.close()
    launcher.connect_ranks(0, 1, 2)
    launcher.wait()
    assert "Connection reset by peer" in launcher.lines[0]


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n" + bytes(64), b"\x80\x04" + b"c" * 100, b"XLRANK01" + b"\xff" * 64],
    ids=["http", "pickle", "rank 4294967295"],
)
def test_garbage(launcher, garbage):
    stranger = launcher.connect()
    stranger.sendall(garbage)
    assert is_refused(stranger)
    launcher.connect_ranks(0, 1, 2)
    launcher.wait()
    assert launcher.lines[0].endswith(": it sent no valid handshake")


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_what_a_stranger_can_read_in_the_store_does_not_make_it_a_rank(launcher, rank):
    """It comes first, and shows the hash that the store holds."""
    stranger = launcher.connect()
    stranger.sendall(handshake(rank, hash_of(launcher.secrets[rank])))
    launcher.connect_ranks(0, 1, 2)
    peers = launcher.wait()
    assert stranger.getsockname() not in peers
    assert is_refused(stranger)
    assert launcher.lines == [
        f"refused a connection from 127.0.0.1:{port(stranger)}: it is not rank {rank}"
    ]


def test_a_rank_that_is_connected_already_is_not_replaced(launcher):
    launcher.connect_ranks(0, 1, 1)
    assert is_refused(launcher._connections[2])
    launcher.connect_ranks(2)
    assert launcher.wait()[1] == launcher._connections[1].getsockname()


def test_a_crowd_of_strangers_pushes_out_no_rank_that_is_connected(launcher, monkeypatch):
    monkeypatch.setattr(rendezvous, "_MAX_PENDING", 4)
    launcher.connect_ranks(0)
    strangers = [launcher.connect() for _ in range(10)]
    launcher.connect_ranks(1, 2)
    launcher.wait()
    assert all(map(is_refused, strangers))
    assert len(launcher.lines) == 10
    assert launcher.lines[-1].endswith("; more are not reported")


def test_ranks_that_do_not_connect(monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT_S", 0.3)
    line = r"^ranks \[0, 1, 2\] did not connect within 0.3 s$"
    with (
        listen("127.0.0.1", 3, several_nodes=False) as listener,
        pytest.raises(RankError, match=line),
    ):
        RankAcceptor(listener, 3, new_secret(), print).accept_all()


def test_it_listens_at_the_master_address_alone():
    with listen("127.0.0.1", 2, several_nodes=False) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_master_address_of_another_host():
    with pytest.raises(UserError, match=r"^cannot listen at MASTER_ADDR 192\.0\.2\.1: "):
        listen("192.0.2.1", 2, several_nodes=False)


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [(["10.0.0.7"], "10.0.0.7"), (["10.0.0.7", "172.17.0.1"], None), ([], None)],
)
def test_a_master_address_that_means_this_host_alone(monkeypatch, addresses, chosen):
    """As Debian's own name of a host does; other nodes need the host's other address."""
    interfaces = {
        "lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")],
        "eth": [SimpleNamespace(family=socket.AF_INET, address=each) for each in addresses],
    }
    bound = []

    def create_server(place, **_):
        bound.append(place[0])
        return socket.socket()

    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(rendezvous.socket, "create_server", create_server)
    if chosen is None:
        with pytest.raises(UserError, match="MASTER_ADDR means this host alone"):
            listen("127.0.1.1", 2, several_nodes=True)
    else:
        listen("127.0.1.1", 2, several_nodes=True).close()
        assert bound == [chosen]
