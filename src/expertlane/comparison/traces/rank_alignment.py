"""Align the traces of several ranks by their transfers: clocks, steps, and when the last rank came.

The n-th transfer of a kind on one rank is paired with the n-th on the other ranks of its group. The
group is NCCL's process group if the trace names it, else the ranks that share coordinates by their
files' names, else all ranks. If a rank's profiler began some transfers later, its count is shifted.
Ranks are assumed to share one clock, as on one host. If a rank would then leave a transfer before
another enters it, clocks differ: a transfer ends on all ranks at about the same time, so the offset
is the median difference of the ends.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from expertlane.comparison.traces.rank_trace import RankTrace
from expertlane.comparison.traces.trace_file import Work
from expertlane.spec.names import Stage

_NAME_LENGTH = 120  # characters of a transfer's name in a sentence
_LEAST_SHARED = 0.5  # share of transfers that must be paired, of the rank with fewer
_BETTER = 0.1  # a shift needs a spread below this share of the spread without one
_MOST_SHIFT = 500  # transfers
_IMPOSSIBLE = 0.1  # share of transfers left before others entered: above it clocks differ


@dataclass(eq=False)
class Aligned:
    """Clock offsets, entry times and step numbers of ranks.

    Attributes:
        offsets_ns: [num_ranks]; a rank's clock minus the first rank's.
        entered_ns: [num_ranks]; by the index of a transfer in the rank's work: when the last rank
            of the group entered it, on the rank's own clock.
        step_shifts: [num_ranks]; steps in a rank's trace before the first step of the first rank's.
        together: [num_ranks]; equal for ranks that share transfers, if only by way of others.
        unaligned: sentences on transfers that could not be paired.
    """

    offsets_ns: list[int]
    entered_ns: list[dict[int, int]]
    step_shifts: list[int]
    together: list[int]
    unaligned: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Transfers:
    """The transfers of one kind in one group: by rank, indices in its work, in order."""

    stage: Stage
    name: str
    places: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    shifts: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairs:
    """Paired transfers of two ranks: start, end and step number, [3, num_transfers] each."""

    stage: Stage
    first: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]


def align(traces: Sequence[RankTrace]) -> Aligned:
    """Align the traces of several ranks, one trace each."""
    by_group = _transfers_by_group(traces)
    times = {
        (key, place): _times(traces[place], of_rank)
        for key, each in by_group.items()
        for place, of_rank in each.places.items()
    }
    num = len(traces)
    aligned = Aligned([0] * num, [{} for _ in traces], [0] * num, [*range(num)])
    together: dict[tuple[int, int], list[_Pairs]] = defaultdict(list)
    for key, each in by_group.items():
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
    for each in by_group.values():
        _set_entries(traces, aligned, each)
    return aligned


def _transfers_by_group(traces: Sequence[RankTrace]) -> dict[tuple[object, ...], _Transfers]:
    """Transfers by group, stage and kind; those in a single rank's trace are left out."""
    found: dict[tuple[object, ...], _Transfers] = {}
    for place, trace in enumerate(traces):
        for at, each in enumerate(trace.work):
            if not each.transfer or not isinstance(each.cause, Stage):
                continue
            key = (_group(trace, each), each.cause, each.kind)
            transfers = found.setdefault(key, _Transfers(each.cause, each.name[:_NAME_LENGTH]))
            transfers.places[place].append(at)
    return {key: each for key, each in found.items() if len(each.places) > 1}


def _group(trace: RankTrace, work: Work) -> object:
    """A key that is the same on all ranks of a transfer's group."""
    if work.group:
        return work.group
    axes = {Stage.COLLECTIVES: ("dp", "pp"), Stage.HAND_OVER: ("dp", "tp")}
    of_stage = axes.get(work.cause, ("pp",)) if isinstance(work.cause, Stage) else ()
    return tuple(trace.axes.get(axis) for axis in of_stage)


def _pairs(
    num_first: int, num_other: int, shift: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of paired transfers on two ranks: k on the first, k + shift on the other."""
    begin, end = max(0, -shift), min(num_first, num_other - shift)
    first = np.arange(begin, max(begin, end), dtype=np.int64)
    return first, first + shift


def _shift(first: npt.NDArray[np.int64], other: npt.NDArray[np.int64], stage: Stage) -> int | None:
    """Number of transfers in the other rank's trace before the first transfer of the first rank's.

    If ranks share a clock: the smallest shift with which no rank leaves a transfer before the other
    enters it. If no shift does that, clocks differ: the shift with the smallest interquartile range
    of the differences of ends.

    Args:
        first, other: start, end and step number, [3, num_transfers].

    Returns:
        None if too few transfers can be paired.
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
    """Share of transfers that one rank left before the other entered, if they share a clock.

    A sender may leave early, so between pipeline stages the smaller of both directions counts.
    """
    shares = float((first[1] < other[0]).mean()), float((other[1] < first[0]).mean())
    return min(shares) if stage is Stage.HAND_OVER else sum(shares)


def _times(trace: RankTrace, places: Sequence[int]) -> npt.NDArray[np.int64]:
    """Entry, end and step number of transfers, [3, num_transfers]."""
    starts = np.array([trace.work[at].entered_ns for at in places], dtype=np.int64)
    ends = np.array([trace.work[at].end_ns for at in places], dtype=np.int64)
    spans = np.array([span.start_ns for span in trace.spans], dtype=np.int64)
    return np.stack([starts, ends, np.searchsorted(spans, starts, side="right") - 1])


def _set_clocks(aligned: Aligned, together: Mapping[tuple[int, int], Sequence[_Pairs]]) -> None:
    """Set clock offsets and step shifts, from rank to rank along the groups that they share."""
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


def _set_entries(traces: Sequence[RankTrace], aligned: Aligned, transfers: _Transfers) -> None:
    """Set when the last rank entered each transfer, on every rank's own clock.

    A rank that left before the last one entered did not wait for it: it only sent.
    """
    by_number: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, shift in transfers.shifts.items():
        for number, at in enumerate(transfers.places[place]):
            by_number[number - shift].append((place, at))
    for members in by_number.values():
        if len(members) < len(transfers.shifts):
            continue  # before or after another rank's profiler ran
        last_ns = max(
            traces[place].work[at].entered_ns - aligned.offsets_ns[place] for place, at in members
        )
        for place, at in members:
            entered_ns = last_ns + aligned.offsets_ns[place]
            if entered_ns < traces[place].work[at].end_ns:
                aligned.entered_ns[place][at] = entered_ns
