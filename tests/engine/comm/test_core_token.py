"""One rank a core computes at a time: real processes, and a file that they share."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from expertlane.engine.comm import clocks
from expertlane.engine.comm.clocks import CoreToken

_SECONDS = 30.0

# Answers "has it" when it has the core; then gives it back at the next line, and says so.
_RANK = """
import sys
from expertlane.engine.comm import clocks
token = clocks.CoreToken(int(sys.argv[1]), int(sys.argv[2]), 2)
for line in sys.stdin:
    getattr(token, line.strip())()
    print(line.strip(), flush=True)
"""


class Rank:
    """A process that does with its token what it is told."""

    def __init__(self, file, local_rank):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RANK, str(file), str(local_rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[file],
        )

    def tell(self, what):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def hears(self, what):
        assert self.process.stdout.readline() == f"{what}\n"

    def does(self, what):
        self.tell(what)
        self.hears(what)

    def end(self):
        self.process.kill()
        self.process.wait(_SECONDS)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def file(tmp_path):
    descriptor = os.open(tmp_path / "board", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, bytes(8))
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def ranks(file):
    with contextlib.ExitStack() as stack:
        yield lambda local_rank: (rank := Rank(file, local_rank), stack.callback(rank.end))[0]


def is_free(file, core):
    """Whether a process beside the ranks could have the core now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, core)
    except BlockingIOError:
        return False
    fcntl.lockf(file, fcntl.LOCK_UN, 1, core)
    return True


def test_one_of_two_on_a_core(file, ranks):
    first, second = ranks(0), ranks(2)
    first.does("acquire")
    first.does("acquire")  # no effect
    assert not is_free(file, 0)
    second.tell("acquire")
    first.does("release")
    second.hears("acquire")  # not before, since only then it is free
    first.does("release")  # no effect: it has none to give back
    assert not is_free(file, 0)
    second.does("release")
    assert is_free(file, 0)


def test_it_is_freed_when_its_owner_is_killed(file, ranks):
    first, second = ranks(0), ranks(2)
    first.does("acquire")
    second.tell("acquire")
    assert not is_free(file, 0)
    first.process.send_signal(signal.SIGKILL)
    second.hears("acquire")


def test_ranks_take_turns_with_the_cores_that_there_are(file, monkeypatch):
    locked = []
    monkeypatch.setattr(
        clocks.fcntl, "lockf", lambda fd, how, num, core: locked.append((fd, num, core))
    )
    for local_rank in range(5):
        CoreToken(file, local_rank, 3).acquire()
    assert locked == [(file, 1, core) for core in (0, 1, 2, 0, 1)]
