"""What a rank's log of a step says of a sequence that was done by hand, on a clock of our own."""

from types import SimpleNamespace

import numpy as np
import pytest

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm import recorder as module
from expertlane.engine.comm.recorder import OperationLog
from expertlane.results.step_record import Action
from expertlane.spec.names import Stage

WORLD_SIZE = 3


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(cpu_s=7.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(thread_time=lambda: clock.cpu_s))
    return clock


def computed(operations):
    """CPU seconds of every computation that took any, in order."""
    assert not operations.cpu_s[operations.action != Action.COMPUTE].any()
    return operations.cpu_s[operations.cpu_s > 0].tolist()


def test_nothing_is_counted_twice_or_while_it_is_paused(clock):
    log = OperationLog(Stage.IDLE, -1)
    clock.cpu_s += 1
    log.enter(Stage.ATTENTION, 0, 0)
    clock.cpu_s += 2
    log.enter(Stage.ATTENTION, 0, 0)  # the same place again is another entry
    clock.cpu_s += 4
    log.pause()
    clock.cpu_s += 8
    log.pause()  # no effect
    clock.cpu_s += 16
    log.resume()
    clock.cpu_s += 32
    log.pause()
    clock.cpu_s += 64
    log.enter(Stage.ROUTER, 0, 1)  # while it is paused: what comes next counts, nothing before it
    clock.cpu_s += 128
    log.pause()
    operations = log.operations(WORLD_SIZE)
    assert computed(operations) == [1, 2, 4, 32, 128]
    assert operations.action.tolist() == [Action.COMPUTE] * 5
    assert operations.stage.tolist() == [Stage.IDLE, *[Stage.ATTENTION] * 3, Stage.ROUTER]
    assert operations.layer.tolist() == [-1, 0, 0, 0, 0]
    assert operations.micro_batch.tolist() == [0, 0, 0, 0, 1]
    assert operations.transfer.tolist() == [-1] * 5
    assert operations.sent_bytes.shape == (0, WORLD_SIZE)
    assert len(operations.kind) == len(operations.first_rank) == 0


def test_transfers_and_waits(clock):
    log = OperationLog(Stage.DISPATCH, 2)
    clock.cpu_s += 1
    log.pause()
    first = log.post(TransferKind.ALL_TO_ALL, 1, [0, 10, 20])
    sent = [30, 0, 0]
    second = log.post(TransferKind.SEND, 0, sent)
    sent[0] = 99  # what is kept is a copy
    clock.cpu_s += 100
    log.resume()
    clock.cpu_s += 2
    log.pause()
    log.wait(first)
    log.arrive()
    operations = log.operations(WORLD_SIZE)
    assert (first, second) == (0, 1)
    assert [Action(action).name for action in operations.action] == [
        "COMPUTE",
        "POST",
        "POST",
        "COMPUTE",
        "WAIT",
        "ARRIVE",
    ]
    assert operations.transfer.tolist() == [-1, 0, 1, -1, 0, -1]
    assert computed(operations) == [1, 2]
    assert [list(TransferKind)[kind] for kind in operations.kind] == ["all_to_all", "send"]
    assert operations.first_rank.tolist() == [1, 0]
    assert operations.sent_bytes.tolist() == [[0, 10, 20], [30, 0, 0]]
    assert {str(each.dtype) for each in (operations.sent_bytes, operations.action)} == {"int64"}
    assert set(operations.stage.tolist()) == {Stage.DISPATCH}
    assert set(operations.layer.tolist()) == {2}


def test_the_clock_is_the_thread_s_own():
    """It goes on while the rank computes, and not while it sleeps or others compute."""
    log = OperationLog(Stage.EXPERTS, 0)
    for _ in range(50):
        np.linalg.norm(np.ones((100, 100)))
    log.pause()
    (cpu_s,) = log.operations(1).cpu_s
    assert cpu_s > 0
