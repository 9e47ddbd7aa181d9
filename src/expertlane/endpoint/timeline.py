"""A drill over time: rates, pauses, when the rate was full again, and where `/health` was wrong."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from expertlane.endpoint.steady import Request
from expertlane.results.drill_record import HealthRecord, TimelineRecord

_Times = NDArray[np.float64]
FULL, _REST, _LEAST = 0.9, 0.8, 0.5  # of the rate before the fault
_LEAST_WINDOW_S, _REQUESTS_OF_WINDOW = 1.0, 2.0  # a rate is over as long as so many requests take
_SHARE_OF_WINDOW = 2  # windows that fit into the time before the fault, at least
_STEPS = 20  # of a window, at which its rate is looked at
_NUM_BINS = 120
SILENT = 3.0  # a pause of so many times the longest one before the fault is unusual
_AROUND_S = 1.0  # of a lost request, in which not all is well
OK = 200


class Arrivals:
    """All tokens of a load, of all its requests.

    Args:
        zero_s: the moment that times count from.

    Attributes:
        times_s, num_tokens: [num_events]; of each event with tokens.
    """

    def __init__(self, requests: Sequence[Request], zero_s: float) -> None:
        events = [
            (time_s - zero_s, each.stream.num_of(number))
            for each in requests
            for number, time_s in enumerate(each.stream.times_s)
        ]
        events.sort()
        self.times_s: _Times = np.array([time_s for time_s, _ in events])
        self.num_tokens: _Times = np.array([num for _, num in events], dtype=np.float64)
        self._sums = np.concatenate([[0.0], np.cumsum(self.num_tokens)])

    def num_until(self, moments_s: _Times) -> _Times:
        """Tokens before each moment."""
        found: _Times = self._sums[np.searchsorted(self.times_s, moments_s)]
        return found

    def tps(self, begin_s: float, end_s: float) -> float:
        """Tokens a second in an interval."""
        if end_s <= begin_s:
            return 0.0
        before, after = self.num_until(np.array([begin_s, end_s]))
        return float(after - before) / (end_s - begin_s)

    def window_tps(self, begin_s: float, end_s: float, window_s: float) -> tuple[_Times, _Times]:
        """Begins of windows that fit into an interval, and tokens a second in each."""
        step_s = window_s / _STEPS
        num = max(0, int((end_s - window_s - begin_s) / step_s) + 1)
        begins_s: _Times = begin_s + step_s * np.arange(num, dtype=np.float64)
        taken = self.num_until(begins_s + window_s) - self.num_until(begins_s)
        return begins_s, taken / window_s

    def silences(self, begin_s: float, end_s: float, least_s: float) -> Iterator[tuple[float, ...]]:
        """Intervals longer than `least_s` in which no token comes."""
        inside = self.times_s[(self.times_s > begin_s) & (self.times_s < end_s)]
        for pair in pairwise([begin_s, *inside.tolist(), end_s]):
            if pair[1] - pair[0] > least_s:
                yield pair


def window_of(requests: Sequence[Request], before_s: float) -> float:
    """Length of the window that rates are over: as long as two requests take.

    Args:
        before_s: seconds of the load before the fault, of which it is half at most.
    """
    taken_s = [each.ended_s - each.sent_s for each in requests if each.end == "whole"]
    wanted_s = _REQUESTS_OF_WINDOW * median(taken_s) if taken_s else 0.0
    return max(min(wanted_s, before_s / _SHARE_OF_WINDOW), min(_LEAST_WINDOW_S, before_s / 4))


def full_rate(
    arrivals: Arrivals, began_s: float, end_s: float, window_s: float
) -> tuple[float, float, float | None]:
    """The rate before the fault, what counts as full, and since when it is full again.

    Full is 90 % of the rate before, or as little as any window before the fault had. It is full
    again from the first window on that has it, if no later one has less than half of the rate
    before, and all that is left of the watch has 80 % of it on average.

    Args:
        began_s: begin of the load; negative, as the fault is at 0.
        end_s: end of the watch.

    Returns:
        None where it never was; 0 where it never fell.
    """
    first_s = min(began_s + window_s, -window_s)  # without the beginning, when places fill
    before = arrivals.tps(first_s, 0.0)
    _, usual = arrivals.window_tps(first_s, 0.0, window_s)
    full = min(FULL * before, float(usual.min()) if len(usual) else before)
    begins_s, tps = arrivals.window_tps(0.0, end_s, window_s)
    lows = np.flatnonzero(tps < _LEAST * before)
    first = int(lows[-1]) + 1 if len(lows) else 0
    for begin_s, each in zip(begins_s[first:].tolist(), tps[first:].tolist(), strict=True):
        rest = min(full, _REST * before)
        if each >= full and each > 0 and arrivals.tps(begin_s, end_s) >= rest:
            return before, full, begin_s
    return before, full, None


def pauses(requests: Sequence[Request], zero_s: float) -> list[tuple[float, float, float]]:
    """Each wait for a token: of a request, from its sending on; begin, end, and its length.

    The last one of a request that was lost lasts until it ended.
    """
    found = []
    for each in requests:
        moments = [each.sent_s, *each.stream.times_s]
        if each.is_lost:
            moments.append(each.ended_s)
        found += [(a - zero_s, b - zero_s, b - a) for a, b in pairwise(moments)]
    return found


def timeline_record(
    requests: Sequence[Request], arrivals: Arrivals, zero_s: float, began_s: float, end_s: float
) -> TimelineRecord:
    """The load in bins, one of which begins at the fault."""
    bin_s = (end_s - began_s) / _NUM_BINS
    first = -round(-began_s / bin_s)
    edges: _Times = bin_s * np.arange(first, first + _NUM_BINS + 1, dtype=np.float64)
    lost = [each.ended_s - zero_s for each in requests if each.is_lost]
    first_tokens = [
        (each.sent_s - zero_s, each.stream.times_s[0] - each.sent_s)
        for each in requests
        if each.stream.times_s
    ]
    waits = pauses(requests, zero_s)
    ttft: list[float | None] = []
    pause = []
    for begin_s, stop_s in pairwise(edges.tolist()):
        in_bin = [wait_s for sent_s, wait_s in first_tokens if begin_s <= sent_s < stop_s]
        ttft.append(round(median(in_bin), 4) if in_bin else None)
        over = (min(b, stop_s) - a for a, b, _ in waits if a < stop_s and b >= begin_s)
        pause.append(round(max(over, default=0.0), 4))
    tokens = np.diff(arrivals.num_until(edges))
    return TimelineRecord(
        tuple(np.round(edges[:-1], 4).tolist()),
        bin_s,
        tuple(np.round(tokens / bin_s, 2).tolist()),
        tuple(np.histogram(lost, edges)[0].tolist()),
        tuple(ttft),
        tuple(pause),
    )


def health_record(
    asked_s: Sequence[float],
    statuses: Sequence[int],
    arrivals: Arrivals,
    lost_s: Sequence[float],
    full_rate_s: float | None,
    began_s: float,
    end_s: float,
) -> HealthRecord:
    """Answers of `/health`, and the longest time that it was wrong without a break.

    It is wrong where it says 200 while no request gets a token, and where it says anything else
    while all is well: before the fault, and from when the rate is full again, but for a second
    around a lost request.

    Args:
        lost_s: when requests were lost.
    """
    samples = [
        (at, status) for at, status in zip(asked_s, statuses, strict=True) if began_s <= at <= end_s
    ]
    is_known = any(status == OK for _, status in samples)
    if not is_known:
        return HealthRecord(tuple(asked_s), tuple(statuses))
    usual_s = max((b - a for a, b in arrivals.silences(began_s, 0.0, 0.0)), default=0.0)
    silences = [*arrivals.silences(0.0, end_s, SILENT * usual_s)]
    well = [(began_s, 0.0)] + ([] if full_rate_s is None else [(full_rate_s, end_s)])
    return HealthRecord(
        tuple(round(at, 3) for at, _ in samples),
        tuple(status for _, status in samples),
        _longest(samples, silences, says_well=True),
        _longest(samples, [*_without(well, lost_s)], says_well=False),
        is_known,
    )


def _without(
    intervals: Sequence[tuple[float, ...]], lost_s: Sequence[float]
) -> Iterator[tuple[float, ...]]:
    """Intervals less the time around lost requests."""
    for begin_s, end_s in intervals:
        for moment_s in sorted(lost_s):
            if begin_s <= moment_s + _AROUND_S and moment_s - _AROUND_S < end_s:
                if moment_s - _AROUND_S > begin_s:
                    yield begin_s, moment_s - _AROUND_S
                begin_s = moment_s + _AROUND_S
        if end_s > begin_s:
            yield begin_s, end_s


def _longest(
    samples: Sequence[tuple[float, int]],
    intervals: Sequence[tuple[float, ...]],
    *,
    says_well: bool,
) -> float:
    """The longest time for which all samples within one interval say so."""
    longest = 0.0
    for begin_s, end_s in intervals:
        inside = [each for each in samples if begin_s <= each[0] < end_s]
        for is_such, several in groupby(inside, lambda each: (each[1] == OK) is says_well):
            moments = [at for at, _ in several]
            if is_such:
                longest = max(longest, moments[-1] - moments[0])
    return round(longest, 3)
