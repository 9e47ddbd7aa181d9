"""Programs of recorded steps, built again from their plans and priced by a profile's laws.

A program must match what ran exactly: the ranks' counters, and every collective in its order.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.execution import Execution, Terms
from expertlane.cost.laws.profile import Profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import Links, Pricing
from expertlane.cost.routing import GivenRouting
from expertlane.cost.stage_operations import Item, StageOperations
from expertlane.cost.step.operation import OUTSIDE, Ints, RankGroups, Transfer, TransferKind
from expertlane.cost.step.program import ProgramBuilder, Section, StageProgram, StepProgram
from expertlane.cost.step.totals import count
from expertlane.results.step_record import Action, RankCounts, RankRecord, StepRecord
from expertlane.schedule.plan import StepPlan
from expertlane.spec.names import Stage, Traffic

_COUNTED = ("flops", "weight_bytes", "kv_bytes", "sent_bytes", "num_collectives")
assert set(_COUNTED) <= {field.name for field in fields(RankCounts)}


@dataclass(frozen=True, eq=False)
class ComputeLaws:
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
