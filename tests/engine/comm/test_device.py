"""A wait for a GPU ends with its event, with the epoch, or in time; events here are made up."""

import os
import time
from threading import Timer

import pytest

from cli.screen import telling
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.transport import Epoch, EpochEndedError, PeerLostError, await_event


class Event:
    """Passed once it has been asked for so often."""

    def __init__(self, num_looks=0):
        self._left = num_looks

    def query(self):
        self._left -= 1
        return self._left < 0


@pytest.fixture
def board():
    return ProgressBoard(1)


def end_epoch(board):
    board.begin_epoch(1, os.getpid(), -1, -1, 1)


@pytest.mark.parametrize("num_looks", [0, 1, 2000])
def test_until_the_device_has_passed_it(board, num_looks):
    event = Event(num_looks)
    await_event(event, Epoch(board, 0), 60.0)
    assert event._left == -1  # it is looked at as often as needed, and not once more


def test_a_device_that_hangs(board):
    began_s = time.monotonic()
    with pytest.raises(PeerLostError, match=telling("0.2 s GPU ranks")):
        await_event(Event(10**9), Epoch(board, 0), 0.2)
    assert 0.2 <= time.monotonic() - began_s < 5


def test_the_epoch_ends_meanwhile(board):
    timer = Timer(0.1, end_epoch, [board])
    timer.start()
    with pytest.raises(EpochEndedError, match="epoch 0 has ended"):
        await_event(Event(10**9), Epoch(board, 0), 60.0)
    timer.join()


def test_what_an_ended_epoch_has_brought_counts_for_nothing(board):
    """Kernels that are aborted end too, with whatever lies where they were to write."""
    end_epoch(board)
    with pytest.raises(EpochEndedError):
        await_event(Event(), Epoch(board, 0), 60.0)
    await_event(Event(), Epoch(board, 1), 60.0)
