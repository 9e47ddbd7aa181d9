"""The operations of all ranks of a pipeline stage in a step, aligned with each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from expertlane.cost.step.operation import Floats, Ints, TransferKind
from expertlane.results.step_record import Action, RankOperations, RankRecord
from expertlane.spec.names import Stage

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
class _Ordered:
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
    def of(cls, operations: RankOperations) -> "_Ordered":
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
        ordered = [_Ordered.of(each) for each in operations]
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


def _side_by_side(ordered: Sequence[_Ordered]) -> list[Item]:
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
