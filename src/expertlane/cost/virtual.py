"""Virtual time: recorded steps replayed as if each rank had its own core and a cluster's links.

A computation takes the CPU time that was measured; a transfer takes the time that the laws of the
links give for its bytes, times a scale. Ranks do the same operations in the same order however long
each takes, so the replay keeps the recorded order and dependencies. A step begins once all steps
that had ended before it was submitted have ended in virtual time. The launcher takes no time.

With `PricedRecording`, a profile's laws give the time of computing, and of the launcher between
steps.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import BOUNDS, LIKELY, Profile, Terms
from expertlane.cost.laws.times import Times, no_time
from expertlane.cost.pricing import Entry, forwarded_times, transfer_entry
from expertlane.cost.recorded_program import Item, PricedRecording, StageOperations
from expertlane.cost.replay import RecordedStep
from expertlane.cost.step.operation import (
    Floats,
    HandOver,
    Ints,
    Operation,
    OpKind,
    RankGroups,
    Transfer,
)
from expertlane.cost.timeline import (
    RecordedWork,
    StepTimes,
    Timeline,
    Work,
    rank_events,
    stage_seconds,
    transfer_seconds,
)
from expertlane.results.step_record import (
    Action,
    RankOperations,
    RankRecord,
    StepRecord,
    by_pipeline_stage,
)
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage


@dataclass(frozen=True)
class VirtualLinks:
    """The links of a virtual clock, which keeps three times: on links of three speeds.

    Attributes:
        profile: its laws give the seconds of a transfer; None where transfers take no time.
        scales: factors of those seconds: they multiply latency and divide bandwidth. The second
            is that of the ranks' records.
        byte_scale: factor of the bytes that were sent, before the laws are applied.
    """

    profile: Profile | None
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    byte_scale: float = 1.0


class ReplayedStep(NamedTuple):
    """A step in virtual time.

    Attributes:
        step: on links of the second scale, with the records of its ranks.
        by_scale: on links of each scale, without those records.
    """

    step: StepRecord
    by_scale: tuple[StepRecord, ...]


def undisturbed(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """Each run with the lesser CPU time, operation by operation, of itself and the run after it.

    The last is followed by the first. Runs of the same work do the same operations, and a
    disturbance only adds time. However many runs there are, each figure rests on two, so that those
    of deployments that ran more or less often can be compared.

    Args:
        steps: steps of one deployment.
    """
    runs = sorted({step.run for step in steps})
    following = zip(runs, [*runs[1:], *runs[:1]], strict=True)
    return _least_of(steps, {run: (other,) for run, other in following})


def without_each(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """Steps that stand in `undisturbed` when one run is left out, for each run.

    Under the left-out run's number: the run before it, with the lesser times of the run after it.

    """
    runs = sorted({step.run for step in steps})
    around = zip(runs, [*runs[-1:], *runs[:-1]], [*runs[1:], *runs[:1]], strict=True)
    found = []
    for left_out, before, after in around:
        of_two = [step for step in steps if step.run in (before, after)]
        found += [replace(each, run=left_out) for each in _least_of(of_two, {before: (after,)})]
    return found


def _least_of(steps: Sequence[StepRecord], others: Mapping[int, Sequence[int]]) -> list[StepRecord]:
    """Steps of some runs, each operation with its least CPU time over that run and others.

    A step whose operations differ from those of the same step in another run keeps its own times.

    Args:
        others: by run, the other runs; steps of runs that are not keys are left out.
    """
    at_place: dict[tuple[int, int, int], StepRecord] = {}
    place_of: dict[int, tuple[int, int]] = {}
    num_before: Counter[tuple[int, int]] = Counter()
    for step in sorted(steps, key=lambda step: (step.run, step.submitted_s)):
        place = step.replica, num_before[step.run, step.replica]
        num_before[step.run, step.replica] += 1
        at_place[step.run, *place], place_of[id(step)] = step, place
    return [
        _least(step, [at_place.get((o, *place_of[id(step)]), step) for o in others[step.run]])
        for step in steps
        if step.run in others
    ]


def _least(step: StepRecord, others: Sequence[StepRecord]) -> StepRecord:
    records = []
    for place, record in enumerate(step.records):
        own = record.operations
        its = [other.records[place].operations for other in others]
        if own is None or not all(each is not None and _is_same(own, each) for each in its):
            return step
        least = np.min([own.cpu_s, *(each.cpu_s for each in its if each is not None)], axis=0)
        records.append(replace(record, operations=replace(own, cpu_s=least)))
    return replace(step, records=tuple(records))


def _is_same(one: RankOperations, other: RankOperations) -> bool:
    names = "action", "stage", "layer", "micro_batch", "transfer", "sent_bytes"
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


class _ScaledLinks:
    """Implements `Links` for a virtual clock."""

    def __init__(self, links: VirtualLinks) -> None:
        self._model = None if links.profile is None else LinkModel(links.profile)
        self._scales = np.array(links.scales)[:, None]
        self._byte_scale = links.byte_scale

    def times(self, transfer: Transfer) -> Times:
        if self._model is None:
            return no_time(len(transfer.load.group_size))
        return self._scaled(self._model.times(self._larger(transfer)))

    def forwarded(self, between: Transfer, inside: Transfer) -> tuple[Times, Times]:
        if self._model is None:
            return self.times(between), self.times(inside)
        first, second = self._model.forwarded(self._larger(between), self._larger(inside))
        return self._scaled(first), self._scaled(second)

    def hand_over(self, hand_over: HandOver) -> Times:
        if self._model is None:
            return no_time(len(hand_over.sent_bytes))
        sent_bytes: Floats = hand_over.sent_bytes * np.float64(self._byte_scale)
        return self._scaled(self._model.hand_over(replace(hand_over, sent_bytes=sent_bytes)))

    def contention(self, transfer: Transfer, num_ranks: int) -> Floats | float:
        if self._model is None:
            return 0.0
        return self._model.contention(self._larger(transfer), num_ranks)

    def _larger(self, transfer: Transfer) -> Transfer:
        if self._byte_scale == 1:
            return transfer
        sent_bytes: Floats = transfer.sent_bytes * np.float64(self._byte_scale)
        return replace(transfer, sent_bytes=sent_bytes)

    def _scaled(self, times: Times) -> Times:
        return replace(times, bounds=self._scales * times.seconds)


@dataclass(eq=False)
class VirtualClock:
    """Replays the steps of one deployment, run by run.

    Args:
        ranks_per_node: consecutive ranks that share a node.
        laws: give the time of computing, in place of the measured CPU time.
    """

    layout: Layout
    num_layers: int
    links: VirtualLinks
    ranks_per_node: int
    laws: PricedRecording | None = None
    _groups: dict[object, RankGroups] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._links = _ScaledLinks(self.links)
        self._terms = Terms.free()
        if self.laws is not None:
            self._terms = self.laws.terms
            self._pricing = self.laws.pricing(self._links)

    def replay(self, steps: Sequence[StepRecord]) -> list[ReplayedStep]:
        """The steps in virtual time, in the given order; each run starts at 0 s.

        Args:
            steps: in any order; their plans asked for `record_operations`.

        Raises:
            ValueError: a step has no operations, the ranks of a stage did not do the same
                operations, or the steps that `laws` describe are not those that ran.
        """
        chains: dict[tuple[int, int], list[StepRecord]] = defaultdict(list)
        for step in steps:
            chains[step.run, step.replica].append(step)
        replayed: dict[int, ReplayedStep] = {}
        for chain in chains.values():
            self._chain(chain, replayed)
        return [replayed[id(step)] for step in steps]

    def _chain(self, steps: Sequence[StepRecord], replayed: dict[int, ReplayedStep]) -> None:
        """Replay the steps of a replica in one run."""
        layout, terms = self.layout, self._terms
        timeline = Timeline(terms, layout.pp, layout.stage_size)
        ordered = sorted(steps, key=lambda step: step.submitted_s)
        ends: list[tuple[float, Floats]] = []  # measured and virtual, of the steps so far
        plan_s = np.zeros(len(BOUNDS))  # when the plan of the step before was sent
        for step in ordered:
            before = [end_s for measured_s, end_s in ends if measured_s <= step.submitted_s]
            begin_s = np.max([plan_s, *before], axis=0)
            plan_s = begin_s + terms.step_s(layout)
            times = timeline.run(self._work(step), plan_s, may_skip=False)
            ends.append((step.finished_s, times.end_s))
            by_scale = [
                replace(step, submitted_s=float(begin), finished_s=float(end), records=())
                for begin, end in zip(begin_s, times.end_s, strict=True)
            ]
            likely = replace(by_scale[LIKELY], records=self._records(step, times))
            replayed[id(step)] = ReplayedStep(likely, tuple(by_scale))

    def _records(self, step: StepRecord, times: StepTimes) -> tuple[RankRecord, ...]:
        # The time before a step counts if it counted when the step was measured.
        count_idle = any(record.blocked_s[..., Stage.IDLE].any() for record in step.records)
        of_stages = stage_seconds(times, self.num_layers, count_idle=count_idle)
        events = rank_events(times) if any(r.events is not None for r in step.records) else {}
        in_flight = [transfer_seconds(spans) for spans in times.spans]
        records = []
        for record in step.records:
            at = self.layout.coordinates(record.rank)
            place = at.dp_rank * self.layout.tp + at.tp_rank
            seconds = of_stages[at.pp_rank]
            records.append(
                replace(
                    record,
                    wall_s=seconds.wall_s[place],
                    blocked_s=seconds.blocked_s[place],
                    waits=None,
                    events=events.get((at.pp_rank, place)),
                    operations=None,
                    transfers_s=in_flight[at.pp_rank][:, place],
                )
            )
        return tuple(records)

    def _work(self, step: StepRecord) -> Sequence[Sequence[Work]]:
        """[num_stages][num_micro_batches]."""
        if self.laws is not None:
            return self._pricing.work(self.laws.program(step))
        by_stage = by_pipeline_stage(self.layout, step)
        work = []
        for pp_rank in range(self.layout.pp):
            records = sorted(by_stage[pp_rank], key=lambda record: record.rank)
            stage = StageOperations.of(records, step.num_micro_batches)
            is_last = pp_rank == self.layout.pp - 1
            work.append(self._micro_batches(stage, step.num_micro_batches, is_last=is_last))
        return work

    def _micro_batches(
        self, stage: StageOperations, num: int, *, is_last: bool
    ) -> list[RecordedWork]:
        before: list[list[RecordedStep]] = [[] for _ in range(num)]
        steps: list[list[RecordedStep]] = [[] for _ in range(num)]
        priced = self._priced(stage)
        for item in stage.items:
            own = steps[item.micro_batch]
            match item.action:
                case Action.ARRIVE:
                    before[item.micro_batch], steps[item.micro_batch] = own, []
                case Action.COMPUTE:
                    own.append(RecordedStep(_computation(item), item.layer))
                case Action.POST:
                    own.append(RecordedStep(priced[item.transfer], item.layer, item.transfer))
                case Action.WAIT:
                    own.append(RecordedStep(None, item.layer, item.transfer))
        return [
            RecordedWork(before[at], steps[at], None if is_last else self._hand_over(stage, at))
            for at in range(num)
        ]

    def _hand_over(self, stage: StageOperations, micro_batch: int) -> Times:
        there = (stage.ranks + self.layout.stage_size) // self.ranks_per_node
        is_remote = there != stage.ranks // self.ranks_per_node
        sent_bytes = stage.handed_over[micro_batch]
        return self._links.hand_over(HandOver(sent_bytes, is_remote))

    def _priced(self, stage: StageOperations) -> list[Entry]:
        """[M]; every collective with its seconds."""
        links, groups = self._links, [self._groups_of(stage, of) for of in stage.first_ranks]
        transfers = [
            Transfer(kind, item.stage, of_ranks, sent[None])
            for item, kind, of_ranks, sent in zip(
                stage.posts, stage.kinds, groups, stage.sent_bytes, strict=True
            )
        ]
        forwarded: dict[int, Times] = {}
        by_layer: dict[object, list[Transfer]] = defaultdict(list)
        for item, transfer in zip(stage.posts, transfers, strict=True):
            by_layer[item.micro_batch, item.layer].append(transfer)
        for of_layer in by_layer.values():
            forwarded |= forwarded_times(links, of_layer)
        return [
            transfer_entry(
                each,
                forwarded.get(id(each)) or links.times(each),
                float(np.max(links.contention(each, len(stage.ranks)))),
            )
            for each in transfers
        ]

    def _groups_of(self, stage: StageOperations, first_ranks: Ints) -> RankGroups:
        key = int(stage.ranks[0]), first_ranks.tobytes()
        if key not in self._groups:
            self._groups[key] = RankGroups(first_ranks, stage.ranks // self.ranks_per_node)
        return self._groups[key]


def _computation(item: Item) -> Entry:
    none = np.zeros(len(item.cpu_s), dtype=np.int64)
    step = Operation(OpKind.MEMORY, item.stage, {"bytes": 0.0}, none, none, none)
    zero = np.zeros((len(BOUNDS), 1))
    seconds = np.broadcast_to(item.cpu_s, (len(BOUNDS), len(item.cpu_s)))
    return Entry(step, seconds, None, zero, None, 0, zero, zero)
