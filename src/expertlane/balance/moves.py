"""From one placement to the next: which experts move, from where, and which stay put."""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from expertlane.balance.placement import Placement

WHOLE = 1 << 20  # parts that a whole expert counts as
_AHEAD = 512  # parts that are looked at for a slice


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


@dataclass(frozen=True)
class Part:
    """A part of an expert that moves, cut alike on all ranks that have a slice of it.

    Attributes:
        begin, end: its bounds, in units of 1 / `WHOLE` of the expert.
    """

    move: Move
    begin: int = 0
    end: int = WHOLE


def between_ranks(needed: Sequence[Move]) -> list[Move]:
    """Moves from one rank to another; the others only change a slot."""
    return [move for move in needed if move.source != move.rank]


def next_slice(waiting: deque[Part], most: int) -> list[Part]:
    """Take parts of which no rank sends or receives more than `most` of `WHOLE`.

    First come those that wait first; others pass them where their ranks have no room left.

    Args:
        waiting: in their order; the rest of what was cut stays in its place.
        most: above 0.
    """
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    taken, left = [], []
    for _ in range(min(len(waiting), _AHEAD)):
        part = waiting.popleft()
        room = most - max(sent[part.move.source], received[part.move.rank])
        if room <= 0:
            left.append(part)
            continue
        end = min(part.end, part.begin + room)
        taken.append(replace(part, end=end))
        sent[part.move.source] += end - part.begin
        received[part.move.rank] += end - part.begin
        if end < part.end:
            left.append(replace(part, begin=end))
    waiting.extendleft(reversed(left))
    return taken


def most_of_a_rank(parts: Sequence[Part]) -> int:
    """The most that any rank sends or receives, in units of 1 / `WHOLE` of an expert."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for part in parts:
        sent[part.move.source] += part.end - part.begin
        received[part.move.rank] += part.end - part.begin
    return max([*sent.values(), *received.values()], default=0)


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


def moves(
    now: Sequence[Placement],
    then: Sequence[Placement],
    ranks_per_node: int,
    living: Collection[int] | None = None,
) -> list[Move]:
    """The copies that turn `now` into `then`, layer by layer, rank by rank.

    A copy comes from its own rank if the expert is there in another slot, else from a holder on
    the same node, else from any; among several from the one that has sent least so far. An expert
    that no living rank holds is left out.

    Args:
        now, then: [num_layers].
        ranks_per_node: consecutive ranks that share a node.
        living: ranks that still hold their experts; None for all.
    """
    num_sent = [0] * (now[0].ep if now else 0)
    found = []
    for layer, (before, after) in enumerate(zip(now, then, strict=True)):
        holders = before.ranks_of_experts()
        live = range(before.ep) if living is None else living
        if len(live) < before.ep:
            holders = [[rank for rank in ranks if rank in live] for ranks in holders]
        for rank, experts in enumerate(after.experts_of_rank):
            old = before.experts_of_rank[rank] if rank in live else ()
            for slot, expert in enumerate(experts):
                if not holders[expert] or (slot < len(old) and old[slot] == expert):
                    continue
                node = rank // ranks_per_node
                source = min(
                    holders[expert],
                    key=lambda r: (r != rank, r // ranks_per_node != node, num_sent[r], r),
                )
                num_sent[source] += source != rank
                found.append(Move(layer, expert, source, rank, slot))
    return found
