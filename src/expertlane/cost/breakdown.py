"""Breakdown of a projected step's time: by cause, by basis, beside its floor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from expertlane.cost.laws.profile import LIKELY, Device
from expertlane.cost.laws.times import Basis
from expertlane.cost.pricing import StageWork, law_dtype
from expertlane.cost.step.operation import Floats, NumberTypes, Operation
from expertlane.cost.step.program import StageProgram, StepProgram
from expertlane.cost.timeline import LogTable, Span, StepTimes
from expertlane.results.metrics import CAUSE_OF_STAGE
from expertlane.spec.names import Cause, ProjectedCause, Stage

_CAUSES = list(dict.fromkeys([*map(str, ProjectedCause), *map(str, Cause)]))
_INDEX = {cause: place for place, cause in enumerate(_CAUSES)}
CAUSE_OF_TRANSFER = {
    Stage.DISPATCH: ProjectedCause.DISPATCH_COMBINE,
    Stage.COMBINE: ProjectedCause.DISPATCH_COMBINE,
    Stage.COLLECTIVES: ProjectedCause.TP_COLLECTIVES,
}


@dataclass(frozen=True)
class Breakdown:
    """Shares of causes in the likely time of some steps.

    Attributes:
        seconds: from the first step's begin to the last one's end.
        shares: by cause, shares of that time, mean over ranks; they add up to 1.
        flops_utilisation, bytes_utilisation: FLOPs over the devices' peak, and bytes of weights,
            keys and values read over their memory's bandwidth.
    """

    seconds: float
    shares: Mapping[str, float]
    flops_utilisation: float
    bytes_utilisation: float


class _SpanCauses(NamedTuple):
    """Seconds of a micro-batch's time on a stage by cause, spent_s [num_causes, R]."""

    spent_s: Floats
    flops: float
    num_bytes: float


class BreakdownTable:
    """Adds up steps of one phase that follow each other on a `Timeline`.

    An operation whose reads take longer than its FLOPs, both at the datasheet's peak, is bound by
    memory; its time is split between weights and keys and values by their bytes. A transfer that
    is waited for is imbalance until its group's last member has posted it, and exposed from then
    on. Of a wait for the stage before, what the hidden states travel is PP transfer and the rest
    bubble. The time between steps is split as in `results.metrics`.

    Args:
        device: its datasheet.
        types: number types that operations compute in; utilisation is of the weights' peak.
        by_stage: operations by the stage that they are measured in (`Cause`), with what transfers
            beside them add and launches, as a rank's clock sees them, in place of what bounds them.
    """

    def __init__(self, device: Device, types: NumberTypes, *, by_stage: bool = False) -> None:
        self._device = device
        self._types = types
        self._by_stage = by_stage
        self._of_stage: list[Floats] = []  # [num_causes, R] each
        self._begin_s: float | None = None
        self._last: StepTimes | None = None
        self._flops = self._bytes = 0.0
        self._known: WeakKeyDictionary[Span, _SpanCauses] = WeakKeyDictionary()

    def cleared(self) -> "BreakdownTable":
        """An empty table, quicker with what this one has seen before."""
        table = BreakdownTable(self._device, self._types, by_stage=self._by_stage)
        table._known = self._known
        return table

    def add(self, times: StepTimes, since_s: float | None = None) -> None:
        """Add the next step.

        Args:
            since_s: of the first one, when the step before it had ended: what lies between counts
                too. None: nothing does.
        """
        if self._begin_s is None:
            first = float(min(of_stage[0].begin[LIKELY].min() for of_stage in times.spans))
            if since_s is not None:
                first = min(first, since_s - float(times.origin_s[LIKELY]))
            self._begin_s = float(times.origin_s[LIKELY]) + first
            self._of_stage = [np.zeros((len(_CAUSES), idle.shape[1])) for idle in times.idle_s]
            ahead = [of_stage[0].begin[LIKELY] - first for of_stage in times.spans]
            _split_idle(self._of_stage, ahead)
        else:
            _split_idle(self._of_stage, [idle[LIKELY] for idle in times.idle_s])
        for place, of_micro_batches in enumerate(times.spans):
            before = times.spans[place - 1] if place else [None] * len(of_micro_batches)
            for span, source in zip(of_micro_batches, before, strict=True):
                causes = self._known.get(span)
                if causes is None:
                    causes = self._known[span] = self._of_span(span, source)
                self._of_stage[place] += causes.spent_s
                self._flops += causes.flops
                self._bytes += causes.num_bytes
        self._last = times

    def result(self) -> Breakdown:
        """The table so far.

        Raises:
            ValueError: no step was added.
        """
        if self._last is None or self._begin_s is None:
            raise ValueError("no step to explain")
        end_s = float(self._last.end_s[LIKELY])
        spent = [each.copy() for each in self._of_stage]
        from_origin = end_s - float(self._last.origin_s[LIKELY])
        rest = [  # no less than nothing, of which rounding may leave it
            np.maximum(from_origin - of_stage[-1].end[LIKELY], 0.0) for of_stage in self._last.spans
        ]
        _split_idle(spent, rest)
        by_rank = np.concatenate(spent, axis=1)
        seconds, num_ranks = end_s - self._begin_s, by_rank.shape[1]
        total_s = max(float(by_rank.sum()), np.finfo(float).tiny)
        rank_s = max(seconds * num_ranks, np.finfo(float).tiny)
        return Breakdown(
            seconds=seconds,
            shares={
                cause: float(by_rank[_INDEX[cause]].sum()) / total_s
                for cause in (_CAUSES if self._by_stage else ProjectedCause)
            },
            flops_utilisation=self._flops / rank_s / self._device.flops_per_s[self._types.weights],
            bytes_utilisation=self._bytes / rank_s / self._device.memory_bytes_per_s,
        )

    def _of_span(self, span: Span, source: Span | None) -> "_SpanCauses":
        """The causes of one micro-batch on one stage; `source` is its span on the stage before."""
        num_ranks = span.end.shape[1]
        spent = np.zeros((len(_CAUSES), num_ranks))
        waited_s = (span.arrived - span.begin)[LIKELY]
        if source is not None:
            travelled_s = np.minimum(waited_s, (source.sent - source.sending)[LIKELY])
            spent[_INDEX[ProjectedCause.HAND_OVER]] += travelled_s
            spent[_INDEX[ProjectedCause.PIPELINE_BUBBLE]] += waited_s - travelled_s
        of_graph = Cause.HEAD if self._by_stage else ProjectedCause.LAUNCH
        spent[_INDEX[of_graph]] += (span.launched - span.arrived)[LIKELY]
        table = LogTable(span.log, num_ranks)
        # Until a step could begin; a call's overhead in series is in an operation's seconds.
        launch_s = table.column("start") - table.column("begin")
        if self._by_stage:
            for stage in np.unique(table.stages):
                own = table.stages == stage
                cause = CAUSE_OF_STAGE[Stage(stage)]
                spent[_INDEX[cause]] += table.times[own] @ launch_s[own]
        else:
            spent[_INDEX[ProjectedCause.LAUNCH]] += table.times @ launch_s
        self._add_transfers(spent, span, table)
        flops, num_bytes = self._add_operations(spent, span, table)
        return _SpanCauses(spent, flops, num_bytes)

    def _add_transfers(self, spent: Floats, span: Span, table: LogTable) -> None:
        for done, blocked_s, times in zip(
            span.log.executed, table.blocked_s, table.times, strict=True
        ):
            groups = done.entry.groups
            if groups is None:
                continue
            posted = groups.largest(done.start[LIKELY])
            imbalance_s = np.clip(posted - done.wait[LIKELY], 0.0, blocked_s)
            spent[_INDEX[ProjectedCause.IMBALANCE]] += times * imbalance_s
            cause = CAUSE_OF_TRANSFER[done.entry.step.stage]
            spent[_INDEX[cause]] += times * (blocked_s - imbalance_s)

    def _add_operations(self, spent: Floats, span: Span, table: LogTable) -> tuple[float, float]:
        """Add a span's operations to `spent`; return their FLOPs and bytes read, of all ranks."""
        flops = num_bytes = 0.0
        took_s = table.column("end") - table.column("start")
        for done, of_rank_s, times in zip(span.log.executed, took_s, table.times, strict=True):
            entry = done.entry
            if not isinstance(entry.step, Operation):
                continue
            overhead_s = entry.overhead_s[LIKELY]
            work_s = entry.seconds[LIKELY] - overhead_s
            lost_s = np.maximum(of_rank_s - entry.seconds[LIKELY], 0.0)  # rounding
            if self._by_stage:  # all that a rank's clock sees in it
                cause = CAUSE_OF_STAGE[entry.step.stage]
                spent[_INDEX[cause]] += times * (work_s + overhead_s + lost_s)
            else:
                spent[_INDEX[ProjectedCause.LAUNCH]] += times * overhead_s
                spent[_INDEX[ProjectedCause.CONTENTION]] += times * lost_s
                for projected, share in cause_shares(entry.step, self._device, self._types):
                    spent[_INDEX[projected]] += times * work_s * share
            flops += times * float(entry.step.flops.sum())
            read = entry.step.weight_bytes.sum() + entry.step.kv_bytes.sum()
            num_bytes += times * float(read)
        return flops, num_bytes


def cause_shares(
    step: Operation, device: Device, types: NumberTypes
) -> list[tuple[ProjectedCause, Floats]]:
    """Shares [A] of an operation's time: bound by reading, split by bytes, or by computing.

    The weights' peak counts where the datasheet has none for the type that it computes in.
    """
    peak = device.flops_per_s.get(law_dtype(types, step), device.flops_per_s[types.weights])
    read = step.weight_bytes + step.kv_bytes
    is_reading = read / device.memory_bytes_per_s > step.flops / peak
    of_weights = np.where(is_reading, step.weight_bytes / np.maximum(read, 1), 0.0)
    of_cache = np.where(is_reading, step.kv_bytes / np.maximum(read, 1), 0.0)
    is_expert = step.stage is Stage.EXPERTS
    cause = ProjectedCause.EXPERT_COMPUTE if is_expert else ProjectedCause.OTHER_COMPUTE
    return [
        (ProjectedCause.WEIGHT_READS, of_weights),
        (ProjectedCause.KV_READS, of_cache),
        (cause, 1 - of_weights - of_cache),
    ]


def _split_idle(spent: list[Floats], idle: list[Floats]) -> None:
    """Split idle time: the least is the engine's, a stage's excess bubble, the rest imbalance."""
    least = min(float(of_stage.min()) for of_stage in idle)
    for of_causes, of_stage in zip(spent, idle, strict=True):
        of_causes[_INDEX[ProjectedCause.ENGINE]] += least
        of_causes[_INDEX[ProjectedCause.PIPELINE_BUBBLE]] += of_stage.min() - least
        of_causes[_INDEX[ProjectedCause.IMBALANCE]] += of_stage - of_stage.min()


def floor_s(programs: Sequence[StepProgram], device: Device, types: NumberTypes) -> float:
    """Lower bound on the seconds of these steps, however their layout is deployed.

    A micro-batch's way through all stages, or all micro-batches on the busiest stage; of each
    stage's busiest rank the larger of bytes read over bandwidth and FLOPs over peak.

    Args:
        programs: of steps in flight together.
    """
    least = np.concatenate(
        [
            [[_least_s(each, device, types) for each in of_stage] for of_stage in program.stages]
            for program in programs
        ],
        axis=1,
    )  # [pp, micro-batches]
    return float(max(least.sum(axis=0).max(), least.sum(axis=1).max()))


def _least_s(program: StageProgram, device: Device, types: NumberTypes) -> float:
    reading, computing = np.zeros((2, program.mesh.size))
    for step, num in program.distinct_steps():
        if isinstance(step, Operation):
            computing += num * step.flops / device.flops_per_s[step.dtype or types.weights]
            read = step.weight_bytes + step.kv_bytes
            reading += num * read / device.memory_bytes_per_s
    return float(np.maximum(reading, computing).max())


def basis_seconds(works: Sequence[Sequence[Sequence[StageWork]]]) -> tuple[Floats, float]:
    """Likely seconds of operations and transfers by basis, [num_bases], mean over ranks.

    Returns:
        These, and the part of them that is extrapolated.
    """
    by_basis, outside = np.zeros(len(Basis)), 0.0
    for work in works:
        for stage in (each for of_stage in work for each in of_stage):
            for block in (block for part in stage.parts for block in part):
                for timed in block.steps:
                    seconds = timed.times.seconds * len(block.layers)
                    by_basis[timed.times.basis] += float(seconds.mean())
                    outside += float((seconds * timed.times.is_extrapolated).mean())
    return by_basis, outside


def basis_shares(works: Sequence[Sequence[Sequence[StageWork]]]) -> tuple[dict[str, float], float]:
    """Shares of the likely seconds by basis, and the extrapolated share."""
    return shares_of(*basis_seconds(works))


def shares_of(basis_s: Floats, extrapolated_s: float) -> tuple[dict[str, float], float]:
    """Seconds as shares of their sum, by the label of a basis; zeros left out."""
    total = float(basis_s.sum()) or 1.0
    shares = {basis.label: float(basis_s[basis]) / total for basis in Basis if basis_s[basis]}
    return shares, extrapolated_s / total
