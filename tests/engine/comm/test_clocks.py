"""Times on a device that only queues: a stream with a clock of its own, and events on it.

The host's clock stands at another time altogether. An event that is read before the device has
passed it is an error, and so is a wait for the device before the step is over.
"""

import pytest
import torch

from cli.screen import telling
from expertlane.engine.comm.clocks import HostClock, StreamClock, clock_for
from expertlane.engine.comm.collectives import Group, interleave
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.spec.names import Stage, Track


class Device:
    """A computing stream, a stream for transfers, and the time at which each will be done."""

    def __init__(self):
        self.compute_s = self.transfers_s = 0.0
        self.num_made = self.num_waits = 0
        self.passed_s = -1.0

    def compute(self, seconds):
        self.compute_s += seconds

    def begin_transfer(self, seconds):
        """Once the computing stream is here, and earlier transfers are over."""
        self.transfers_s = max(self.transfers_s, self.compute_s) + seconds
        return Transfer(self, self.transfers_s)

    def event(self):
        self.num_made += 1
        return Event(self)

    def wait(self, event):
        self.num_waits += 1
        self.passed_s = max(self.passed_s, event.at_s)


class Event:
    def __init__(self, device):
        self._device, self.at_s = device, None

    def record(self):
        self.at_s = self._device.compute_s

    def elapsed_time(self, other):
        for each in (self, other):
            if each.at_s is None or each.at_s > self._device.passed_s:
                raise RuntimeError("the device has not passed this event yet")
        return 1e3 * (other.at_s - self.at_s)


class Transfer:
    """A work whose wait holds up the computing stream alone."""

    def __init__(self, device, end_s):
        self._device, self._end_s = device, end_s

    def wait(self):
        self._device.compute_s = max(self._device.compute_s, self._end_s)


class Link:
    """Every all-to-all takes as long."""

    at_once = None

    def __init__(self, device, seconds):
        self._device, self._seconds = device, seconds

    def all_to_all(self, rows, send, received, receive):
        return self._device.begin_transfer(self._seconds)


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def recorder(device):
    clock = StreamClock(device.wait, device.event)
    return Recorder(0, 2, 3, ProgressBoard(1).reporter(0), clock, 2)


def layer(device, group, *, before_s, after_s):
    """Compute, send what came of it, and compute with what the other sent."""
    recorder = group._recorder
    recorder.enter(Stage.ATTENTION, 0)
    device.compute(before_s)
    recorder.enter(Stage.DISPATCH, 0)
    yield group.all_to_all(torch.zeros(2, 1), [1, 1], [1, 1])
    recorder.enter(Stage.EXPERTS, 0)
    device.compute(after_s)


@pytest.mark.parametrize(
    ("transfer_s", "exposed_s"),
    [
        (0.5, 0.0),  # begun at 2 and 4 s, over at 2.5 and 4.5, needed at 4 and 5
        (1.5, 0.5),  # the second is over at 5.5
        (3.0, 3.0),  # over at 5 and 8, needed at 4 and 6
    ],
)
def test_overlap_hides_what_the_stream_computes_meanwhile(device, recorder, transfer_s, exposed_s):
    group = Group(Link(device, transfer_s), [0, 1], 0, 2, recorder)
    for num_halves, blocked_s in ((1, transfer_s), (2, exposed_s)):
        recorder.begin_step(0, 1, record=True, count_idle=False)
        began_s = device.compute_s
        interleave([layer(device, group, before_s=2, after_s=1) for _ in range(num_halves)])
        record = recorder.end_step()
        of_stage = {stage: record.wall_s[..., stage].sum() for stage in Stage}
        assert of_stage[Stage.ATTENTION] == pytest.approx(2 * num_halves)
        assert of_stage[Stage.EXPERTS] == pytest.approx(num_halves)
        assert of_stage[Stage.DISPATCH] == pytest.approx(blocked_s)
        assert record.blocked_s.sum() == pytest.approx(blocked_s)
        assert record.wall_s.sum() == pytest.approx(device.compute_s - began_s)


def test_no_mark_waits_for_the_device(device, recorder):
    recorder.begin_step(0, 1, record=True, count_idle=False, record_events=True)
    recorder.enter(Stage.DISPATCH, 1)
    began = recorder.begin_wait()
    device.compute_s += 5
    recorder.end_wait(began)
    recorder.enter(Stage.HEAD)
    device.compute(2)
    assert device.num_waits == 0
    with pytest.raises(RuntimeError, match=telling("passed")):
        recorder._clock._events[0].elapsed_time(recorder._clock._events[1])
    record = recorder.end_step()
    assert device.num_waits == 1
    tracks = [list(Track)[track].value for track in record.events.track]
    times = list(zip(tracks, record.events.begin_s, record.events.end_s, strict=True))
    assert times == [("network", 0, 5), ("compute", 5, 7)]


def test_events_are_used_again(device, recorder):
    for step in range(3):
        recorder.begin_step(step, 1, record=True, count_idle=False)
        device.compute(step)
        assert recorder.end_step().wall_s.sum() == pytest.approx(step)
        if step == 0:
            num_made = device.num_made
    assert device.num_made == num_made > 0
    recorder.begin_step(3, 1, record=True, count_idle=False)  # and comes to nothing
    recorder.enter(Stage.EMBED)
    device.compute(9)
    recorder.begin_step(3, 1, record=True, count_idle=False)
    device.compute(1)
    assert recorder.end_step().wall_s.sum() == pytest.approx(1)


def test_a_cpu_has_the_hosts_clock():
    assert type(clock_for(torch.device("cpu"))) is HostClock
