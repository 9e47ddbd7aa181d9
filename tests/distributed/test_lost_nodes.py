"""A node of two, both on this machine, is lost and comes back, or does not."""

import contextlib
import os
import signal
import socket
import threading
import time

import psutil
import pytest

from cli.screen import telling, tells
from distributed.on_ranks import ExchangeAmong, RanksOnNodes, Stay
from distributed.recovering import check_exchange, replace
from engine.ranks.processes import session_is_gone, wait_until
from expertlane.engine.ranks import node_ranks
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError, RanksLostError

TIMEOUT_S = 5.0  # a node of a busy machine answers by then
OF_NODE = {2, 3}


@contextlib.contextmanager
def two_nodes(rejoin_s):
    """A pool of two nodes with two ranks each, of which nothing is left."""
    ranks = RanksOnNodes(2, 2, TIMEOUT_S, recovers=True, rejoin_s=rejoin_s)
    try:
        with RankPool(ranks, TIMEOUT_S) as started:
            yield started
    finally:
        for server in (ranks._server, *ranks.supervisors):
            assert session_is_gone(server.pid, seconds=60)


@pytest.fixture(scope="module")
def pool():
    with two_nodes(60.0) as started:
        check_exchange(started, 1)
        yield started


@pytest.fixture
def supervisor(pool):
    """The process of the second node, and its ranks."""
    process = psutil.Process(pool._ranks.supervisors[-1].pid)
    return process, process.children()


@pytest.fixture
def short_lease(monkeypatch):
    """Whoever was killed needs none: its ranks are dead."""
    monkeypatch.setattr(node_ranks, "LEASE_S", 0.5)


def lost(pool, action=None):
    """The node is lost during an action, by default while nothing runs; the error."""

    def run():
        while True:
            (action or pool.check)()
            time.sleep(0.01)

    with pytest.raises(RanksLostError) as caught:
        run()
    assert caught.value.ranks >= OF_NODE
    assert pool.away == OF_NODE
    return caught.value


def test_a_node_whose_connection_broke_comes_back_by_itself(pool, supervisor):
    process, before = supervisor
    pool._ranks.nodes[1].control._socket.shutdown(socket.SHUT_RDWR)
    error = lost(pool)
    assert tells(str(error), "supervisor node 1 127.0.0.1 gone")
    ours = [pool.pid(rank) for rank in (0, 1)]
    assert replace(pool, error.ranks) == OF_NODE
    assert not any(each.is_running() for each in before)
    assert len(process.children()) == 2
    assert [pool.pid(rank) for rank in (0, 1)] == ours
    check_exchange(pool, 2)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_whose_supervisor_is_gone_comes_back_with_another(
    pool, supervisor, short_lease, way
):
    """A stopped one is ended by its ranks, which see that the launcher has given it up."""
    process, before = supervisor
    process.send_signal(way)
    error = lost(pool, lambda: pool.call(Stay(TIMEOUT_S + 4, 30)))
    pool._ranks.start_supervisor(1)
    assert replace(pool, error.ranks) == OF_NODE
    assert not psutil.wait_procs([process, *before], timeout=60)[1]
    check_exchange(pool, 3)


def test_a_rank_is_lost_while_a_node_is_away(pool, supervisor, short_lease):
    supervisor[0].kill()
    error = lost(pool)
    pid = pool.pid(1)

    def act():
        assert wait_until(lambda: pool._ranks.awaited)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: pool._ranks.awaited and pool.pid(1) is None)
        pool._ranks.start_supervisor(1)

    thread = threading.Thread(target=act)
    thread.start()
    assert replace(pool, error.ranks) == {1, *OF_NODE}
    thread.join()
    check_exchange(pool, 5)


def test_the_others_go_on_without_the_node_until_it_is_back(pool, supervisor, short_lease):
    supervisor[0].kill()
    pool.begin_epoch(lost(pool).ranks, replaces=False)
    assert (pool.absent, pool.away) == (OF_NODE, OF_NODE)
    assert pool.call(ExchangeAmong([0, 1], 6))[0].tolist() == [
        [pool.epoch, other, 0, 6] for other in (0, 1)
    ]
    pool._ranks.start_supervisor(1)

    def is_back():
        pool.check()
        return not pool.away

    assert wait_until(is_back, pause_s=0.05)
    pool.start(OF_NODE)

    def are_ahead():
        pool.check()
        return pool.ahead == OF_NODE

    assert wait_until(are_ahead, pause_s=0.05)
    pool.begin_epoch(())
    check_exchange(pool, 7)


def test_a_node_that_does_not_come_back_ends_all():
    with two_nodes(1.0) as pool:
        pool._ranks.supervisors[0].kill()
        error = lost(pool)
        began_s = time.monotonic()
        with pytest.raises(RankError, match=telling("back 1 s ranks ended")) as end:
            pool.begin_epoch(error.ranks)
        assert not isinstance(end.value, RanksLostError)
        assert time.monotonic() - began_s > 0.5
        assert pool.is_closed
