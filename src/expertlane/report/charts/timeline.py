"""Timelines of every rank in one step: a row a rank, deployments on one time axis.

The SVG is as wide as its place: time is stretched, rows are not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import floor, log10

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from expertlane.report.charts.colours import OF_CAUSE, OF_GAP
from expertlane.report.document import Chart, Heading, Lanes, Legend, Segment, Table, Timelines
from expertlane.report.numbers import counted, milliseconds, percent
from expertlane.results.metrics import CAUSE_OF_STAGE
from expertlane.results.timeline import RankTimeline, StepTimeline
from expertlane.spec.names import Cause, Gap, Track

_NUM_BINS = 1000  # of the time axis; what is shorter counts with what is around it
_NUM_OPEN = 3
_LEAST_HIDDEN = 0.01  # of the time; less in the second lane is none
_US_PER_S = 1e6
_COMPUTING = tuple(str(each) for each in (Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD))
_COLOURS = OF_CAUSE | OF_GAP
_CAUSES = {stage.label: cause for stage, cause in CAUSE_OF_STAGE.items()}
_PP = str(Cause.HAND_OVER)
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Rank:
    """A rank's time by kind of work.

    Attributes:
        edges_us: [N + 1]; ends of N segments, in each of which nothing begins or ends.
        spent: by kind, [N]; whether a segment is of it.
        hidden: likewise; on a model's step, transfers hidden by computing.
    """

    name: str
    edges_us: npt.NDArray[np.float64]
    spent: dict[str, _Mask]
    hidden: dict[str, _Mask]

    def until_us(self, mask: _Mask, at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Time of the mask's segments before each moment."""
        spent = np.concatenate([[0.0], np.cumsum(np.diff(self.edges_us) * mask)])
        until: npt.NDArray[np.float64] = np.interp(at, self.edges_us, spent)
        return until

    def us(self, mask: _Mask | None) -> float:
        """Length of the mask's segments."""
        return 0.0 if mask is None else float((np.diff(self.edges_us) * mask).sum())


def timelines_chart(
    title: str,
    timelines: Mapping[str, tuple[StepTimeline, str]],
    *,
    is_measured: bool = False,
    shares_cores: bool = False,
) -> Timelines:
    """A timeline a deployment, all over the same period.

    Args:
        timelines: by deployment, at least one, each with a note on it.
        is_measured: measured in wall time: the network row then shows waiting, else transfers.
        shares_cores: ranks share cores, so that one that begins late was waiting for a core.
    """
    until_us = max(step.shown_us for step, _ in timelines.values())
    charts = []
    for name, (step, note) in timelines.items():
        ranks = [_rank(each, step, is_measured, shares_cores) for each in step.ranks]
        chart = _chart(name, step, ranks, until_us, note)
        charts.append((chart.title, chart))
    seen = frozenset(name for name, _ in charts[:_NUM_OPEN])
    return Timelines(title, tuple(charts), seen)


def _rank(rank: RankTimeline, step: StepTimeline, is_measured: bool, shares_cores: bool) -> _Rank:
    """Each moment counted once: computing before transfers, transfers before gaps."""
    spans: dict[tuple[bool, str], list[tuple[float, float]]] = {}
    for track, stage, begin, duration in zip(
        rank.track, rank.stage, rank.begin_us, rank.duration_us, strict=True
    ):
        kind, end = _kind(step.tracks[track], step.stages[stage], is_measured), begin + duration
        if kind is not None and min(end, step.shown_us) > begin:
            key = step.tracks[track] == Track.NETWORK, kind
            spans.setdefault(key, []).append((begin, min(end, step.shown_us)))
    ends = [end for of_kind in spans.values() for span in of_kind for end in span]
    edges = np.unique([0.0, step.shown_us, *ends])
    masks = {key: _mask(np.array(of_kind), edges) for key, of_kind in spans.items()}
    spent = {kind: mask for (is_network, kind), mask in masks.items() if not is_network}
    sent = {kind: mask for (is_network, kind), mask in masks.items() if is_network}
    none = np.zeros(len(edges) - 1, dtype=bool)
    arrivals = spent.get(_PP, none) | sent.get(_PP, none)
    busy = np.any([none, *spent.values()], axis=0)
    taken = busy
    for kind, mask in sent.items():
        spent[kind] = spent.get(kind, none) | (mask & ~taken)
        taken = taken | mask
    is_late = is_measured and shares_cores
    for gap, mask in _gaps(taken, arrivals, _is_pipeline(step), is_late):
        spent[str(gap)] = spent.get(str(gap), none) | mask
    hidden = {} if is_measured else {kind: mask & busy for kind, mask in sent.items()}
    return _Rank(str(rank.rank), edges, spent, hidden)


def _mask(spans: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> _Mask:
    """[N]; whether any of the spans [M, 2] is over each segment between two of its ends."""
    num_open = np.zeros(len(edges), dtype=np.int64)
    np.add.at(num_open, np.searchsorted(edges, spans[:, 0]), 1)
    np.add.at(num_open, np.searchsorted(edges, spans[:, 1]), -1)
    is_open: _Mask = np.cumsum(num_open)[:-1] > 0
    return is_open


def _kind(track: str, stage: str, is_measured: bool) -> str | None:
    """The kind of a segment; None for what is no part of a step."""
    cause = _CAUSES.get(stage)
    if track == Track.DESCHEDULED:
        return str(Gap.DESCHEDULED)
    if cause is None:
        return None
    if track == Track.NETWORK and is_measured:
        return str(Cause.PIPELINE_BUBBLE if cause is Cause.HAND_OVER else Cause.WAITING)
    return str(cause)


def _is_pipeline(step: StepTimeline) -> bool:
    """True if any rank sends or receives between pipeline stages."""
    of_pp = {
        place for place, stage in enumerate(step.stages) if _CAUSES.get(stage) is Cause.HAND_OVER
    }
    return any(not of_pp.isdisjoint(rank.stage) for rank in step.ranks)


def _gaps(
    taken: _Mask, arrivals: _Mask, is_pipeline: bool, is_late: bool
) -> Iterable[tuple[Gap | Cause, _Mask]]:
    """The segments in which a rank does nothing, by kind.

    Between its first and its last event it waits, for the pipeline stage before where that sends
    next.

    Args:
        arrivals: its segments of PP send/recv.
        is_late: whether a rank that begins late was waiting for a core.
    """
    if not taken.any():
        return [(Gap.IDLE, ~taken)]
    places, busy = np.arange(len(taken)), np.flatnonzero(taken)
    is_before, is_after = places < busy[0], places > busy[-1]
    following = busy[np.minimum(np.searchsorted(busy, places), len(busy) - 1)]
    is_inside = ~taken & ~is_before & ~is_after
    at_end: Gap | Cause = Cause.PIPELINE_BUBBLE if is_pipeline else Gap.IDLE
    return (
        (Gap.DESCHEDULED if is_late else at_end, is_before),
        (at_end, is_after),
        (Cause.PIPELINE_BUBBLE, is_inside & arrivals[following]),
        (Cause.WAITING, is_inside & ~arrivals[following]),
    )


def _chart(
    name: str, step: StepTimeline, ranks: Sequence[_Rank], until_us: float, note: str
) -> Chart:
    spent_us = {
        kind: [rank.us(rank.spent.get(kind)) for rank in ranks]
        for kind in _COLOURS
        if any(kind in rank.spent or kind in rank.hidden for rank in ranks)
    }
    shares = {kind: float(np.mean(each)) / step.shown_us for kind, each in spent_us.items()}
    said = (f"{kind} {percent(each)}" for kind, each in shares.items())
    hidden = sum(rank.us(mask) for rank in ranks for mask in rank.hidden.values())
    has_hidden = hidden > _LEAST_HIDDEN * step.shown_us * len(ranks)
    in_lower = {kind for rank in ranks for kind, mask in rank.hidden.items() if mask.any()}
    kinds = [kind for kind, each in spent_us.items() if sum(each) > 0 or kind in in_lower]
    lower = " The lower half of a row: transfers that computing hides." if has_hidden else ""
    return Chart(
        f"{name}: {_extent(step)}, {_finding(shares)}",
        f"A row for each of {counted(len(ranks), 'rank')}, what it did over {_extent(step)}. "
        f"Mean over ranks: {', '.join(said)}.",
        _lanes(ranks, kinds, has_hidden, until_us),
        Table(
            f"{name}: ms by cause{f', {_extent(step)}' if step.is_cut else ''}",
            tuple(map(Heading, ["rank", *kinds])),
            tuple(
                (rank.name, *(milliseconds(spent_us[kind][row] / _US_PER_S) for kind in kinds))
                for row, rank in enumerate(ranks)
            ),
        ),
        legend=[Legend(kind, _COLOURS[kind]) for kind in kinds],
        note=" ".join(filter(None, (_note(step) + lower, note))),
    )


def _finding(shares: Mapping[str, float]) -> str:
    """Shares of computing and of the largest of the rest, in words."""
    computing = sum(shares.get(kind, 0.0) for kind in _COMPUTING)
    rest = {kind: share for kind, share in shares.items() if kind not in _COMPUTING}
    said = f"computing {percent(computing)}"
    if not any(rest.values()):
        return said
    most = max(rest, key=lambda kind: rest[kind])
    return f"{said}, {most} {percent(rest[most])}"


def _extent(step: StepTimeline) -> str:
    whole = f"{milliseconds(step.end_us / _US_PER_S)} ms"
    if not step.is_cut:
        return whole
    return f"the first {milliseconds(step.shown_us / _US_PER_S)} of {whole}"


def _note(step: StepTimeline) -> str:
    notes = [f"{counted(step.num_tokens, 'token')} of {counted(step.num_seqs, 'sequence')}."]
    if len(step.ranks) < step.num_ranks:
        notes.append(f"{len(step.ranks)} of {step.num_ranks} ranks are drawn, evenly chosen.")
    if step.is_cut:
        notes.append(f"Drawn, and in the table: {_extent(step)}.")
    return " ".join(notes)


def _lanes(
    ranks: Sequence[_Rank], kinds: Sequence[str], has_hidden: bool, until_us: float
) -> Lanes:
    """Lanes of bins, each of the kind that takes most of it; equal neighbours are merged."""
    edges = np.linspace(0.0, until_us, _NUM_BINS + 1)
    segments: dict[str, list[Segment]] = {kind: [] for kind in kinds}
    for row, rank in enumerate(ranks):
        for lane, masks in enumerate([rank.spent, rank.hidden][: 1 + has_hidden]):
            in_bins = [np.diff(rank.until_us(mask, edges)) for mask in masks.values()]
            empty = np.diff(edges) - np.sum(in_bins, axis=0)
            end = 0
            for place, run in groupby(np.vstack([*in_bins, empty]).argmax(axis=0).tolist()):
                begin, end = end, end + len(list(run))
                if place < len(masks):
                    segment = Segment(row, lane, edges[begin], edges[end] - edges[begin])
                    segments[list(masks)[place]].append(segment)
    return Lanes(
        tuple(rank.name for rank in ranks),
        1 + has_hidden,
        until_us,
        {kind: tuple(each) for kind, each in segments.items()},
    )


UNITS = 8192  # along the time axis: a pixel each where it is drawn largest
_LANE, _GAP = 8, 4  # of a row's height
_LANE_PX = 7
_NUM_TICKS, _FINER = 5, 4  # the finer ones are seen where the axis is stretched
_US_PER_MS = 1e3


def lanes_svg(lanes: Lanes, colours: Mapping[str, str]) -> Markup:
    """The `svg` element; one path for all segments of a kind, to keep thousands small.

    Args:
        colours: a variable of the page's style sheet, by kind.
    """
    height = len(lanes.rows) * _row(lanes)
    paths = "".join(
        f'<path stroke="var({escape(colours[kind])})" d="{_path(lanes, segments)}">'
        f"<title>{escape(kind)}</title></path>"
        for kind, segments in lanes.segments.items()
    )
    return Markup(
        f'<svg viewBox="0 0 {UNITS} {height}" preserveAspectRatio="none" fill="none" '
        f'height="{round(height * _LANE_PX / _LANE)}" '
        f'stroke-width="{_LANE}" data-rows="{escape(" ".join(lanes.rows))}" '
        f'data-until-ms="{lanes.until_us / _US_PER_MS:g}">{paths}</svg>'
    )


def _row(lanes: Lanes) -> int:
    return _LANE * lanes.num_lanes + _GAP


def _path(lanes: Lanes, segments: Iterable[Segment]) -> str:
    """A path of lines as thick as a lane; gaps under a pixel are closed."""
    by_lane: dict[tuple[int, int], list[list[int]]] = {}
    for each in sorted(segments, key=lambda each: each.begin_us):
        begin = round(each.begin_us / lanes.until_us * UNITS)
        end = max(begin + 1, round((each.begin_us + each.duration_us) / lanes.until_us * UNITS))
        drawn = by_lane.setdefault((each.row, each.lane), [])
        if drawn and begin <= drawn[-1][1] + 1:
            drawn[-1][1] = max(drawn[-1][1], end)
        else:
            drawn.append([begin, end])
    return "".join(
        f"M{begin} {row * _row(lanes) + lane * _LANE + (_LANE + _GAP) // 2}h{end - begin}"
        for (row, lane), drawn in sorted(by_lane.items())
        for begin, end in drawn
    )


@dataclass(frozen=True)
class Tick:
    """A label under the time axis, `at` from 0 to 1."""

    at: float
    label: str
    is_fine: bool


def ticks(lanes: Lanes) -> list[Tick]:
    """Round numbers of milliseconds along the axis."""
    until_ms = lanes.until_us / _US_PER_MS
    least = until_ms / _NUM_TICKS
    whole = 10.0 ** floor(log10(least))
    # The next of 1, 2, 4, 10, 20, 40 …; their quarters are round too.
    step_ms = next(whole * each for each in (1, 2, 4, 10) if whole * each >= least)
    num = floor(until_ms / step_ms * _FINER + 1e-9)
    return [
        Tick(at, f"{at * until_ms:.6g}", place % _FINER != 0)
        for place in range(num + 1)
        if (at := place * step_ms / _FINER / until_ms) <= 1
    ]
