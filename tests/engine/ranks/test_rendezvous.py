"""Nodes that connect to the launcher, and strangers who connect to the same port."""

import contextlib
import select
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from cli.screen import telling, tells
from engine.ranks.processes import wait_until
from expertlane.engine.ranks import node_ranks, rendezvous
from expertlane.engine.ranks.node_ranks import NodeAcceptor
from expertlane.engine.ranks.rendezvous import (
    Claim,
    Meeting,
    Place,
    connect,
    handshake,
    hash_of,
    listen,
    new_secret,
)
from expertlane.errors import RankError, UserError

NUM_NODES, RANKS_PER_NODE = 3, 2


class Launcher:
    """A launcher that waits for its nodes in a thread.

    Attributes:
        secrets: of the nodes; the first needs none.
        lines: what it reported of refused connections.
    """

    def __init__(self):
        self.listener = listen("127.0.0.1", 9)
        self._at = self.listener.getsockname()
        self.place = Place(*self._at)
        self.secrets = [new_secret() for _ in range(NUM_NODES)]
        self.lines = []
        self.is_done = False
        self._news, self._control = socket.socketpair()
        self._can_read = threading.Event()
        self._connections = []
        self._accepted = []
        self.acceptor = NodeAcceptor(
            *(self.listener, NUM_NODES, RANKS_PER_NODE, self.lines.append, self._ask)
        )
        for node in range(1, NUM_NODES):
            self.acceptor.expect_node(node)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
        with contextlib.suppress(RankError):
            self.acceptor.accept_nodes(self._control.fileno(), self._read_hashes)
            self.acceptor.accept_available()
            self.is_done = True

    def _ask(self):
        """As the fork server is asked, which answers when it has the store."""
        threading.Thread(target=self._tell, daemon=True).start()

    def _tell(self):
        self._can_read.wait()
        with contextlib.suppress(OSError):
            self._news.send(b".")

    def _read_hashes(self):
        self._control.recv(1)
        self.acceptor.tell([hash_of(secret) for secret in self.secrets[1:]])

    def tell_hashes(self):
        """From now on the store can be read."""
        self._can_read.set()

    def connect(self):
        """A new connection."""
        self._connections.append(socket.create_connection(self._at, timeout=60))
        return self._connections[-1]

    def connect_node(self, node, place=0, change=0):
        """A node connects as it should."""
        self._connections.append(
            connect(self.place, Claim(node, place, change), self.secrets[node])
        )
        return self._connections[-1]

    def connect_all(self):
        """All nodes, as they should."""
        made = [self.connect_node(node) for node in range(1, NUM_NODES)]
        self.tell_hashes()
        return made

    def wait(self, seconds=60):
        """Until all are connected; by node, the peers' addresses as the launcher sees them."""
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        assert self.is_done
        return {claim.node: at for claim, at in self.take().items()}

    def take(self):
        """By claim, the peers' addresses of those that were accepted since the last time."""
        accepted = self.acceptor.take()
        self._accepted += accepted.values()
        return {claim: made.getpeername() for claim, made in accepted.items()}

    def accept(self, condition):
        """Accept more until something is true."""
        assert wait_until(lambda: self.acceptor.accept_available() or condition())

    def close(self):
        """Let go of everything."""
        for connection in [*self._connections, *self._accepted, self._news, self._control]:
            connection.close()
        self._thread.join(10)
        self.acceptor.close()


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
def test_nodes_connect_in_any_order(launcher, order):
    """0 stands for the moment in which the store has told their hashes."""
    made = {}
    for node in order:
        if node:
            made[node] = launcher.connect_node(node).getsockname()
        else:
            launcher.tell_hashes()
    assert launcher.wait() == made
    assert launcher.lines == []


def test_silent_strangers_do_not_make_nodes_wait(launcher, monkeypatch):
    monkeypatch.setattr(node_ranks, "_HANDSHAKE_TIMEOUT_S", 1000.0)
    strangers = [launcher.connect() for _ in range(5)]
    launcher.connect_all()
    launcher.wait()
    assert all(map(is_refused, strangers))
    assert len(launcher.lines) == 5


def test_a_silent_stranger_is_refused_in_time(launcher, monkeypatch):
    monkeypatch.setattr(node_ranks, "_HANDSHAKE_TIMEOUT_S", 0.2)
    stranger = launcher.connect()
    assert is_refused(stranger)
    monkeypatch.setattr(node_ranks, "_HANDSHAKE_TIMEOUT_S", 60.0)
    launcher.connect_all()
    launcher.wait()
    (line,) = launcher.lines
    assert tells(line, f"refused 127.0.0.1:{port(stranger)} handshake time")


def port(connection):
    return connection.getsockname()[1]


def test_a_stranger_who_resets_the_connection(launcher):
    stranger = launcher.connect()
    stranger.sendall(b"XL")
    reset = struct.pack("ii", 1, 0)
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    stranger.close()
    launcher.connect_all()
    launcher.wait()
    assert tells(launcher.lines[0], "Connection reset by peer")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n" + bytes(64),
        b"\x80\x04" + b"c" * 100,
        b"XLNODE01" + b"\xff" * 64,
        handshake(Claim(0, 0, 0), bytes(32)),
        handshake(Claim(NUM_NODES, 0, 0), bytes(32)),
        handshake(Claim(1, RANKS_PER_NODE + 1, 0), bytes(32)),
    ],
    ids=["http", "pickle", "huge numbers", "the launcher's node", "no such node", "no such rank"],
)
def test_garbage(launcher, garbage):
    stranger = launcher.connect()
    stranger.sendall(garbage)
    assert is_refused(stranger)
    launcher.connect_all()
    launcher.wait()
    assert tells(launcher.lines[0], "handshake")


@pytest.mark.parametrize("index", range(1 + RANKS_PER_NODE))
@pytest.mark.parametrize("node", range(1, NUM_NODES))
def test_what_a_stranger_can_read_in_the_store_does_not_make_it_a_node(launcher, node, index):
    """It comes first, and shows the hash that the store holds."""
    stranger = launcher.connect()
    stranger.sendall(handshake(Claim(node, index, 0), hash_of(launcher.secrets[node])))
    launcher.connect_all()
    peers = launcher.wait()
    assert stranger.getsockname() != peers[node]
    assert is_refused(stranger)
    (line,) = launcher.lines
    assert tells(line, f"refused 127.0.0.1:{port(stranger)} not node {node}")


def test_a_node_that_is_connected_already_is_not_replaced(launcher):
    first = launcher.connect_node(1)
    launcher.tell_hashes()
    assert wait_until(lambda: (1, 0, 0) in launcher.acceptor._accepted)
    assert is_refused(launcher.connect_node(1))
    launcher.connect_node(2)
    assert launcher.wait()[1] == first.getsockname()
    assert launcher.lines[0].endswith(f": no {Claim(1, 0, 0)} is expected")


def test_a_node_that_is_lost_comes_back_at_once_by_its_secret(launcher):
    launcher.connect_all()
    launcher.wait()
    launcher.acceptor.expect_node(1, time.monotonic() + 1000)
    again = launcher.connect_node(1)
    launcher.accept(lambda: not launcher.acceptor.is_expecting)
    assert launcher.take() == {(1, 0, 0): again.getsockname()}


def test_another_process_becomes_a_lost_node_when_the_store_has_its_hash_and_time_is_over(launcher):
    launcher.connect_all()
    launcher.wait()
    launcher.acceptor.expect_node(1, time.monotonic() + 0.5)
    ended = launcher.connect()  # another that was started, and has ended meanwhile
    launcher.secrets[1] = new_secret()
    ended.sendall(handshake(Claim(1, 0, 0), launcher.secrets[1]))
    launcher.accept(lambda: launcher._control in select.select([launcher._control], [], [], 0)[0])
    launcher._read_hashes()
    ended.close()
    launcher.secrets[1] = new_secret()
    node = launcher.connect_node(1)
    stranger = launcher.connect()
    stranger.sendall(handshake(Claim(1, 0, 0), new_secret()))

    def is_over():
        if launcher._control in select.select([launcher._control], [], [], 0)[0]:
            launcher._read_hashes()
        return not launcher.acceptor.is_expecting

    launcher.accept(is_over)
    assert launcher.take() == {(1, 0, 0): node.getsockname()}
    assert is_refused(stranger)


def test_ranks_are_those_of_their_change(launcher):
    launcher.connect_all()
    launcher.wait()
    claims = {Claim(1, place, 7) for place in range(1, 1 + RANKS_PER_NODE)}
    launcher.acceptor.expect_ranks(claims)
    late = launcher.connect_node(1, 1, 6)
    made = {claim: launcher.connect_node(*claim).getsockname() for claim in claims}
    launcher.accept(lambda: not launcher.acceptor.is_expecting)
    assert launcher.take() == made
    assert is_refused(late)


def test_a_crowd_of_strangers_pushes_out_no_node_that_is_connected(launcher, monkeypatch):
    monkeypatch.setattr(node_ranks, "_MAX_PENDING", 4)
    launcher.tell_hashes()
    launcher.connect_node(1)
    assert wait_until(lambda: (1, 0, 0) in launcher.acceptor._accepted)
    strangers = [launcher.connect() for _ in range(10)]
    launcher.connect_node(2)
    launcher.wait()
    assert all(map(is_refused, strangers))
    assert len(launcher.lines) == 10
    assert tells(launcher.lines[-1], "more reported")


def test_nodes_that_do_not_connect(monkeypatch):
    monkeypatch.setattr(node_ranks, "CONNECT_TIMEOUT_S", 0.3)
    ours, theirs = socket.socketpair()
    line = telling("nodes [1, 2] connect 0.3 s")
    with listen("127.0.0.1", 3) as listener, ours, theirs:
        waiting = NodeAcceptor(listener, NUM_NODES, 1, print, print)
        waiting.expect_node(2)
        waiting.expect_node(1)
        with pytest.raises(RankError, match=line):
            waiting.accept_nodes(ours.fileno(), list)


def test_nodes_meet_in_a_store():
    """The first one hosts it where torchrun's agent does not; a place in it may be an old one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = Meeting("127.0.0.1", free.getsockname()[1], False, "", 2)
    secret, found = new_secret(), []
    node = threading.Thread(target=lambda: found.append(meeting.join(1, secret)))
    node.start()
    store = meeting.open(as_host=True)
    assert meeting.hashes(store) in ([b""], [hash_of(secret)])
    meeting.publish(store, Place("127.0.0.1", 1))
    with listen("127.0.0.1", 1) as listener:
        place = Place(*listener.getsockname(), "run")
        meeting.publish(store, place)
        node.join(30)
        ((where, connection),) = found
        connection.close()
    assert where == place
    assert meeting.hashes(store) == [hash_of(secret)]
    store.set("key", "of nodes")
    assert not meeting.of_run("run").open_for_ranks().check(["key"])


def test_it_listens_at_the_master_address_alone():
    with listen("127.0.0.1", 2) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_master_address_of_another_host():
    with pytest.raises(UserError, match=telling("MASTER_ADDR 192.0.2.1")):
        listen("192.0.2.1", 2)


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

    def getaddrinfo(name, *_, **__):
        assert name == "first"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(rendezvous.socket, "create_server", create_server)
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", getaddrinfo)
    if chosen is None:
        with pytest.raises(UserError, match=telling("MASTER_ADDR host alone")):
            listen("first", 2)
    else:
        listen("first", 2).close()
        assert bound == [chosen]
