"""Lost ranks of two nodes, both on this machine, are replaced; a lost node ends all ranks."""

import re
import socket

import psutil
import pytest

from cli.screen import telling
from distributed.on_ranks import Ahead, RanksOnNodes, Stay
from distributed.recovering import (
    check_among,
    check_exchange,
    lose,
    lose_for_good,
    replace,
    start,
    wait_for,
)
from engine.ranks.processes import session_is_gone
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.ranks.rendezvous import Claim, handshake
from expertlane.errors import RankError, RanksLostError

TIMEOUT_S = 2.5


@pytest.fixture(scope="module")
def pool():
    ranks = RanksOnNodes(2, 2, TIMEOUT_S, recovers=True)
    with RankPool(ranks, TIMEOUT_S) as started:
        yield started
    for server in (ranks._server, *ranks.supervisors):
        assert session_is_gone(server.pid, seconds=60)


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    "ways", [{2: "kill"}, {3: "stop"}, {3: "raise"}, {1: "kill"}, {0: "exit", 2: "exit"}], ids=str
)
def test_ranks_are_replaced_on_every_node(pool, ways):
    check_exchange(pool, 1)
    supervisor = psutil.Process(pool._ranks.supervisors[0].pid)
    before = [each.pid for each in supervisor.children()]
    error = lose(pool, ways)
    named = re.match(r"rank (\d) ", str(error))  # of two that end at once, the one noticed first
    assert int(named[1]) in error.ranks
    assert replace(pool, error.ranks) == ways.keys()
    check_exchange(pool, 2)
    after = [each.pid for each in supervisor.children()]
    num_lost = sum(rank >= 2 for rank in ways)
    assert (len(after), len(set(after) & set(before))) == (2, 2 - num_lost)


def test_who_is_no_rank_of_this_epoch_does_not_become_one(pool, capfd):
    """Strangers may connect at any time; they are looked at while an epoch begins."""
    place = pool._ranks._acceptor._listener.getsockname()
    strangers = [socket.create_connection(place) for _ in range(3)]
    strangers[1].sendall(handshake(Claim(1, 1, 10), bytes(32)))
    strangers[2].sendall(handshake(Claim(2, 1, 0), bytes(32)))
    assert replace(pool, lose(pool, {2: "kill"}).ranks) == {2}
    for stranger in strangers:
        stranger.settimeout(60)
        assert stranger.recv(1) == b""
        stranger.close()
    said = capfd.readouterr().err
    for why in ("nodes are connected", "not node 1", "handshake"):
        assert why in said
    check_exchange(pool, 3)


@pytest.mark.full
def test_ranks_are_absent_and_ahead_on_every_node(pool):
    supervisor = psutil.Process(pool._ranks.supervisors[0].pid)
    lines = []
    pool.on_early_end(lines.append)
    check_exchange(pool, 5)
    for number, way in enumerate(("kill", "raise", "stop")):
        lose_for_good(pool, {1: "exit", 3: way})
        assert pool.absent == {1, 3}
        check_among(pool, number)
        for _ in range(3):  # again and again, before they have connected
            pool.start([1, 3])
            pool.end([1, 3])
        pool.start([3])
        pool.begin_epoch((), joining=())  # while one starts
        start(pool, [1])
        wait_for(pool, lambda: pool.ahead == {1, 3})
        dead = pool.submit(Ahead(0, way=way), ranks=[3])
        wait_for(pool, lambda ticket=dead: ticket.is_lost)
        assert lines.pop().startswith("rank 3 ")
        assert not lines
        start(pool, [3])
        assert pool.call(Ahead(7), ranks=[0, 1, 3]) == [(0, 7), (1, 7), (3, 7)]
        pool.begin_epoch(())
        assert not pool.absent | pool.ahead
        check_exchange(pool, number)
        assert len(supervisor.children()) == 2


def test_a_lost_node_is_final(pool):
    check_exchange(pool, 4)
    pool._ranks.supervisors[0].kill()
    with pytest.raises(RankError, match=telling("supervisor node 1 gone ranks")) as caught:
        pool.call(Stay(60))
    assert not isinstance(caught.value, RanksLostError)
    assert pool.is_closed
