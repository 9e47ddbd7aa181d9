"""The time of a server's steps by cause, from its ranks' traces of the torch profiler.

Each moment of a rank's step is counted once, so the causes add up to the step:

- While kernels compute, the stage of the one on the critical stream counts (the stream with the
  most compute time), else of the kernel that began first.
- While only transfers run, they are *exposed*, and count as their stage. From a rank's own entry
  into a transfer to the entry of the last rank of the group, the time counts as waiting for other
  ranks, or in PP send/recv as pipeline bubble.
- While nothing runs, the time counts as host gaps; so do operators that prepare a step on the host.

Work that runs at the same time as the work that counts is *hidden*. It is recorded separately, and
is no part of the sum: a dispatch beneath the experts of another micro-batch costs no time.

`rank_alignment.py` describes how ranks' traces are aligned.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from expertlane.comparison.traces.rank_alignment import align
from expertlane.comparison.traces.rank_trace import RankTrace, read_rank_trace
from expertlane.comparison.traces.trace_file import Span, Work
from expertlane.errors import UserError
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.metrics import CAUSE_OF_STAGE
from expertlane.results.record import StepsRecord
from expertlane.spec.names import Cause, Phase, Stage

NS_PER_S = 1_000_000_000
UNKNOWN_SHARE = 0.05  # of the time: a larger share in unknown kernels is reported
MOST_UNKNOWN = 10  # unknown kernels that a record names
BACKWARD = "backward pass"  # name in a record for the time of a backward pass
_NAME_LENGTH = 120  # characters of a kernel's name in a record
_EXCHANGES = (Stage.DISPATCH, Stage.COMBINE)


@dataclass(frozen=True)
class RankStep:
    """One step of one rank, in seconds; all parts but the hidden ones add up to `duration_s`.

    Attributes:
        start_s: start, on the rank's own clock.
        before_s: time since the rank's previous step ended; 0 for the first.
        waited_before_s: of `before_s`, waiting for other ranks of the pipeline stage.
        bubble_before_s: of `before_s`, time in which other pipeline stages were busy.
        stage_s: time by stage; of transfers the exposed part, without waiting.
        waiting_s: exposed waiting for other ranks, PP send/recv left out.
        bubble_s: exposed waiting in PP send/recv.
        host_gaps_s: time in which no kernel runs, and of operators that prepare the step.
        unknown_s: time of unknown kernels or operators, by name.
        backward_s: time of a backward pass, in a trace of training.
        hidden_s: hidden time by stage, without waiting.
        hidden_waiting_s: hidden waiting for other ranks.
    """

    rank: int
    start_s: float
    duration_s: float
    before_s: float
    stage_s: Mapping[Stage, float]
    waiting_s: float
    bubble_s: float
    host_gaps_s: float
    unknown_s: Mapping[str, float]
    backward_s: float
    hidden_s: Mapping[Stage, float]
    hidden_waiting_s: float
    waited_before_s: float = 0.0
    bubble_before_s: float = 0.0

    @property
    def causes_s(self) -> dict[Cause, float]:
        """Seconds by cause; their sum is `duration_s`."""
        causes: dict[Cause, float] = dict.fromkeys(_CAUSES, 0.0)
        for stage, seconds in self.stage_s.items():
            causes[CAUSE_OF_STAGE[stage]] += seconds
        causes[Cause.WAITING] = self.waiting_s
        causes[Cause.PIPELINE_BUBBLE] = self.bubble_s
        causes[Cause.HOST_GAPS] = self.host_gaps_s
        causes[Cause.UNKNOWN] = sum(self.unknown_s.values()) + self.backward_s
        return causes


_CAUSES: tuple[Cause, ...] = tuple(cause for cause in Cause if cause is not Cause.ENGINE)


@dataclass(frozen=True)
class TracedStep:
    """One step of all ranks.

    Attributes:
        phase: prefill if any rank had a prompt in it; None if no trace has the phase.
        num_seqs, num_tokens: sums over data-parallel ranks; None if no trace has them.
        ranks: the step on each rank; ranks whose trace lacks it are left out.
    """

    phase: Phase | None
    num_seqs: int | None
    num_tokens: int | None
    ranks: tuple[RankStep, ...]


@dataclass(frozen=True)
class StepCauses:
    """The time of traced steps by cause.

    Attributes:
        ranks: numbers of the ranks, in ascending order.
        clock_offsets_s: [num_ranks]; each rank's clock minus the first rank's.
        unaligned: transfers that could not be paired between ranks, and why, in words; waiting for
            other ranks is not split off their time.
    """

    ranks: tuple[int, ...]
    steps: tuple[TracedStep, ...]
    clock_offsets_s: tuple[float, ...]
    unaligned: tuple[str, ...] = ()

    def of(self, phase: Phase | None) -> tuple[TracedStep, ...]:
        """The steps of a phase; for None, those of an unknown phase."""
        return tuple(step for step in self.steps if step.phase is phase)

    @property
    def unknown_s(self) -> dict[str, float]:
        """Seconds over all steps and ranks by unknown kernel, the longest first."""
        return _unknown(self.steps)

    @property
    def unknown_share(self) -> float:
        """Share of the time of all steps and ranks that unknown kernels take."""
        whole_s = sum(each.duration_s for step in self.steps for each in step.ranks)
        return sum(self.unknown_s.values()) / whole_s if whole_s else 0.0

    @property
    def remark(self) -> str:
        """A sentence if unknown kernels take more than `UNKNOWN_SHARE`; else empty."""
        if self.unknown_share <= UNKNOWN_SHARE:
            return ""
        name, seconds = next(iter(self.unknown_s.items()))
        share = seconds / sum(self.unknown_s.values())
        return (
            f"{self.unknown_share:.0%} of the time is in unknown kernels; "
            f"{share:.0%} of that in {name}"
        )


def read_step_causes(paths: Iterable[Path]) -> StepCauses:
    """Read the traces of a server's ranks, one file for each rank.

    Raises:
        UserError: there is no file; one cannot be read, is not a trace, or has no steps; two are of
            the same rank; some have kernels of a GPU and some have none.
    """
    traces = [read_rank_trace(path, place) for place, path in enumerate(paths)]
    if not traces:
        raise UserError("no traces were given; valid: one file for each rank")
    traces = _numbered(traces)
    for one, other in pairwise(traces):
        if one.rank == other.rank:
            raise UserError(f"{one.path} and {other.path} are both of rank {one.rank}")
    on_gpu = [trace for trace in traces if trace.on_gpu]
    if len(on_gpu) not in (0, len(traces)):
        other = next(trace for trace in traces if not trace.on_gpu)
        raise UserError(
            f"{on_gpu[0].path} has kernels of a GPU, {other.path} has none; give traces of one run"
        )
    return step_causes(traces)


def _numbered(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Traces by rank; if replicas all count from 0, ranks are numbered by their files' names."""
    if len({trace.rank for trace in traces}) < len(traces):
        places = [tuple(trace.axes.get(axis, 0) for axis in ("dp", "pp", "tp")) for trace in traces]
        if len(set(places)) == len(places):
            order = sorted(range(len(places)), key=places.__getitem__)
            return [replace(traces[at], rank=rank) for rank, at in enumerate(order)]
    return sorted(traces, key=lambda trace: trace.rank)


def step_causes(traces: Sequence[RankTrace]) -> StepCauses:
    """Align the traces of several ranks, and split the time of their steps by cause."""
    aligned = align(traces)
    of_ranks = [_split(trace, aligned.entered_ns[place]) for place, trace in enumerate(traces)]
    rows = _rows(traces, aligned.step_shifts)
    steps: list[TracedStep] = []
    for row in rows:
        batches = [
            (traces[place].axes.get("dp", 0), traces[place].spans[at].batch)
            for place, at in enumerate(row)
            if at is not None
        ]
        of_replicas = list(dict(batches).values())  # ranks of one replica run the same batch
        phases = {batch.phase for batch in of_replicas if batch.phase}
        seqs = [batch.num_seqs for batch in of_replicas if batch.num_seqs is not None]
        tokens = [batch.num_tokens for batch in of_replicas if batch.num_tokens is not None]
        phase = Phase.PREFILL if Phase.PREFILL in phases else next(iter(phases), None)
        of_row = [(place, of_ranks[place][at]) for place, at in enumerate(row) if at is not None]
        if steps and steps[-1].phase is phase:
            of_row = _with_idle(of_row, traces, aligned.together)
        steps.append(
            TracedStep(
                phase,
                sum(seqs) if seqs else None,
                sum(tokens) if tokens else None,
                tuple(step for _, step in of_row),
            )
        )
    return StepCauses(
        tuple(trace.rank for trace in traces),
        tuple(steps),
        tuple(offset / NS_PER_S for offset in aligned.offsets_ns),
        tuple(aligned.unaligned),
    )


def _with_idle(
    steps: Sequence[tuple[int, RankStep]], traces: Sequence[RankTrace], together: Sequence[int]
) -> list[tuple[int, RankStep]]:
    """A step of several ranks, with what each waited before it.

    Of ranks that meet, the shortest time between two steps is the engine's; what all ranks of a
    pipeline stage have above it is a bubble, what a rank has above its stage's shortest is waiting.

    Args:
        steps: with the rank's place among `traces`.
    """
    found = []
    for place, step in steps:
        others = [(at, each) for at, each in steps if together[at] == together[place]]
        stage = traces[place].axes.get("pp", 0)
        least_s = min(each.before_s for _, each in others)
        of_stage_s = min(
            each.before_s for at, each in others if traces[at].axes.get("pp", 0) == stage
        )
        waited_s, bubble_s = step.before_s - of_stage_s, of_stage_s - least_s
        found.append((place, replace(step, waited_before_s=waited_s, bubble_before_s=bubble_s)))
    return found


def _rows(traces: Sequence[RankTrace], shifts: Sequence[int]) -> list[list[int | None]]:
    """[num_steps, num_ranks]; index of each step on each rank, None where a trace lacks it."""
    first = min(-shift for shift in shifts)
    last = max(len(trace.spans) - shift for trace, shift in zip(traces, shifts, strict=True))
    rows: list[list[int | None]] = []
    for number in range(first, last):
        row = [
            number + shift if 0 <= number + shift < len(trace.spans) else None
            for trace, shift in zip(traces, shifts, strict=True)
        ]
        if any(at is not None for at in row):
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Part:
    """A piece of work: all of it, or a transfer's part before or after the last rank's entry."""

    start_ns: int
    end_ns: int
    order: tuple[int, int, int]  # of parts at the same time the least counts: kind, stream, start
    work: Work
    waits: bool = False


def _parts(trace: RankTrace, entered_ns: Mapping[int, int]) -> list[_Part]:
    """A rank's work, each transfer split at the entry of the last rank."""
    busy_ns: dict[int, int] = defaultdict(int)
    for each in trace.work:
        busy_ns[each.stream] += 0 if each.transfer else each.end_ns - each.start_ns
    streams = {
        stream: place for place, stream in enumerate(sorted(busy_ns, key=lambda x: -busy_ns[x]))
    }
    parts = []
    for at, each in enumerate(trace.work):
        start_ns, stream = each.start_ns, streams[each.stream]
        if not each.transfer:
            kind = 1 if each.cause is None else 0  # inference comes before training
            parts.append(_Part(start_ns, each.end_ns, (kind, stream, start_ns), each))
            continue
        begin_ns = max(start_ns, min(entered_ns.get(at, start_ns), each.end_ns))
        parts.append(_Part(start_ns, begin_ns, (3, stream, start_ns), each, waits=True))
        parts.append(_Part(begin_ns, each.end_ns, (2, stream, start_ns), each))
    return [part for part in parts if part.end_ns > part.start_ns]


class _StepTime:
    """A step's time by cause and kernel name, in nanoseconds."""

    def __init__(self) -> None:
        self.counted: dict[tuple[Stage | Cause | None, str], int] = defaultdict(int)
        self.hidden: dict[tuple[Stage | Cause | None, str], int] = defaultdict(int)

    def add(self, active: Iterable[_Part], duration_ns: int) -> None:
        """Count a time in which the set of running parts did not change."""
        ordered = sorted(active, key=lambda part: part.order)
        if not ordered:
            self.counted[Cause.HOST_GAPS, ""] += duration_ns
        for place, part in enumerate(ordered):
            cause = part.work.cause
            if part.waits:
                is_pipeline = cause is Stage.HAND_OVER
                cause = Cause.PIPELINE_BUBBLE if is_pipeline else Cause.WAITING
            name = part.work.name if cause is Cause.UNKNOWN else ""
            (self.hidden if place else self.counted)[cause, name] += duration_ns


def _split(trace: RankTrace, entered_ns: Mapping[int, int]) -> list[RankStep]:
    """The steps of a rank, with each moment counted once."""
    parts = _parts(trace, entered_ns)
    marks: list[tuple[int, int, int]] = []  # time; 0 an end, 1 a begin; part
    for number, part in enumerate(parts):
        marks += [(part.start_ns, 1, number), (part.end_ns, 0, number)]
    marks.sort()
    found: list[RankStep] = []
    active: dict[int, _Part] = {}
    at = 0
    for span in trace.spans:
        account, now_ns = _StepTime(), span.start_ns
        while at < len(marks) and marks[at][0] < span.end_ns:
            time_ns, begins, number = marks[at]
            if time_ns > now_ns:
                account.add(active.values(), time_ns - now_ns)
                now_ns = time_ns
            if begins:
                active[number] = parts[number]
            else:
                active.pop(number, None)
            at += 1
        if span.end_ns > now_ns:
            account.add(active.values(), span.end_ns - now_ns)
        before_ns = span.start_ns - trace.spans[len(found) - 1].end_ns if found else 0
        found.append(_rank_step(trace.rank, span, before_ns, account))
    return found


def _rank_step(rank: int, span: Span, before_ns: int, account: _StepTime) -> RankStep:
    counted = {key: ns / NS_PER_S for key, ns in account.counted.items()}
    hidden = {key: ns / NS_PER_S for key, ns in account.hidden.items()}

    def of_stages(seconds: Mapping[tuple[Stage | Cause | None, str], float]) -> dict[Stage, float]:
        return {stage: seconds[stage, ""] for stage in Stage if (stage, "") in seconds}

    return RankStep(
        rank=rank,
        start_s=span.start_ns / NS_PER_S,
        duration_s=(span.end_ns - span.start_ns) / NS_PER_S,
        before_s=before_ns / NS_PER_S,
        stage_s=of_stages(counted),
        waiting_s=counted.get((Cause.WAITING, ""), 0.0),
        bubble_s=counted.get((Cause.PIPELINE_BUBBLE, ""), 0.0),
        host_gaps_s=counted.get((Cause.HOST_GAPS, ""), 0.0),
        unknown_s={name: s for (cause, name), s in counted.items() if cause is Cause.UNKNOWN},
        backward_s=counted.get((None, ""), 0.0),
        hidden_s=of_stages(hidden),
        hidden_waiting_s=sum(
            hidden.get((cause, ""), 0.0) for cause in (Cause.WAITING, Cause.PIPELINE_BUBBLE)
        ),
    )


def _unknown(steps: Iterable[TracedStep]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for step in steps:
        for each in step.ranks:
            for name, of_name_s in each.unknown_s.items():
                seconds[name[:_NAME_LENGTH]] += of_name_s
            if each.backward_s:
                seconds[BACKWARD] += each.backward_s
    return dict(sorted(seconds.items(), key=lambda item: (-item[1], item[0])))


def steps_record(causes: StepCauses, phase: Phase) -> StepsRecord | None:
    """The traced steps of a phase as a record; None if there are none.

    A step's time includes the time between two steps. What a rank has of it above the others is
    waiting, or bubble; what all have is scheduler overhead, in the median: the mean would count
    pauses of the load. The profiler slows the steps that it records, so throughput and step times
    are those of profiled steps.
    """
    steps = [step for step in causes.of(phase) if step.ranks]
    if not steps:
        return None
    of_ranks = [each for step in steps for each in step.ranks]
    between_s = median(
        each.before_s - each.waited_before_s - each.bubble_before_s for each in of_ranks
    )
    idle_s = {
        Cause.WAITING: fmean(fmean(each.waited_before_s for each in step.ranks) for step in steps),
        Cause.PIPELINE_BUBBLE: fmean(
            fmean(each.bubble_before_s for each in step.ranks) for step in steps
        ),
    }
    breakdown_s = {
        cause.value: idle_s.get(cause, 0.0)
        + fmean(fmean(each.causes_s[cause] for each in step.ranks) for step in steps)
        for cause in _CAUSES
    }
    breakdown_s[Cause.ENGINE.value] = between_s
    durations_s = [fmean(each.duration_s for each in step.ranks) for step in steps]
    wall_s = sum(durations_s) + (between_s + sum(idle_s.values())) * len(steps)
    num_tokens = sum(step.num_tokens or 0 for step in steps)
    exchanges_s = [
        (
            sum(each.stage_s.get(stage, 0.0) for stage in _EXCHANGES),
            sum(each.hidden_s.get(stage, 0.0) for stage in _EXCHANGES),
        )
        for each in of_ranks
    ]
    exposed_s, hidden_s = (sum(side) for side in zip(*exchanges_s, strict=True))
    of_rank = {rank: [each for each in of_ranks if each.rank == rank] for rank in causes.ranks}
    return StepsRecord(
        phase=phase,
        num_steps=len(steps),
        num_tokens=num_tokens,
        num_seqs=sum(step.num_seqs or 0 for step in steps),
        wall_s=Estimate.of(wall_s),
        tps=Estimate.of(num_tokens / wall_s),
        step_s=Summary.of(durations_s),
        breakdown_s=breakdown_s,
        hidden_share=hidden_s / (exposed_s + hidden_s) if exposed_s + hidden_s else None,
        stage_s={
            stage.label: tuple(
                sum(each.stage_s.get(stage, 0.0) for each in of_rank[rank]) for rank in causes.ranks
            )
            for stage in CAUSE_OF_STAGE
        },
        waiting_s=tuple(
            sum(each.waiting_s + each.waited_before_s for each in of_rank[rank])
            for rank in causes.ranks
        ),
        bubble_s=tuple(
            sum(each.bubble_s + each.bubble_before_s for each in of_rank[rank])
            for rank in causes.ranks
        ),
        unknown_kernels={
            name: seconds / len(of_ranks)
            for name, seconds in list(_unknown(steps).items())[:MOST_UNKNOWN]
        },
    )
