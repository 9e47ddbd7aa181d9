"""A pool whose lost ranks are replaced, in any way that a rank can be lost, at any time."""

import gc
import os
import signal
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest

from cli.screen import telling, tells
from distributed import on_ranks
from distributed.on_ranks import LOST_AT_START, WAYS, Echo, Exchange, Refuse, Stay
from distributed.recovering import check_exchange, lose, replace
from engine.ranks.processes import session_is_gone, wait_until
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError, RanksLostError, UserError
from forked import prepare_forks

NUM_RANKS = 3
TIMEOUT_S = 3.0
NEVER_S = 60.0  # where no rank is to hang
HOW = {
    "kill": "killed SIGKILL",
    "stop": "hung step 7 layer 3 stage router stopped",
    "raise": "failed step 7 layer 3 stage router ValueError: broken",
    "exit": "ended exit code 3 step 7 layer 3 stage router",
    "compute": "hung step 7 layer 3 stage router 3 s slow",
}


def start_pool(num_ranks=NUM_RANKS, timeout_s=TIMEOUT_S):
    return RankPool(on_ranks.local_ranks(num_ranks, timeout_s, recovers=True), timeout_s)


@contextmanager
def leaves_nothing():
    """Nothing is left of a pool that is made and closed inside."""
    prepare_forks()  # what they need is not of the pool
    before, num_before = names(), num_files_in_memory()
    yield
    assert wait_until(lambda: names() <= before), (sorted(names() - before), descriptors())
    assert num_files_in_memory() <= num_before + 1  # the progress board may still be read


def descriptors():
    """What this process has open, by descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # what listed them, which is closed by now
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def num_files_in_memory():
    return sum(target.startswith("/memfd:") for target in descriptors().values())


def names():
    """What could be left: open files here, files in shared memory, processes."""
    gc.collect()  # what earlier tests left in cycles is nobody's
    opened = {f"fd {n}" for n, target in descriptors().items() if not target.startswith("/memfd:")}
    children = {f"process {each.pid}" for each in psutil.Process().children(recursive=True)}
    return opened | children | {*os.listdir("/dev/shm")}


@pytest.fixture(scope="module")
def kept_pool():
    """A pool that is as good as new after each test."""
    with start_pool() as started:
        yield started


@pytest.mark.smoke(3)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_is_lost_while_the_others_wait_for_it(kept_pool, way):
    pool, epoch = kept_pool, kept_pool.epoch
    pids = list(map(pool.pid, range(NUM_RANKS)))
    check_exchange(pool, 1)
    error = lose(pool, {1: way})
    assert error.ranks == {1}
    line = str(error)
    assert tells(line, f"rank 1 {HOW[way]}")
    assert "ranks were ended" not in line
    assert "\n" not in line
    for again in (lambda: pool.call(Echo(1)), pool.check, lambda: pool.submit(Echo(1))):
        with pytest.raises(RanksLostError, match=r"^rank 1 ") as caught:
            again()
        assert caught.value.ranks == {1}
    pool.begin_epoch(error.ranks)
    assert pool.epoch == epoch + 1
    assert not psutil.pid_exists(pids[1])
    now = list(map(pool.pid, range(NUM_RANKS)))
    assert [now[rank] == pids[rank] for rank in range(NUM_RANKS)] == [True, False, True]
    check_exchange(pool, 2)
    pool.check()


def test_a_rank_is_lost_while_nothing_is_asked_of_it(kept_pool):
    pool = kept_pool
    check_exchange(pool, 1)
    for notice in (pool.check, lambda: pool.call(Echo(1))):
        os.kill(pool.pid(2), signal.SIGKILL)
        with pytest.raises(RanksLostError, match=telling("rank 2 killed SIGKILL")) as caught:
            assert not wait_until(notice)
        pool.begin_epoch(caught.value.ranks)
        check_exchange(pool, 2)


def test_what_is_under_way_comes_to_nothing(kept_pool):
    """Commands behind the one in which a rank is lost, and answers that come too late."""
    pool = kept_pool
    busy = pool.submit(Stay(1.0, 4), ranks=[0])
    behind = [pool.submit(Echo(number)) for number in range(3)]
    os.kill(pool.pid(1), signal.SIGKILL)
    with pytest.raises(RanksLostError):
        pool.collect(behind[-1])
    pool.begin_epoch([1])
    with pytest.raises(RankError, match=telling("dropped epoch")):
        pool.collect(busy)
    assert pool.call(Echo("new")) == [(rank, "new") for rank in range(NUM_RANKS)]
    check_exchange(pool, 3)


def test_no_rank_is_lost_but_an_epoch_begins(kept_pool):
    """Ranks wait for one that was not asked; the next epoch parts them."""
    pool, pids = kept_pool, list(map(kept_pool.pid, range(NUM_RANKS)))
    pool.submit(Exchange(1), ranks=[0, 2])
    pool.begin_epoch([])
    check_exchange(pool, 2)
    assert list(map(pool.pid, range(NUM_RANKS))) == pids


def test_all_ranks_are_lost_at_once(kept_pool):
    error = lose(kept_pool, dict.fromkeys(range(NUM_RANKS), "raise"))
    assert replace(kept_pool, error.ranks) == set(range(NUM_RANKS))
    check_exchange(kept_pool, 1)
    pids = list(map(kept_pool.pid, range(NUM_RANKS)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    with pytest.raises(RanksLostError, match=telling("rank killed 2 ranks ended")) as caught:
        kept_pool.call(Stay(60))
    assert replace(kept_pool, caught.value.ranks) == set(range(NUM_RANKS))
    check_exchange(kept_pool, 2)


@pytest.fixture
def lose_at_start(monkeypatch, tmp_path):
    """Say how a rank is lost before it is up, each time it is started."""
    monkeypatch.setenv(LOST_AT_START, str(tmp_path))
    return lambda rank, *ways: (tmp_path / str(rank)).write_text(" ".join(ways))


@pytest.mark.full
def test_ranks_are_lost_before_they_are_up(lose_at_start):
    lose_at_start(0, "kill")
    lose_at_start(2, "raise")
    with leaves_nothing(), start_pool() as pool:
        check_exchange(pool, 1)
        assert pool.epoch >= 1
        lose_at_start(1, "stop", "exit")
        lost, seen = lose(pool, {1: "kill"}).ranks, []
        while lost:
            try:
                pool.begin_epoch(lost)
                lost = frozenset()
            except RanksLostError as error:
                lost = error.ranks
                seen.append(str(error))
        assert [" ".join(line.split()[:3]) for line in seen] == ["rank 1 hung", "rank 1 ended"]
        check_exchange(pool, 2)
        lose_at_start(1, "stop")
        lost = lose(pool, {1: "exit"}).ranks
        killer = threading.Timer(0.5, os.kill, (pool.pid(2), signal.SIGKILL))
        killer.start()
        with pytest.raises(RanksLostError, match=r"^rank 2 was killed") as caught:
            pool.begin_epoch(lost)
        killer.join()
        assert caught.value.ranks == {1, 2}
        assert replace(pool, caught.value.ranks) == {1, 2}
        check_exchange(pool, 3)


@pytest.mark.full
def test_who_is_stopped_at_the_start_is_noticed_within_the_bound(lose_at_start):
    """A cold start may take minutes, but not of a process that does not run."""
    lose_at_start(1, "stop")
    with leaves_nothing(), start_pool(timeout_s=1.0) as pool:
        assert pool.epoch >= 1
        check_exchange(pool, 1)
    with leaves_nothing():
        ranks = on_ranks.local_ranks(2, 1.0)
        assert wait_until(lambda: os.getpgid(ranks._server.pid) == ranks._server.pid)
        os.kill(ranks._server.pid, signal.SIGSTOP)
        with pytest.raises(RankError, match=telling("fork server hung stopped")):
            RankPool(ranks, 1.0)


@pytest.mark.full
def test_a_rank_that_is_lost_at_every_start(lose_at_start):
    lose_at_start(1, *["exit"] * 9)
    with (
        leaves_nothing(),
        pytest.raises(RankError, match=telling("rank 1 ended exit code 3 ranks")),
    ):
        start_pool(timeout_s=NEVER_S)


@pytest.mark.full
def test_many_epochs_leave_nothing_open_and_the_end_of_the_fork_server_is_final():
    gc.collect()  # the progress boards of earlier pools
    with leaves_nothing(), start_pool(timeout_s=NEVER_S) as pool:
        server = psutil.Process(pool._ranks._server.pid)
        states = []
        for number in range(20):
            replace(pool, lose(pool, {number % 2 + 1: ("kill", "exit", "raise")[number % 3]}).ranks)
            check_exchange(pool, number)
            states.append(state_of(pool, server))
        assert states[2:] == [states[2]] * 18
        server.kill()
        with pytest.raises(RankError, match=telling("ranks ended")) as caught:
            pool.call(Stay(30))
        assert not isinstance(caught.value, RanksLostError)
        assert pool.is_closed


def state_of(pool, server):
    """What a pool, its server and a rank that is never lost have open."""
    pids = [pool.pid(rank) for rank in range(NUM_RANKS)]
    assert sorted(each.pid for each in server.children()) == sorted(pids)  # and no zombie
    survivor = psutil.Process(pids[0])
    in_memory = [each.path for each in survivor.memory_maps() if "/memfd:" in each.path]
    return (
        [psutil.Process(pid).num_fds() for pid in (os.getpid(), server.pid, survivor.pid)],
        survivor.num_threads(),
        len(in_memory),
        sorted(os.listdir("/dev/shm")),
    )


@pytest.mark.smoke(1)
@pytest.mark.parametrize("is_server_stopped", [False, True])
def test_interrupted_while_an_epoch_begins(lose_at_start, is_server_stopped):
    """As by Ctrl-C: while a replacement hangs, or the fork server is stopped."""
    lose_at_start(1, "")
    with leaves_nothing(), start_pool(timeout_s=NEVER_S) as pool:
        server_pid = pool._ranks._server.pid
        lose_at_start(1, "compute")
        lost = lose(pool, {1: "exit"}).ranks
        if is_server_stopped:
            os.kill(server_pid, signal.SIGSTOP)
        main = threading.main_thread().ident
        interrupt = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt), pool:
            pool.begin_epoch(lost)
        interrupt.join()
        assert pool.is_closed
        assert session_is_gone(server_pid, seconds=60)


def test_a_user_s_mistake_is_final():
    with leaves_nothing(), start_pool(1, NEVER_S) as pool:
        with pytest.raises(UserError, match="layout is too wide"):
            pool.call(Refuse(0))
        assert pool.is_closed
