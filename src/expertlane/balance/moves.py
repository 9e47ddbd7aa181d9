"""From one placement to the next: which experts move, from where, and which stay put."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertlane.balance.placement import Placement


@dataclass(frozen=True)
class Move:
    """A new copy of an expert.

    Attributes:
        layer: position in the list of placements.
        source, rank: expert-parallel ranks; equal where an expert only changes its slot.
        slot: of `rank`.
    """

    layer: int
    expert: int
    source: int
    rank: int
    slot: int


def keep_slots(now: Sequence[Placement], then: Sequence[Placement]) -> list[Placement]:
    """`then` with its slots in another order: what stays on a rank keeps its slot there.

    Only an expert whose slot is beyond the rank's new number of slots must change it.

    Args:
        now, then: [num_layers].
    """
    return [
        Placement(
            after.num_experts,
            tuple(
                _keep_slots_of_rank(old, new)
                for old, new in zip(before.experts_of_rank, after.experts_of_rank, strict=True)
            ),
        )
        for before, after in zip(now, then, strict=True)
    ]


def _keep_slots_of_rank(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    wanted = set(new)
    slots = [expert if expert in wanted else None for expert in old[: len(new)]]
    slots += [None] * (len(new) - len(slots))
    kept = set(slots)
    others = iter([expert for expert in new if expert not in kept])
    return tuple(next(others) if expert is None else expert for expert in slots)


def moves(now: Sequence[Placement], then: Sequence[Placement], ranks_per_node: int) -> list[Move]:
    """The copies that turn `now` into `then`, layer by layer, rank by rank.

    A copy comes from its own rank if the expert is there in another slot, else from a holder on
    the same node, else from any; among several from the one that has sent least so far.

    Args:
        now, then: [num_layers].
        ranks_per_node: consecutive ranks that share a node.
    """
    num_sent = [0] * (now[0].ep if now else 0)
    found = []
    for layer, (before, after) in enumerate(zip(now, then, strict=True)):
        holders = before.ranks_of_experts()
        for rank, experts in enumerate(after.experts_of_rank):
            old = before.experts_of_rank[rank]
            for slot, expert in enumerate(experts):
                if slot < len(old) and old[slot] == expert:
                    continue
                node = rank // ranks_per_node
                source = min(
                    holders[expert],
                    key=lambda r: (r != rank, r // ranks_per_node != node, num_sent[r], r),
                )
                num_sent[source] += source != rank
                found.append(Move(layer, expert, source, rank, slot))
    return found
