"""Measuring on a machine that others keep busy, on a made-up clock."""

from itertools import count

import pytest

from expertlane.calibrate import run as calibrate_run
from expertlane.calibrate.run import QuietMeasuring, rounds_in_time


@pytest.fixture
def machine(monkeypatch):
    """Sets which shares others take in turn, and lets time pass in measurements."""

    class Machine:
        now_s = 0.0
        shares = iter(())

        def measure(self, seconds=1.0):
            self.now_s += seconds
            return self.now_s

    machine = Machine()

    class Foreign:
        def share(self):
            return next(machine.shares)

    monkeypatch.setattr(calibrate_run, "ForeignLoad", Foreign)
    monkeypatch.setattr(calibrate_run.time, "monotonic", lambda: machine.now_s)
    return machine


def test_the_least_disturbed_measurement_is_kept(machine):
    machine.shares = iter([0.5, 0.1, 0.3])
    measuring = QuietMeasuring()
    assert measuring.measure(machine.measure) == 2.0
    assert measuring.foreign_cpu_share == 0.1


def test_what_was_quiet_is_measured_once(machine):
    machine.shares = iter([0.01, 0.5])
    measuring = QuietMeasuring()
    assert measuring.measure(machine.measure) == 1.0
    assert (measuring.disturbed_share, measuring.again_s) == (0.0, 0.0)


def test_measuring_again_comes_to_an_end(machine):
    """Ten seconds a time, always disturbed: six times again in a minute."""
    machine.shares = (0.4 + 0.01 * number for number in count())
    measuring = QuietMeasuring(most_again_s=60.0)
    for _ in range(20):
        measuring.measure(lambda: machine.measure(10.0))
    assert machine.now_s == 10.0 * (20 + 6)
    assert measuring.again_s == 60.0
    assert (measuring.num_kept, measuring.disturbed_share) == (20, 1.0)
    assert measuring.foreign_cpu_share == pytest.approx(0.4 + 0.01 * 25)


def test_the_share_that_was_still_disturbed(machine):
    machine.shares = iter([0.0, 0.3, 0.01, 0.3, 0.2, 0.0])
    measuring = QuietMeasuring()
    for _ in range(4):
        measuring.measure(machine.measure)
    assert measuring.disturbed_share == 0.25
    assert measuring.foreign_cpu_share == 0.2


@pytest.mark.parametrize(("round_s", "expected"), [(10.0, 5), (60.0, 4), (90.0, 2), (600.0, 1)])
def test_long_rounds_are_fewer(machine, round_s, expected):
    done = []
    for number in rounds_in_time(5, 240.0):
        done.append(number)
        machine.measure(round_s)
    assert done == list(range(expected))
