"""Ranks' traces aligned by the transfers in which they meet: clocks, steps, and who came last.

The n-th transfer of a kind on one rank is the n-th on the others of its group, which is told by the
trace (of NCCL), else by the files' names, else holds all ranks. Ranks whose profiler began a few
transfers later are shifted. Ranks are taken to share a clock, as those of one host do, unless ranks
would then leave transfers before others enter them. Transfers end on all ranks at about the same
time, so the clocks then differ by the median difference of their ends.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from expertlane.comparison.rank_trace import RankTrace
from expertlane.comparison.trace_file import Work
from expertlane.spec.names import Stage

_NAME_LENGTH = 120  # of a transfer in a sentence
_LEAST_SHARED = 0.5  # of the transfers of the rank with fewer, after a shift
_BETTER = 0.1  # of the spread without a shift
_MOST_SHIFT = 500  # transfers
_IMPOSSIBLE = 0.1  # share of transfers that a rank left too early, for clocks to be one


@dataclass(eq=False)
class Aligned:
    """What transfers tell of ranks' clocks and steps.

    Attributes:
        offsets_ns: [num_ranks]; of a rank's clock to the first one's.
        entered_ns: for each rank, by place among its work: when the last rank of the group entered
            the transfer, on the rank's own clock.
        step_shifts: [num_ranks]; steps that a rank's trace has before the first one's first.
        together: [num_ranks]; equal for ranks that meet, if only by way of others.
        unaligned: sentences.
    """

    offsets_ns: list[int]
    entered_ns: list[dict[int, int]]
    step_shifts: list[int]
    together: list[int]
    unaligned: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Meetings:
    """The transfers of one kind in one group: places among each rank's work, in order."""

    stage: Stage
    name: str
    places: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    shifts: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairs:
    """The same transfers on two ranks: start, end and number of the step, [3, num_transfers]."""

    stage: Stage
    first: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]


def align(traces: Sequence[RankTrace]) -> Aligned:
    """Align the traces of different ranks."""
    meetings = _meetings(traces)
    times = {
        (key, place): _times(traces[place], of_rank)
        for key, each in meetings.items()
        for place, of_rank in each.places.items()
    }
    num = len(traces)
    aligned = Aligned([0] * num, [{} for _ in traces], [0] * num, [*range(num)])
    together: dict[tuple[int, int], list[_Pairs]] = defaultdict(list)
    for key, each in meetings.items():
        first, *others = sorted(each.places)
        each.shifts[first] = 0
        for other in others:
            one, two = times[key, first], times[key, other]
            shift = _shift(one, two, each.stage)
            if shift is None:
                counts = f"{len(each.places[first])} and {len(each.places[other])}"
                aligned.unaligned.append(
                    f"{each.name}: {counts} on ranks {traces[first].rank} and {traces[other].rank}"
                )
                continue
            each.shifts[other] = shift
            here, there = _pairs(one.shape[1], two.shape[1], shift)
            together[first, other].append(_Pairs(each.stage, one[:, here], two[:, there]))
    _set_clocks(aligned, together)
    for each in meetings.values():
        _set_entries(traces, aligned, each)
    return aligned


def _meetings(traces: Sequence[RankTrace]) -> dict[tuple[object, ...], _Meetings]:
    """Transfers by group and kind; those that only one rank's trace has are left out."""
    found: dict[tuple[object, ...], _Meetings] = {}
    for place, trace in enumerate(traces):
        for at, each in enumerate(trace.work):
            if not each.transfer or not isinstance(each.cause, Stage):
                continue
            key = (_group(trace, each), each.cause, each.kind)
            meeting = found.setdefault(key, _Meetings(each.cause, each.name[:_NAME_LENGTH]))
            meeting.places[place].append(at)
    return {key: each for key, each in found.items() if len(each.places) > 1}


def _group(trace: RankTrace, work: Work) -> object:
    """What the ranks of a transfer have in common."""
    if work.group:
        return work.group
    axes = {Stage.COLLECTIVES: ("dp", "pp"), Stage.HAND_OVER: ("dp", "tp")}
    of_stage = axes.get(work.cause, ("pp",)) if isinstance(work.cause, Stage) else ()
    return tuple(trace.axes.get(axis) for axis in of_stage)


def _pairs(
    num_first: int, num_other: int, shift: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the same transfers on two ranks: k on the first, k + shift on the other."""
    begin, end = max(0, -shift), min(num_first, num_other - shift)
    first = np.arange(begin, max(begin, end), dtype=np.int64)
    return first, first + shift


def _shift(first: npt.NDArray[np.int64], other: npt.NDArray[np.int64], stage: Stage) -> int | None:
    """How many transfers the other rank's trace has before the first one's first.

    By clocks that are taken to be one, the smallest shift with which ranks leave no transfer
    before others enter it. If there is none, clocks differ: the one with which the middle half of
    the differences of their ends lies closest together.

    Args:
        first, other: start, end and number of the step, [3, num_transfers].

    Returns:
        None where the traces have too little in common to tell.
    """
    num_first, num_other = first.shape[1], other.shape[1]
    least = max(1, int(_LEAST_SHARED * min(num_first, num_other)))
    shifts = range(-min(_MOST_SHIFT, num_first), min(_MOST_SHIFT, num_other) + 1)
    spreads: dict[int, float] = {}
    for shift in sorted(shifts, key=abs):
        here, there = _pairs(num_first, num_other, shift)
        if len(here) < least:
            continue
        one, two = first[:, here], other[:, there]
        if _left_early(one, two, stage) <= _IMPOSSIBLE:
            return shift
        low, high = np.percentile(two[1] - one[1], (25, 75))
        spreads[shift] = float(high - low)
    if not spreads:
        return None
    best = min(spreads, key=lambda shift: (spreads[shift], abs(shift)))
    if num_first == num_other and spreads[best] >= _BETTER * spreads[0]:
        return 0
    return best


def _left_early(first: npt.NDArray[np.int64], other: npt.NDArray[np.int64], stage: Stage) -> float:
    """Share of transfers that a rank left before the other entered, if both clocks are one.

    Who sends may leave early, so between pipeline stages the less frequent of both ways counts.
    """
    shares = float((first[1] < other[0]).mean()), float((other[1] < first[0]).mean())
    return min(shares) if stage is Stage.HAND_OVER else sum(shares)


def _times(trace: RankTrace, places: Sequence[int]) -> npt.NDArray[np.int64]:
    """Entry, end and number of the step of transfers, [3, num_transfers]."""
    starts = np.array([trace.work[at].entered_ns for at in places], dtype=np.int64)
    ends = np.array([trace.work[at].end_ns for at in places], dtype=np.int64)
    spans = np.array([span.start_ns for span in trace.spans], dtype=np.int64)
    return np.stack([starts, ends, np.searchsorted(spans, starts, side="right") - 1])


def _set_clocks(aligned: Aligned, together: Mapping[tuple[int, int], Sequence[_Pairs]]) -> None:
    """Each rank's clock and first step, from rank to rank along the groups that they share."""
    num = len(aligned.offsets_ns)
    reached = {0}
    edges: dict[tuple[int, int], tuple[int, int]] = {}
    for pair, found in together.items():
        barriers = [each for each in found if each.stage is not Stage.HAND_OVER] or found
        one, two = (
            np.concatenate(
                [sides[place] for sides in ((p.first, p.other) for p in barriers)], axis=1
            )
            for place in range(2)
        )
        is_shared = _left_early(one, two, barriers[0].stage) <= _IMPOSSIBLE
        offset = 0 if is_shared else round(float(np.median(two[1] - one[1])))
        edges[pair] = offset, round(float(np.median(two[2] - one[2])))
        one_group, other_group = sorted(aligned.together[rank] for rank in pair)
        aligned.together = [
            one_group if group == other_group else group for group in aligned.together
        ]
    for _ in range(num):
        for (first, other), (offset, shift) in edges.items():
            if first in reached and other not in reached:
                aligned.offsets_ns[other] = aligned.offsets_ns[first] + offset
                aligned.step_shifts[other] = aligned.step_shifts[first] + shift
                reached.add(other)
            elif other in reached and first not in reached:
                aligned.offsets_ns[first] = aligned.offsets_ns[other] - offset
                aligned.step_shifts[first] = aligned.step_shifts[other] - shift
                reached.add(first)


def _set_entries(traces: Sequence[RankTrace], aligned: Aligned, meeting: _Meetings) -> None:
    """When the last rank entered each transfer, on every rank's own clock.

    A rank that left before the last one entered did not wait for it (it only sent).
    """
    by_number: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, shift in meeting.shifts.items():
        for number, at in enumerate(meeting.places[place]):
            by_number[number - shift].append((place, at))
    for members in by_number.values():
        if len(members) < len(meeting.shifts):
            continue  # before or after another rank's profiler ran
        last_ns = max(
            traces[place].work[at].entered_ns - aligned.offsets_ns[place] for place, at in members
        )
        for place, at in members:
            entered_ns = last_ns + aligned.offsets_ns[place]
            if entered_ns < traces[place].work[at].end_ns:
                aligned.entered_ns[place][at] = entered_ns
