"""Timelines of every rank in one step: a row a rank, deployments on one time axis."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.report.charts.colours import OF_CAUSE, OF_GAP
from expertlane.report.document import Chart, Heading, Lanes, Legend, Stretch, Table, Timelines
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
_Spans = npt.NDArray[np.float64]  # [N, 2]; from when to when, ascending, none over another


@dataclass(frozen=True)
class _Rank:
    """Spans of one rank's time by kind; on a model's step, those of hidden transfers too."""

    name: str
    spent: dict[str, _Spans]
    hidden: dict[str, _Spans]


def timelines_chart(
    title: str,
    timelines: Mapping[str, tuple[StepTimeline, str]],
    *,
    is_measured: bool = False,
    shares_cores: bool = False,
) -> Timelines:
    """A timeline a deployment, all over the same stretch of time.

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
    end_us = step.shown_us
    by_kind: dict[tuple[bool, str], list[tuple[float, float]]] = {}
    for track, stage, begin, duration in zip(
        rank.track, rank.stage, rank.begin_us, rank.duration_us, strict=True
    ):
        kind = _kind(step.tracks[track], step.stages[stage], is_measured)
        if kind is not None:
            is_network = step.tracks[track] == Track.NETWORK
            ends = (begin, min(begin + duration, end_us))
            by_kind.setdefault((is_network, kind), []).append(ends)
    spans = {key: _union(of_kind) for key, of_kind in by_kind.items()}
    computed = {kind: each for (is_network, kind), each in spans.items() if not is_network}
    sent = {kind: each for (is_network, kind), each in spans.items() if is_network}
    busy = _joined(computed.values())
    spent, taken = dict(computed), busy
    for kind, each in sent.items():
        own = _without(each, taken)
        spent[kind] = _joined([spent.get(kind, _NONE), own])
        taken = _joined([taken, own])
    starts_late: Gap | Cause = Gap.DESCHEDULED if is_measured and shares_cores else Gap.IDLE
    ends_early: Gap | Cause = Gap.IDLE
    if _is_pipeline(step):
        ends_early = Cause.PIPELINE_BUBBLE
        starts_late = starts_late if starts_late is Gap.DESCHEDULED else Cause.PIPELINE_BUBBLE
    arrivals = _joined([computed.get(_PP, _NONE), sent.get(_PP, _NONE)])
    for kind, gap in _gaps(taken, arrivals, end_us, (starts_late, ends_early)):
        spent[kind] = _joined([spent.get(kind, _NONE), gap])
    hidden = {} if is_measured else {kind: _shared(each, busy) for kind, each in sent.items()}
    return _Rank(str(rank.rank), spent, hidden)


def _kind(track: str, stage: str, is_measured: bool) -> str | None:
    """The kind of a stretch; None for what is no part of a step."""
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


_CAUSES = {stage.label: cause for stage, cause in CAUSE_OF_STAGE.items()}
_PP = str(Cause.HAND_OVER)
_NONE: _Spans = np.zeros((0, 2))


def _gaps(
    taken: _Spans, arrivals: _Spans, end_us: float, at_ends: tuple[Gap | Cause, Gap | Cause]
) -> Iterable[tuple[str, _Spans]]:
    """Spans in which a rank does nothing, by kind.

    Between its first and its last event it waits, for the pipeline stage before where that sends
    next.

    Args:
        arrivals: its spans of PP send/recv.
        at_ends: kinds of the time before its first event and after its last one.
    """
    starts_late, ends_early = at_ends
    free = _without(np.array([[0.0, end_us]]), taken)
    if not len(taken):
        return [(str(Gap.IDLE), free)]
    is_before, is_after = free[:, 1] <= taken[0, 0], free[:, 0] >= taken[-1, 1]
    is_bubble = np.isin(free[:, 1], arrivals[:, 0]) & ~is_before
    return (
        (str(starts_late), free[is_before]),
        (str(ends_early), free[is_after]),
        (str(Cause.PIPELINE_BUBBLE), free[is_bubble]),
        (str(Cause.WAITING), free[~is_before & ~is_after & ~is_bubble]),
    )


def _union(spans: Sequence[tuple[float, float]]) -> _Spans:
    """The union of spans."""
    found: list[list[float]] = []
    for begin, end in sorted(spans):
        if end <= begin:
            continue
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return np.array(found).reshape(-1, 2)


def _joined(spans: Iterable[_Spans]) -> _Spans:
    return _union([(begin, end) for each in spans for begin, end in each.tolist()])


def _without(spans: _Spans, taken: _Spans) -> _Spans:
    """The parts of `spans` outside `taken`."""
    found = []
    for begin, end in spans.tolist():
        at = int(np.searchsorted(taken[:, 1], begin, side="right"))
        while at < len(taken) and taken[at, 0] < end:
            found.append((begin, float(taken[at, 0])))
            begin = float(taken[at, 1])
            at += 1
        found.append((begin, end))
    return _union([each for each in found if each[1] > each[0]])


def _shared(spans: _Spans, other: _Spans) -> _Spans:
    """The intersection of two sets of spans."""
    return _without(spans, _without(spans, other))


def _length_us(spans: _Spans) -> float:
    return float((spans[:, 1] - spans[:, 0]).sum())


def _chart(
    name: str, step: StepTimeline, ranks: Sequence[_Rank], until_us: float, note: str
) -> Chart:
    spent_us = {
        kind: [_length_us(rank.spent.get(kind, _NONE)) for rank in ranks]
        for kind in _COLOURS
        if any(kind in rank.spent or kind in rank.hidden for rank in ranks)
    }
    shares = {kind: float(np.mean(each)) / step.shown_us for kind, each in spent_us.items()}
    said = (f"{kind} {percent(each)}" for kind, each in shares.items())
    hidden = sum(_length_us(each) for rank in ranks for each in rank.hidden.values())
    has_hidden = hidden > _LEAST_HIDDEN * step.shown_us * len(ranks)
    in_lower = {kind for rank in ranks for kind, each in rank.hidden.items() if len(each)}
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


def _lanes(
    ranks: Sequence[_Rank], kinds: Sequence[str], has_hidden: bool, until_us: float
) -> Lanes:
    """Lanes of bins, each of the kind that takes most of it; equal neighbours are merged."""
    edges = np.linspace(0.0, until_us, _NUM_BINS + 1)
    stretches: dict[str, list[Stretch]] = {kind: [] for kind in kinds}
    for row, rank in enumerate(ranks):
        for lane, spans in enumerate([rank.spent, rank.hidden][: 1 + has_hidden]):
            for kind, begin, end in _most(spans, edges):
                stretches[kind].append(Stretch(row, lane, edges[begin], edges[end] - edges[begin]))
    return Lanes(
        tuple(rank.name for rank in ranks),
        1 + has_hidden,
        until_us,
        {kind: tuple(each) for kind, each in stretches.items()},
    )


def _most(
    spans: Mapping[str, _Spans], edges: npt.NDArray[np.float64]
) -> list[tuple[str, int, int]]:
    """Kinds with the first of their bins and the one after the last; none where most is empty."""
    kinds = list(spans)
    width = edges[1] - edges[0]
    in_bins = np.array([np.diff(_spent_until(spans[kind], edges)) for kind in kinds])
    empty = width - in_bins.sum(axis=0) if kinds else np.full(len(edges) - 1, width)
    places = np.vstack([*in_bins, empty]).argmax(axis=0)
    found = []
    begin = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[begin]:
            if places[begin] < len(kinds):
                found.append((kinds[places[begin]], begin, at))
            begin = at
    return found


def _spent_until(spans: _Spans, at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Time of the spans before each moment."""
    if not len(spans):
        return np.zeros_like(at)
    lengths = spans[:, 1] - spans[:, 0]
    ends = np.cumsum(lengths)
    return np.interp(at, spans.ravel(), np.stack([ends - lengths, ends], axis=1).ravel())


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
