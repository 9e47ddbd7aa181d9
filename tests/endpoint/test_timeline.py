"""Rates, pauses, full rate and health over time, from requests that were made up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.client.connection import Answer
from expertlane.endpoint.steady import Request
from expertlane.endpoint.streams import Stream
from expertlane.endpoint.timeline import (
    Arrivals,
    full_rate,
    health_record,
    pauses,
    timeline_record,
    window_of,
)

BEGAN_S, END_S, WINDOW_S = -10.0, 20.0, 2.0


def request(times_s: list[float], sent_s: float = BEGAN_S, **more: object) -> Request:
    stream = Stream(Answer(200, "text/event-stream"))
    stream.times_s, stream.ids = times_s, [[1] for _ in times_s]
    found = Request(0, sent_s, stream, times_s[-1] if times_s else sent_s, "whole")
    for name, value in more.items():
        setattr(found, name, value)
    return found


def steady(*spans: tuple[float, float], each_s: float = 0.1) -> Arrivals:
    """A token every `each_s` in these stretches."""
    times = [at for begin, end in spans for at in np.arange(begin, end, each_s).tolist()]
    return Arrivals([request(times)] if times else [], 0.0)


def test_a_rate_that_never_falls_is_full_from_the_fault_on():
    before, full, since_s = full_rate(steady((BEGAN_S, END_S)), BEGAN_S, END_S, WINDOW_S)
    assert before == pytest.approx(10, rel=0.05)
    assert full == pytest.approx(9, rel=0.05)
    assert since_s == 0.0


@pytest.mark.parametrize("late_s", [0.0, 1.5, 6.0])
def test_it_is_full_again_when_tokens_come_again(late_s):
    """Also where the server goes on for a while before it stops."""
    arrivals = steady((BEGAN_S, late_s), (late_s + 4, END_S))
    *_, since_s = full_rate(arrivals, BEGAN_S, END_S, WINDOW_S)
    assert since_s == pytest.approx(late_s + 4, abs=0.7)


def test_it_is_never_full_of_a_server_that_stays_slower_or_dies():
    slower = Arrivals(
        [request(np.arange(BEGAN_S, 0, 0.1).tolist() + np.arange(0, END_S, 0.15).tolist())], 0.0
    )
    for arrivals in (slower, steady((BEGAN_S, 0.0)), steady((BEGAN_S, 12.0))):
        assert full_rate(arrivals, BEGAN_S, END_S, WINDOW_S)[2] is None


def test_no_tokens_are_no_error():
    assert full_rate(steady(), BEGAN_S, END_S, WINDOW_S) == (0.0, 0.0, None)
    assert window_of([], 4.0) == 1.0
    assert timeline_record([], steady(), 0.0, BEGAN_S, END_S).tps == (0.0,) * 120


@given(st.lists(st.floats(-9, 19), max_size=40))
def test_bins_hold_every_token_once(times_s):
    arrivals = Arrivals([request(sorted(times_s))], 0.0)
    line = timeline_record([request(sorted(times_s))], arrivals, 0.0, BEGAN_S, END_S)
    assert sum(line.tps) * line.bin_s == pytest.approx(len(times_s), abs=0.5)


def test_a_lost_request_waits_until_it_ends():
    lost = request([1.0], 0.5, end="hung", ended_s=9.0)
    assert pauses([lost], 0.0) == [(0.5, 1.0, 0.5), (1.0, 9.0, 8.0)]


def health(statuses, arrivals, full_rate_s=0.0, lost_s=(), every_s=0.25):
    asked = np.arange(BEGAN_S, END_S, every_s).tolist()
    said = [statuses(at) for at in asked]
    return health_record(asked, said, arrivals, lost_s, full_rate_s, BEGAN_S, END_S)


def test_health_that_tells_the_truth():
    outage = steady((BEGAN_S, 0.0), (8.0, END_S))
    found = health(lambda at: 503 if 0 <= at < 8 else 200, outage, full_rate_s=8.0)
    assert (found.well_but_silent_s, found.ill_but_well_s) == (0.0, 0.0)
    assert found.is_known


def test_health_that_says_well_while_no_token_comes():
    outage = steady((BEGAN_S, 0.0), (8.0, END_S))
    found = health(lambda _: 200, outage, full_rate_s=8.0)
    assert found.well_but_silent_s == pytest.approx(7.8, abs=0.5)
    assert found.ill_but_well_s == 0.0


def test_health_that_says_ill_while_all_is_well():
    found = health(lambda at: 503 if at > 5 else 200, steady((BEGAN_S, END_S)))
    assert found.ill_but_well_s == pytest.approx(14.5, abs=0.6)
    # No answer is no better, and what surrounds a lost request is not well.
    found = health(lambda at: 0 if at > 5 else 200, steady((BEGAN_S, END_S)), lost_s=[7.0])
    assert found.ill_but_well_s == pytest.approx(11.7, abs=0.6)


def test_nothing_is_known_of_a_server_without_health():
    assert not health(lambda _: 404, steady((BEGAN_S, END_S))).is_known
