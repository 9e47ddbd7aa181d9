"""A pool in which ranks are absent, or ahead of the epoch: lost in any way, at any time."""

import os
import signal
import sys

import psutil
import pytest

from cli.screen import telling, tells
from distributed import on_ranks
from distributed.on_ranks import WAYS, Ahead, Describe, Echo, Exchange
from distributed.recovering import (
    check_among,
    check_exchange,
    lose,
    lose_among,
    lose_for_good,
    replace,
    start,
    wait_for,
)
from engine.ranks.test_recovering_pool import NUM_RANKS, leaves_nothing, start_pool
from expertlane.errors import RankError, RanksLostError

TIMEOUT_S = 3.0
TRANSPORTS = {
    "shared_memory": {},
    "gloo": {"EXPERTLANE_TRANSPORT": "gloo"},
}
IN_EVERY_WAY = pytest.mark.parametrize(
    ("pool", "way"),
    [*(("shared_memory", way) for way in WAYS), ("gloo", "raise")],
    indirect=["pool"],
    scope="module",  # else a test takes the pool down, since "way" is its own
)


@pytest.fixture(scope="module", params=TRANSPORTS)
def pool(request):
    """A pool with nobody absent, which logs lines."""
    with pytest.MonkeyPatch.context() as patch, leaves_nothing():
        for name, value in TRANSPORTS[request.param].items():
            patch.setenv(name, value)
        with start_pool(NUM_RANKS, TIMEOUT_S) as started:
            started.lines = []
            started.on_early_end(started.lines.append)
            yield started


@pytest.fixture(autouse=True)
def all_are_there(request):
    """Before each test."""
    if "pool" in request.fixturenames:
        pool = request.getfixturevalue("pool")
        pool.end(pool.ahead | pool.starting)
        pool.begin_epoch(pool.absent, num_ranks=NUM_RANKS)
        pool.lines.clear()


@pytest.mark.smoke(1)
@pytest.mark.parametrize("way", ["kill", "raise", "stop"])
def test_lost_before_it_is_up(monkeypatch, tmp_path, way):
    monkeypatch.setenv(on_ranks.LOST_AT_START, str(tmp_path))
    with leaves_nothing(), start_pool(2, TIMEOUT_S) as pool:
        lines = []
        pool.on_early_end(lines.append)
        (tmp_path / "2").write_text(way)
        pool.start([2])
        wait_for(pool, lambda: not pool.starting)
        (line,) = lines
        assert line.startswith("rank 2 ")
        assert tells(line, "not use yet")
        start(pool, [2])
        pool.begin_epoch((), num_ranks=3)
        check_exchange(pool, 1)


@pytest.mark.full
def test_one_that_hangs_at_its_start_or_has_no_room(monkeypatch, tmp_path):
    monkeypatch.setenv(on_ranks.LOST_AT_START, str(tmp_path))
    with leaves_nothing(), start_pool(2, TIMEOUT_S) as pool:
        lines = []
        pool.on_early_end(lines.append)
        (tmp_path / on_ranks.NO_ROOM).touch()
        pool.start([2, 3])
        wait_for(pool, lambda: not pool.starting)
        assert {line.split(" could ")[0] for line in lines} == {"rank 2", "rank 3"}
        (tmp_path / on_ranks.NO_ROOM).unlink()
        start(pool, [2])
        (tmp_path / "3").write_text("compute")
        pool.start([3])
        with pytest.raises(RanksLostError, match=telling("rank 3 hung stage setup")) as caught:
            pool.begin_epoch((), num_ranks=4)
        assert caught.value.ranks == {3}
        pool.begin_epoch(caught.value.ranks, replaces=False)
        assert (pool.present, pool.absent) == ({0, 1, 2}, {3})
        check_among(pool, 1)
        pool.start([3])  # and is so when all end
        pool.submit(Ahead(0, seconds=60.0), ranks=[0, 1])
        pool.submit(Exchange(1))


@pytest.mark.smoke(1)
@IN_EVERY_WAY
def test_the_others_go_on_until_another_one_is_ahead(pool, way):
    before = pool.epoch
    check_exchange(pool, 1)
    lose_for_good(pool, {1: way})
    assert (pool.epoch, pool.absent, pool.present) == (before + 1, {1}, {0, 2})
    check_among(pool, 2)
    assert pool.call(Echo("all")) == [(0, "all"), (2, "all")]
    with pytest.raises(ValueError, match=r"ranks \[1\] take no Echo"):
        pool.submit(Echo("nobody"), ranks=[0, 1])
    pool.start([1])
    while 1 not in pool.ahead:
        check_among(pool, 3)
    assert not pool.absent
    assert pool.num_ranks == NUM_RANKS
    with pytest.raises(ValueError, match=r"ranks \[1\] take no Echo"):
        pool.submit(Echo("of the epoch"), ranks=[1])
    behind = pool.submit(Ahead("slow", seconds=0.3), ranks=[1, 2])
    assert pool.call(Ahead("ahead"), ranks=[1]) == [(1, "ahead")]
    assert pool.collect(behind) == [(1, "slow"), (2, "slow")]
    check_among(pool, 4)
    assert pool.epoch == before + 1
    pid = pool.pid(1)
    if sys.platform == "linux":
        assert psutil.Process(pid).name() == "expertlane r1"
    pool.begin_epoch(())
    assert (pool.ahead, pool.absent, pool.pid(1)) == (set(), set(), pid)
    check_exchange(pool, 5)
    assert not pool.lines
    epochs, num_open, num_threads, transports = zip(*pool.call(Describe()), strict=True)
    assert {*epochs} == {pool.epoch}
    assert len({*transports}) == len({*num_threads}) == 1
    assert num_open[1] <= min(num_open[0], num_open[2])  # it has kept nothing of an old epoch


@pytest.mark.smoke(3)
@IN_EVERY_WAY
def test_one_that_is_lost_ahead_is_no_loss(pool, way):
    lose_for_good(pool, {2: "kill"})
    start(pool, [2])
    pid, epoch = pool.pid(2), pool.epoch
    both, alone = pool.submit(Ahead(1), ranks=[0, 1]), pool.submit(Ahead("", way=way), ranks=[2])
    also = pool.submit(Ahead("also"), ranks=[1, 2])
    wait_for(pool, lambda: alone.is_lost)
    (line,) = pool.lines
    assert line.startswith("rank 2 ")
    assert tells(line, "not use yet")
    assert also.is_lost
    with pytest.raises(RankError, match=telling("dropped rank 2")):
        pool.collect(also)
    assert pool.collect(both) == [(0, 1), (1, 1)]
    assert (pool.absent, pool.epoch) == ({2}, epoch)
    check_among(pool, 1)
    start(pool, [2])
    assert not psutil.pid_exists(pid)
    assert pool.call(Ahead("again"), ranks=[1, 2]) == [(1, "again"), (2, "again")]
    pool.begin_epoch(())
    check_exchange(pool, 2)


@pytest.mark.smoke(1)
def test_a_loss_meanwhile(pool):
    """One that is ahead goes on with what needs no epoch, and joins when it is asked to."""
    lose_for_good(pool, {1: "kill"})
    start(pool, [1])
    pid = pool.pid(1)
    slow = pool.submit(Ahead("slow", seconds=1.0), ranks=[1])
    lost = lose_among(pool, {2: "stop"})
    with pytest.raises(ValueError, match=telling("ranks [2] epoch 3")):
        pool.begin_epoch(lost, replaces=False, joining=[2])
    pool.begin_epoch(lost, replaces=False, joining=())
    assert (pool.present, pool.ahead, pool.absent) == ({0}, {1}, {2})
    check_among(pool, 1)
    assert pool.collect(slow) == [(1, "slow")]
    pool.start([2])
    pool.begin_epoch((), joining=[1, 2])  # waits until both are up
    assert pool.present == {0, 1, 2}
    assert pool.pid(1) == pid
    check_exchange(pool, 2)


@pytest.mark.smoke(1)
def test_one_that_is_starting_stays_so_in_the_next_epoch(pool):
    lose_for_good(pool, {0: "exit", 1: "kill"})
    check_among(pool, 1)
    pool.start([0, 1])
    pool.begin_epoch((), replaces=False)
    assert pool.present == {2}
    check_among(pool, 2)
    wait_for(pool, lambda: pool.ahead == {0, 1})
    os.kill(pool.pid(2), signal.SIGKILL)
    with pytest.raises(RanksLostError, match="rank 2 was killed"):
        pool.call(Echo(0))
    pool.begin_epoch([2], replaces=False)
    assert (pool.present, pool.absent) == ({0, 1}, {2})
    check_among(pool, 3)
    pool.begin_epoch([2])  # also one that was absent is replaced
    check_exchange(pool, 4)


@pytest.mark.full
def test_more_and_fewer_ranks_while_some_are_ahead(pool):
    start(pool, [3, 4])
    assert (pool.num_ranks, pool.absent) == (NUM_RANKS, set())
    check_exchange(pool, 1)
    replace(pool, lose(pool, {0: "kill"}).ranks)
    assert pool.ahead == {3, 4}  # further ones stay
    pids = [pool.pid(3), pool.pid(4)]
    pool.begin_epoch((), num_ranks=2)
    assert (pool.present, pool.ahead) == ({0, 1}, {3, 4})
    check_exchange(pool, 2)
    pool.begin_epoch((), num_ranks=6)
    assert [pool.pid(3), pool.pid(4)] == pids
    check_exchange(pool, 3)
    start(pool, [6, 9])
    pool.end([0, 6])
    assert (pool.ahead, pool.present) == ({9}, {*range(6)})
    with pytest.raises(ValueError, match=telling("[2, 9]")):
        pool.start([2, 9, 10])
    with pytest.raises(ValueError, match=rf"not below {pool.most_ranks}$"):
        pool.start([pool.most_ranks])
    pool.begin_epoch((), num_ranks=3)
    check_exchange(pool, 4)
