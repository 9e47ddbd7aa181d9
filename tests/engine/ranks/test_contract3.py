"""Contract 3, ranks in this process's own pool: no wait without an end, one line that says why."""

import os
import re
import signal
import threading
import time

import pytest

from cli.screen import telling, tells
from distributed import on_ranks
from distributed.on_ranks import Echo, Fail, FailWhileOthersWait, Stay
from distributed.running import LONG, LONG_MODEL, deployment, run_deployment
from engine.ranks.processes import OwnRanks
from expertlane.engine.ranks import rank_settings
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.ranks.rank_settings import MAX_RANKS_PER_CORE, check_num_ranks
from expertlane.errors import CapacityError, RankError, UserError

LAYOUTS = ["dp=2,ep=2", *(pytest.param(each, marks=pytest.mark.full) for each in ("pp=2", "tp=2"))]
TIMEOUT_S = 2.0


@pytest.fixture
def start():
    """Start a pool; it and what is behind it."""
    pools = []

    def make(num_ranks, timeout_s=TIMEOUT_S):
        pool = RankPool(on_ranks.local_ranks(num_ranks, timeout_s), timeout_s)
        pools.append(pool)
        return pool, OwnRanks(pool._ranks)

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def kept_pool():
    """A pool of three ranks that nobody ends."""
    with RankPool(on_ranks.local_ranks(3, TIMEOUT_S), TIMEOUT_S) as pool:
        yield pool


def error_in_mid_run(pool, running, layout, harm, **flags):
    """Run something long and do `harm` to rank 1, stopped in a layer: the error, seconds."""
    seen = {}

    def act():
        seen["position"] = running.stop_in_a_layer(1)
        seen["at_s"] = time.monotonic()
        harm(running.pids[1])

    thread = threading.Thread(target=act)
    thread.start()
    with pytest.raises(RankError) as caught:
        run_deployment(pool, LONG_MODEL, deployment(layout), LONG, **flags)
    took_s = time.monotonic() - seen["at_s"]
    thread.join()
    return str(caught.value), seen["position"], took_s


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank(start, layout):
    pool, running = start(2)
    line, position, took_s = error_in_mid_run(
        pool, running, layout, lambda pid: os.kill(pid, signal.SIGKILL)
    )
    assert took_s < 10
    assert tells(line, "rank 1 killed SIGKILL")
    assert re.search(r" in step \d+, layer \d, stage [\w/ -]+", line)
    assert f" in {position}; " in line
    assert "\n" not in line
    assert pool.is_closed
    assert running.are_gone(seconds=60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_rank(start, layout):
    pool, running = start(2)
    line, position, took_s = error_in_mid_run(pool, running, layout, lambda pid: None)
    assert TIMEOUT_S <= took_s < TIMEOUT_S + 10
    assert tells(line, f"rank 1 hung {position} stopped 2 ranks ended")
    assert pool.is_closed
    assert running.are_gone(seconds=60)


@pytest.fixture
def one_core():
    """Leaves ranks that are started a single core."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not say which cores a process has")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("is_killed", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_rank_whose_core_others_wait_for(one_core, start, is_killed):
    """The system frees the core of a rank that dies; one that stops keeps it, and is named."""
    pool, running = start(3)

    def harm(pid):
        if is_killed:
            os.kill(pid, signal.SIGKILL)

    line, position, took_s = error_in_mid_run(
        pool, running, "dp=3,ep=3", harm, record_operations=True
    )
    assert took_s < TIMEOUT_S + 10
    assert line.startswith(f"rank 1 {'was killed by SIGKILL' if is_killed else 'hung'} ")
    assert f" in {position}" in line
    assert pool.is_closed
    assert running.are_gone(seconds=60)


def test_a_rank_that_stays_silent(start):
    pool, running = start(2, timeout_s=1.0)
    with pytest.raises(RankError, match=telling("rank 1 hung step 5 layer 1 stage attention")):
        pool.call(Stay(60), ranks=[1])
    assert running.are_gone(seconds=60)


def test_a_slow_rank_that_shows_progress_is_left_alone(kept_pool):
    kept_pool.call(Stay(TIMEOUT_S + 0.6, 6), ranks=[0])
    assert not kept_pool.is_closed


def test_the_fork_server_dies(start):
    pool, running = start(2)
    os.kill(running.server.pid, signal.SIGKILL)
    with pytest.raises(RankError, match=telling("ranks ended")):
        pool.call(Stay(30))
    assert running.are_gone(seconds=60)


def test_a_rank_that_raises(start):
    pool, running = start(2)
    with pytest.raises(RankError) as caught:
        pool.call(Fail(1))
    line = str(caught.value)
    assert tells(line, "rank 1 failed step 3 layer 2 stage experts ValueError two")
    assert "\n" not in line
    assert "Traceback" in caught.value.__notes__[0]
    assert running.are_gone(seconds=60)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_rank_that_raises_is_named_not_those_that_wait_for_it(start, rank):
    pool, running = start(3)
    with pytest.raises(RankError, match=rf"^rank {rank} failed in .*ValueError: broken"):
        pool.call(FailWhileOthersWait(rank))
    assert running.are_gone(seconds=60)


def test_a_mistake_at_the_start_leaves_nothing(monkeypatch):
    started = []
    monkeypatch.setattr(
        RankPool, "_receive_available", observe(RankPool._receive_available, started), raising=True
    )
    with pytest.raises(UserError, match=r"^dtype float16 needs a GPU"):
        RankPool(LocalRanks(1, TIMEOUT_S, "float16"), TIMEOUT_S)
    assert started
    assert started[0].are_gone(seconds=60)


def observe(take_news, started):
    """Look at the processes before the first news is taken in.

    Servers of other tests, alive in this process, take news in threads of their own.
    """
    thread = threading.get_ident()

    def observed(self, timeout_s):
        if not started and threading.get_ident() == thread:
            started.append(OwnRanks(self._ranks))
        return take_news(self, timeout_s)

    return observed


def test_closing_leaves_nothing(start):
    pool, running = start(3)
    assert not running.are_gone(seconds=0)
    pool.close()
    assert running.are_gone(seconds=60)
    pool.close()  # again: nothing happens
    with pytest.raises(RankError, match=telling("ranks gone")):
        pool.call(Echo(1))


def test_a_process_forked_from_the_launcher_leaves_its_ranks_alone(kept_pool):
    pool = kept_pool
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            pool.call(Echo(1))
        except RankError as error:
            code = 0 if "that this one was forked from" in str(error) else 2
        finally:
            pool.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pool.call(Echo("x")) == [(0, "x"), (1, "x"), (2, "x")]


def test_stopped_ranks_are_closed_too(start):
    pool, running = start(2)
    for pid in running.pids:
        os.kill(pid, signal.SIGSTOP)
    pool.close()
    assert running.are_gone(seconds=60)


def test_calls(kept_pool):
    pool = kept_pool
    assert pool.num_ranks == 3
    assert pool.call(Echo("x")) == [(0, "x"), (1, "x"), (2, "x")]
    assert pool.call(Echo("x"), ranks=[0, 2]) == [(0, "x"), (2, "x")]
    assert pool.call(Echo("x"), ranks=[]) == []
    # Each rank takes its calls in order; those for other ranks are not held up.
    slow = pool.submit(Stay(0.5), ranks=[1])
    behind = pool.submit(Echo(1), ranks=[1, 2])
    quick = pool.submit(Echo(2), ranks=[0])
    assert pool.first_done([slow, behind, quick]) is quick
    assert pool.collect(behind) == [(1, 1), (2, 1)]
    assert slow.is_done
    assert pool.collect(slow) == [None]


def test_too_many_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(rank_settings, "num_cores", lambda: 2)
    limit = 2 * MAX_RANKS_PER_CORE
    check_num_ranks(limit, oversubscribe=False)
    check_num_ranks(limit + 1, oversubscribe=True)
    with pytest.raises(CapacityError, match=telling("65 ranks 32 × 2 64 --oversubscribe")):
        check_num_ranks(limit + 1, oversubscribe=False)
