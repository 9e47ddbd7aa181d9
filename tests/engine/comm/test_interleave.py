import pytest

from expertlane.engine.comm.collectives import interleave


class FakePending:
    """A transfer that writes down when it is waited for."""

    def __init__(self, log, name):
        self._log = log
        self._name = name

    def wait(self):
        self._log.append(f"wait {self._name}")
        return f"result of {self._name}"


def computation(log, name, num_waits):
    got = []
    for number in range(num_waits):
        log.append(f"begin {name}{number}")
        got.append((yield FakePending(log, f"{name}{number}")))
    log.append(f"end {name}")
    return got


def test_two_take_turns_at_every_wait():
    log = []
    results = interleave([computation(log, "a", 2), computation(log, "b", 2)])
    assert results == [["result of a0", "result of a1"], ["result of b0", "result of b1"]]
    # While one's transfer travels, the other computes.
    assert log == [
        "begin a0",
        "begin b0",
        "wait a0",
        "begin a1",
        "wait b0",
        "begin b1",
        "wait a1",
        "end a",
        "wait b1",
        "end b",
    ]


def test_a_shorter_one_lets_the_other_go_on():
    log = []
    results = interleave([computation(log, "a", 0), computation(log, "b", 2)])
    assert results == [[], ["result of b0", "result of b1"]]
    assert log == ["end a", "begin b0", "wait b0", "begin b1", "wait b1", "end b"]


def test_an_error_comes_through():
    def broken():
        yield FakePending([], "x")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        interleave([broken(), computation([], "b", 2)])
