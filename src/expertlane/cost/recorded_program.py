"""Programs of recorded steps, built again from their plans and priced by a profile's laws.

A program must match what ran exactly: the ranks' counters, and every collective in its order.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile import Execution, Profile, Terms
from expertlane.cost.pricing import Links, Pricing
from expertlane.cost.routing import GivenRouting
from expertlane.cost.step.operation import (
    OUTSIDE,
    Floats,
    Ints,
    NumberTypes,
    RankGroups,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.program import ProgramBuilder, Section, StageProgram, StepProgram, count
from expertlane.results.step_record import (
    Action,
    RankCounts,
    RankOperations,
    RankRecord,
    StepRecord,
)
from expertlane.schedule.plan import StepPlan
from expertlane.spec.names import Stage, Traffic

_KINDS = list(TransferKind)
_SEND = _KINDS.index(TransferKind.SEND)
_Place = tuple[int, int, int]  # stage, layer, micro-batch


class Item(NamedTuple):
    """An operation that all R ranks of the stage did.

    Attributes:
        layer: hidden layer, or `OUTSIDE`.
        transfer: index of the collective that a post or a wait refers to; else -1.
        cpu_s: [R]; CPU seconds of a computation, else 0.
    """

    action: Action
    stage: Stage
    layer: int
    micro_batch: int
    transfer: int
    cpu_s: Floats


@dataclass(eq=False)
class _ActionOrder:
    """One rank's collectives, waits and arrivals in order, and what it computed between them.

    Attributes:
        actions: [K]; action, place, index of the collective, and its kind if the action posts it.
        computed: [K + 1]; CPU seconds by place, before each action and after the last.
        collectives: indices, in the rank's record, of transfers other than sends.
    """

    actions: list[tuple[int, _Place, int, int]] = field(default_factory=list)
    computed: list[dict[_Place, float]] = field(default_factory=lambda: [{}])
    collectives: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, operations: RankOperations) -> "_ActionOrder":
        ordered = cls()
        numbers: dict[int, int] = {}
        for action, stage, layer, micro_batch, cpu_s, transfer in zip(
            operations.action.tolist(),
            operations.stage.tolist(),
            operations.layer.tolist(),
            operations.micro_batch.tolist(),
            operations.cpu_s.tolist(),
            operations.transfer.tolist(),
            strict=True,
        ):
            place, kind = (stage, layer, micro_batch), -1
            if action == Action.COMPUTE:
                here = ordered.computed[-1]
                here[place] = here.get(place, 0.0) + cpu_s
                continue
            if action == Action.POST:
                kind = int(operations.kind[transfer])
                if kind == _SEND:
                    continue  # not all ranks have something to send
                numbers[transfer] = len(numbers)
                ordered.collectives.append(transfer)
            ordered.actions.append((action, place, numbers.get(transfer, -1), kind))
            ordered.computed.append({})
        return ordered


@dataclass(frozen=True, eq=False)
class StageOperations:
    """A step of the R ranks of a pipeline stage, with M collectives.

    Attributes:
        ranks: [R]; global ranks.
        items: in the order in which every rank did them.
        posts: [M]; the items that start a collective.
        kinds: [M]; of the collectives.
        first_ranks: [M, R]; the lowest global rank of each rank's group.
        sent_bytes: [M, R, R]; by source and destination within the stage.
        handed_over: [num_micro_batches, R]; bytes sent to the next stage.
    """

    ranks: Ints
    items: list[Item]
    posts: list[Item]
    kinds: list[TransferKind]
    first_ranks: Ints
    sent_bytes: Ints
    handed_over: Ints

    @classmethod
    def of(cls, records: Sequence[RankRecord], num_micro_batches: int) -> "StageOperations":
        """Align the operations of the ranks.

        Args:
            records: records of all ranks of the stage, in rank order.

        Raises:
            ValueError: a rank has no operations, or its transfers differ from the others'.
        """
        operations = [_operations_of(record) for record in records]
        ordered = [_ActionOrder.of(each) for each in operations]
        first = ordered[0]
        for record, each in zip(records, ordered, strict=True):
            if each.actions != first.actions:
                raise ValueError(
                    f"rank {record.rank} did other transfers than rank {records[0].rank}"
                )
        ranks = np.array([record.rank for record in records])
        chosen = [each.collectives for each in ordered]
        pairs = list(zip(operations, chosen, strict=True))
        items = _side_by_side(ordered)
        return cls(
            ranks=ranks,
            items=items,
            posts=[item for item in items if item.action is Action.POST],
            kinds=[_KINDS[kind] for kind in operations[0].kind[first.collectives]],
            first_ranks=np.stack([each.first_rank[own] for each, own in pairs], axis=1),
            sent_bytes=np.stack([each.sent_bytes[own][:, ranks] for each, own in pairs], axis=1),
            handed_over=np.stack(
                [_handed_over(each, num_micro_batches) for each in operations], axis=1
            ),
        )


def _operations_of(record: RankRecord) -> RankOperations:
    if record.operations is None:
        raise ValueError(f"rank {record.rank} has no operations: its plan did not ask for them")
    return record.operations


def _side_by_side(ordered: Sequence[_ActionOrder]) -> list[Item]:
    items = []
    nothing = np.zeros(len(ordered))
    for number, computed in enumerate(zip(*(each.computed for each in ordered), strict=True)):
        for place in dict.fromkeys(place for of_rank in computed for place in of_rank):
            cpu_s = np.array([of_rank.get(place, 0.0) for of_rank in computed])
            items.append(_item(Action.COMPUTE, place, -1, cpu_s))
        if number < len(ordered[0].actions):
            action, place, transfer, _ = ordered[0].actions[number]
            items.append(_item(Action(action), place, transfer, nothing))
    return items


def _item(action: Action, place: _Place, transfer: int, cpu_s: Floats) -> Item:
    stage, layer, micro_batch = place
    return Item(action, Stage(stage), layer, micro_batch, transfer, cpu_s)


def _handed_over(operations: RankOperations, num_micro_batches: int) -> Ints:
    """[num_micro_batches]."""
    sent = np.zeros(num_micro_batches, dtype=np.int64)
    is_send = operations.action == Action.POST
    is_send[is_send] = operations.kind[operations.transfer[is_send]] == _SEND
    num_bytes = operations.sent_bytes[operations.transfer[is_send]].sum(axis=1)
    np.add.at(sent, operations.micro_batch[is_send], num_bytes)
    return sent


_COUNTED = ("flops", "weight_bytes", "kv_bytes", "sent_bytes", "num_collectives")
assert set(_COUNTED) <= {field.name for field in fields(RankCounts)}


@dataclass(frozen=True, eq=False)
class PricedRecording:
    """A profile's laws as the time of computing in the recorded steps of one deployment.

    Attributes:
        builder: builder for the deployment as it ran: its dispatch table, placements and types.
        plans: of the steps; they asked for `record_operations` and `record_routing`, and no
            sequence asked for more than its likeliest token.
        profile: profile of the device that computes.
        types: number types by which its laws are looked up.
    """

    builder: ProgramBuilder
    plans: Mapping[StepRecord, StepPlan]
    profile: Profile
    types: NumberTypes
    execution: Execution = Execution.GRAPH

    @property
    def terms(self) -> Terms:
        """Seconds of launches, and between steps.

        Raises:
            UserError: the profile lacks one of them.
        """
        return Terms.of(self.profile, self.execution).only_likely

    def pricing(self, links: Links) -> Pricing:
        """Prices of computing, at its likely time, and of transfers over `links`."""
        return Pricing(self.profile, self.types, links, only_likely=True)

    def program(self, step: StepRecord) -> StepProgram:
        """Build the program of a step from its plan and recorded routing, and check it.

        Raises:
            ValueError: the program is not what ran, or the plan did not ask for the routing.
        """
        plan = self.plans[step]
        records = sorted(step.records, key=lambda record: record.rank)
        if not plan.record_routing and any(each is not None for each in self.builder.placements):
            raise ValueError(f"step {plan.step}: its plan did not ask for the routing")
        routing = GivenRouting([record.topk_ids for record in records])
        program = self.builder.build(plan, routing)
        model = self.builder.model
        counted = count(program, model.num_hidden_layers, model.num_experts)
        for record, emitted in zip(records, counted, strict=True):
            _compare_counts(plan.step, record, emitted)
        size = self.builder.layout.stage_size
        for pp_rank, of_stage in enumerate(program.stages):
            of_ranks = records[pp_rank * size : (pp_rank + 1) * size]
            _compare_stage(plan.step, StageOperations.of(of_ranks, len(of_stage)), of_stage)
        return program


def _compare_counts(step: int, record: RankRecord, emitted: RankCounts) -> None:
    for name in _COUNTED:
        ran, counted = (np.asarray(getattr(each, name)) for each in (record, emitted))
        if (ran != counted).any():
            place = tuple(np.argwhere(np.atleast_1d(ran != counted))[0].tolist())
            raise ValueError(
                f"step {step}, rank {record.rank}: {_words(name, place)}: "
                f"{np.atleast_1d(ran)[place]:,} were recorded, {np.atleast_1d(counted)[place]:,} "
                "are emitted"
            )


def _words(name: str, place: tuple[int, ...]) -> str:
    """Name a counter's entry for an error message."""
    what = name.replace("_", " ")
    if name == "kv_bytes":
        return what
    what = f"{what} in {Stage(place[0]).label}"
    if name == "sent_bytes":
        what += f", {Traffic(place[1]).name.lower()} to rank {place[2]}"
    return what


class _Event(NamedTuple):
    """A collective is posted or waited for.

    Attributes:
        number: index of the collective in its micro-batch.
        first_ranks: [R]; the lowest rank of each rank's group, counted within the stage.
        sent_bytes: [R, R]; by source and destination.
    """

    action: Action
    number: int
    kind: TransferKind
    stage: Stage
    layer: int
    first_ranks: Ints
    sent_bytes: Ints

    def __str__(self) -> str:
        layer = "" if self.layer == OUTSIDE else f" of layer {self.layer}"
        what = "begin" if self.action is Action.POST else "wait for"
        groups = len(np.unique(self.first_ranks))
        return (
            f"{what} {self.kind} {self.number} in {self.stage.label}{layer}, {groups} groups, "
            f"{self.sent_bytes.sum():,} bytes"
        )

    def is_like(self, other: "_Event") -> bool:
        """True if all fields are equal."""
        return (
            self[:5] == other[:5]
            and np.array_equal(self.first_ranks, other.first_ranks)
            and np.array_equal(self.sent_bytes, other.sent_bytes)
        )


def _compare_stage(step: int, ran: StageOperations, emitted: Sequence[StageProgram]) -> None:
    recorded: list[list[_Event]] = [[] for _ in emitted]
    numbers: dict[int, int] = {}
    for item in ran.items:
        if item.action in (Action.POST, Action.WAIT):
            of_micro_batch = recorded[item.micro_batch]
            if item.action is Action.POST:
                numbers[item.transfer] = sum(each.action is Action.POST for each in of_micro_batch)
            of_micro_batch.append(_recorded(ran, item, numbers[item.transfer]))
    for micro_batch, (program, events) in enumerate(zip(emitted, recorded, strict=True)):
        place = f"step {step}, ranks {ran.ranks[0]} to {ran.ranks[-1]}, micro-batch {micro_batch}"
        sequence = list(_emitted(program.parts))
        for number, (was, event) in enumerate(zip(events, sequence, strict=False)):
            if not was.is_like(event):
                raise ValueError(f"{place}, event {number}: recorded: {was}; emitted: {event}")
        if len(events) != len(sequence):
            num = f"{len(events)} events were recorded, {len(sequence)} are emitted"
            raise ValueError(f"{place}: {num}")
        sent = 0 if program.hand_over is None else program.hand_over.sent_bytes
        if (ran.handed_over[micro_batch] != sent).any():
            raise ValueError(
                f"{place}: {ran.handed_over[micro_batch].tolist()} bytes were handed over, "
                f"{np.broadcast_to(sent, ran.ranks.shape).tolist()} are emitted"
            )


def _recorded(ran: StageOperations, item: Item, number: int) -> _Event:
    transfer = item.transfer
    return _Event(
        item.action,
        number,
        ran.kinds[transfer],
        item.stage,
        item.layer,
        ran.first_ranks[transfer] - ran.ranks[0],
        ran.sent_bytes[transfer],
    )


def _emitted(parts: Sequence[Sequence[Section]]) -> Iterator[_Event]:
    """The events of a micro-batch, in the order of the replay: parts switch at every wait."""
    queue: deque[tuple[Iterator[tuple[int, Transfer]], _Event | None]] = deque(
        (_transfers(part), None) for part in parts
    )
    number = 0
    while queue:
        transfers, pending = queue.popleft()
        if pending is not None:
            yield pending._replace(action=Action.WAIT)
        following = next(transfers, None)
        if following is not None:
            layer, transfer = following
            groups = transfer.groups
            assert isinstance(groups, RankGroups), "of all ranks"
            _, first, place = np.unique(groups.group, return_index=True, return_inverse=True)
            posted = _Event(
                Action.POST,
                number,
                transfer.kind,
                transfer.stage,
                layer,
                first[place],
                transfer.sent_bytes.sum(axis=0),
            )
            yield posted
            number += 1
            queue.append((transfers, posted))


def _transfers(part: Sequence[Section]) -> Iterator[tuple[int, Transfer]]:
    for section in part:
        for step in section.steps:
            if isinstance(step, Transfer):
                yield section.layer, step
