"""The protocol of docs/performance.md over all interleavings, and its C++ under a race detector.

The model is small: each rank sends a message to all, waits for those of all, reads them where they
are, and does so again.
Every step below is one access to shared memory or one system call.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.screen import telling

_SOURCE = Path(__file__).parent / "shared_memory_threads.cpp"
_NUM_ROUNDS = "1000"


class State(NamedTuple):
    """Shared memory, and where each rank is.

    Attributes:
        payload: the round of the message in each rank's heap, which has room for one.
        begun, sleeping, want: of each rank.
        consumed: [consumer][sender]; messages.
        blocked: whether the kernel has put the rank to sleep.
        at: [rank]; the next step, the round, and up to two places that the step looks at.
    """

    payload: tuple[int, ...]
    begun: tuple[int, ...]
    consumed: tuple[tuple[int, ...], ...]
    sleeping: tuple[int, ...]
    want: tuple[int, ...]
    blocked: tuple[bool, ...]
    at: tuple[tuple[str, int, int, int], ...]


class BrokenError(Exception):
    """The protocol failed."""


def put(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


class Rank:
    """The steps of one rank in a state; each gives the state after it, or None if it must wait."""

    def __init__(self, state, rank, num_rounds, variant):
        self.state, self.rank, self.num_rounds, self.variant = state, rank, num_rounds, variant
        self.size = len(state.at)
        self.step, self.round, self.place, self.sender = state.at[rank]

    def after(self):
        if self.state.blocked[self.rank] or self.step == "end":
            return None
        return getattr(self, self.step)()

    def go(self, step, place=0, sender=0, **changes):
        round_ = self.round + (step == "find_room" and self.step == "read")
        at = put(self.state.at, self.rank, (step, round_, place, sender))
        return self.state._replace(at=at, **changes)

    def next_place(self, then, **changes):
        if self.place + 1 < self.size:
            return self.go(self.step, self.place + 1, **changes)
        return self.go(then, **changes)

    def find_room(self):
        """All have read the message before."""
        if self.place != self.rank and self.state.consumed[self.place][self.rank] < self.round:
            return None
        return self.next_place("publish_early" if self.variant == "payload last" else "write")

    def write(self):
        payload = put(self.state.payload, self.rank, self.round)
        return self.go("wake" if self.variant == "payload last" else "publish", payload=payload)

    def publish(self, then="wake"):
        return self.go(then, begun=put(self.state.begun, self.rank, self.round + 1))

    def publish_early(self):
        return self.publish("write")

    def wake(self):
        """Look whether the rank at `place` sleeps."""
        if self.place == self.rank or not self.state.sleeping[self.place]:
            return self.next_place("look")
        return self.go("check", self.place)

    def check(self):
        """Look whether all that it waits for is there, a counter at a time."""
        if self.sender == self.size:
            return self.go("clear", self.place)
        wanted = self.state.want[self.place]
        if self.sender == self.place or self.state.begun[self.sender] >= wanted:
            return self.go("check", self.place, self.sender + 1)
        return self.skip()

    def skip(self, **changes):
        if self.place + 1 < self.size:
            return self.go("wake", self.place + 1, **changes)
        return self.go("look", **changes)

    def clear(self):
        if not self.state.sleeping[self.place]:
            return self.skip()
        return self.go("call", self.place, sleeping=put(self.state.sleeping, self.place, 0))

    def call(self):
        return self.skip(blocked=put(self.state.blocked, self.place, False))

    def look(self, otherwise="announce"):
        """Look for the message of each, a counter at a time."""
        if self.place == self.size:
            return self.go("read", sleeping=put(self.state.sleeping, self.rank, 0))
        if self.place == self.rank or self.state.begun[self.place] > self.round:
            return self.go(self.step, self.place + 1)
        return self.go(otherwise)

    def announce(self):
        return self.go("lie_down", want=put(self.state.want, self.rank, self.round + 1))

    def lie_down(self):
        then = "fall_asleep" if self.variant == "no second look" else "look_again"
        return self.go(then, sleeping=put(self.state.sleeping, self.rank, 1))

    def look_again(self):
        return self.look("fall_asleep")

    def fall_asleep(self):
        """FUTEX_WAIT compares and sleeps at once."""
        if not self.state.sleeping[self.rank]:
            return self.go("rise")
        return self.go("rise", blocked=put(self.state.blocked, self.rank, True))

    def rise(self):
        return self.go("look", sleeping=put(self.state.sleeping, self.rank, 0))

    def read(self):
        if self.place == self.size:
            return self.go("find_room" if self.round + 1 < self.num_rounds else "end")
        if self.place == self.rank:
            return self.go("read", self.place + 1)
        if self.variant == "consumed early":
            return self.consume("read_late", self.place)
        return self.read_late("consume", self.place)

    def read_late(self, then="read", place=None):
        if self.state.payload[self.place] != self.round:
            raise BrokenError("a message was read that is not there")
        return self.go(then, self.place + 1 if place is None else place)

    def consume(self, then="read", place=None):
        row = put(self.state.consumed[self.rank], self.place, self.round + 1)
        consumed = put(self.state.consumed, self.rank, row)
        return self.go(then, self.place + 1 if place is None else place, consumed=consumed)


def explore(size, num_rounds, variant=""):
    """The number of states that can be reached; all lead to the end."""
    zeros = (0,) * size
    first = State(
        (-1,) * size,
        zeros,
        (zeros,) * size,
        zeros,
        zeros,
        (False,) * size,
        (("find_room", 0, 0, 0),) * size,
    )
    seen, waiting = {first}, [first]
    while waiting:
        state = waiting.pop()
        following = [Rank(state, rank, num_rounds, variant).after() for rank in range(size)]
        following = [each for each in following if each is not None]
        if not following and any(step != "end" for step, *_ in state.at):
            raise BrokenError("nobody can go on")
        for each in following:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return len(seen)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("size", "num_rounds", "at_least"), [(2, 3, 4_000), (3, 2, 200_000)])
def test_no_interleaving_loses_a_wake_or_reads_too_early(size, num_rounds, at_least):
    assert explore(size, num_rounds) > at_least


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ("no second look", "nobody"),
        ("payload last", "message read not"),
        ("consumed early", "message read not"),
    ],
)
def test_the_model_sees_a_broken_protocol(variant, what):
    with pytest.raises(BrokenError, match=telling(what)):
        explore(2, 2, variant)


def build_threads(folder, *flags):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "threads"
    command = [*shlex.split(compiler), "-O1", "-g", "-std=c++17", "-fsanitize=thread", *flags]
    built = subprocess.run(
        [*command, str(_SOURCE), "-o", str(program), "-pthread"], capture_output=True, text=True
    )
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    return program


def run_threads(program):
    return subprocess.run([program, _NUM_ROUNDS], capture_output=True, text=True, timeout=120)


@pytest.mark.full
def test_ranks_as_threads_have_no_race(tmp_path):
    ran = run_threads(build_threads(tmp_path))
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr[:3000]


@pytest.mark.full
def test_the_race_detector_sees_a_counter_without_order(tmp_path):
    ran = run_threads(build_threads(tmp_path, "-DPLANTED_RELAXED"))
    assert "data race" in ran.stderr
