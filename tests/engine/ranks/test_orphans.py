"""No rank outlives its launcher, whoever else holds the launcher's sockets."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from engine.ranks.processes import RunningRanks

LAUNCHER = textwrap.dedent(
    """
    import os, sys, threading, time
    from expertlane.engine.ranks.local_ranks import LocalRanks
    from expertlane.engine.ranks.pool import RankPool

    def start():
        global pool
        pool = RankPool(LocalRanks(2, 60.0, "float32"), 60.0)

    thread = threading.Thread(target=start)  # ranks do not end with the thread that made them
    thread.start()
    thread.join()
    child = os.fork()  # holds all sockets of the launcher
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
    """
)


@pytest.fixture
def launcher():
    """A launcher that has forked, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(process.stdout.readline())
    yield process, child
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_what_ranks_share_has_no_name_that_could_be_left_over(launcher):
    process, _ = launcher
    pids = RunningRanks(process.pid, 2).pids
    mapped = {each.path for pid in pids for each in psutil.Process(pid).memory_maps()}
    named = [path for path in mapped if path.startswith(("/dev/shm", "/tmp/expertlane-"))]
    assert not named
    assert any(path.startswith("/memfd:expertlane") for path in mapped)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_a_launcher_that_has_forked(launcher, number):
    process, child = launcher
    running = RunningRanks(process.pid, 2)
    os.kill(process.pid, number)
    assert running.are_gone(seconds=60)
    assert psutil.pid_exists(child)  # it had the sockets all the time


def test_ranks_end_when_launcher_and_server_are_killed_at_once(launcher):
    process, _ = launcher
    running = RunningRanks(process.pid, 2)
    for pid in (running.server.pid, process.pid):
        os.kill(pid, signal.SIGKILL)
    assert running.are_gone(seconds=60)
