"""Which experts an expert-parallel rank holds, and the moves from one placement to the next."""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Ints, pack, share_of_ranks
from expertlane.errors import SpecError
from expertlane.spec.layout import partition


@dataclass(frozen=True)
class Placement:
    """The physical experts of one layer, by expert-parallel rank.

    A *physical* expert is a slot of a rank; several may hold the same *logical* expert, and the
    number of slots may differ between ranks.

    Attributes:
        num_experts: logical experts.
        experts_of_rank: [ep][slots of that rank]; the logical expert in each slot.

    Raises:
        SpecError: an expert is nowhere, twice on one rank or unknown, or a rank has none.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.num_experts > self.num_slots:  # first: below, `num_experts` costs memory
            raise SpecError(
                f"placement: {self.num_experts:,} experts, but {self.num_slots:,} slots on "
                f"{self.ep} ep ranks; each expert needs one"
            )
        held: set[int] = set()
        for rank, experts in enumerate(self.experts_of_rank):
            if not experts:
                raise SpecError(f"placement: ep rank {rank} holds no expert")
            unknown = [expert for expert in experts if not 0 <= expert < self.num_experts]
            if unknown:
                raise SpecError(
                    f"placement: ep rank {rank} holds expert {unknown[0]}; "
                    f"there are experts 0 to {self.num_experts - 1}"
                )
            if len(set(experts)) < len(experts):
                twice = next(expert for expert in experts if experts.count(expert) > 1)
                raise SpecError(f"placement: ep rank {rank} holds expert {twice} twice")
            held.update(experts)
        if len(held) < self.num_experts:
            missing = min(set(range(self.num_experts)) - held)
            raise SpecError(f"placement: no ep rank holds expert {missing}")

    @classmethod
    def linear(cls, num_experts: int, ep: int, num_redundant: int = 0) -> "Placement":
        """Consecutive experts on each rank, near-equal in number.

        After the last expert the first ones follow again, as redundant copies. With more ranks
        than experts, copies fill the ranks.

        Raises:
            SpecError: some rank would hold an expert twice.
        """
        ranks = partition_slots(num_experts, ep, num_redundant)
        return cls(
            num_experts, tuple(tuple(slot % num_experts for slot in slots) for slots in ranks)
        )

    @classmethod
    def round_robin(cls, num_experts: int, ep: int, num_redundant: int = 0) -> "Placement":
        """Expert e on rank e mod ep; redundant copies go on in the same order.

        A copy passes over ranks that hold its expert. Each rank has as many slots as in `linear`.

        Raises:
            SpecError: some rank would hold an expert twice.
        """
        room = [len(slots) for slots in partition_slots(num_experts, ep, num_redundant)]
        # Of experts with equal load the packer gives each rank in turn one.
        slots = pack(
            np.arange(sum(room))[None] % num_experts, np.ones((1, num_experts)), np.array([room])
        )
        return cls.of_table(num_experts, slots[0])

    @classmethod
    def of_table(cls, num_experts: int, slots: Ints) -> "Placement":
        """The placement in a table of slots.

        Args:
            slots: [ep, most slots]; experts, then EMPTY.
        """
        return cls(num_experts, tuple(tuple(rank[rank != EMPTY].tolist()) for rank in slots))

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return len(self.experts_of_rank)

    @cached_property
    def num_slots(self) -> int:
        """Physical experts of all ranks."""
        return sum(map(len, self.experts_of_rank))

    def slots(self) -> Ints:
        """[ep, num_experts]; the slot in which a rank holds an expert, -1 where it does not."""
        table = np.full((self.ep, self.num_experts), -1, dtype=np.int64)
        for rank, experts in enumerate(self.experts_of_rank):
            table[rank, list(experts)] = np.arange(len(experts))
        return table

    def ranks_of_experts(self) -> list[list[int]]:
        """[num_experts][copies]; the ranks that hold each expert, ascending."""
        ranks: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in experts:
                ranks[expert].append(rank)
        return ranks

    def rank_loads(
        self, load: Sequence[float] | npt.NDArray[np.number], ranks_per_node: int
    ) -> npt.NDArray[np.float64]:
        """[ep]; the load of each rank if tokens are spread evenly over the ranks that send them.

        Senders choose among copies as the engine's do: see `packing.share_of_ranks`. Of an expert
        with few pairs in a batch, the copies that come first in turn get more than is told here.

        Args:
            load: [num_experts].
            ranks_per_node: consecutive ranks that share a node; the last node may have fewer.
        """
        share = share_of_ranks(self.slots().T >= 0, ranks_per_node)
        loads: npt.NDArray[np.float64] = np.asarray(load, dtype=np.float64) @ share
        return loads


def rank_loads(
    placements: Sequence[Placement], load: npt.NDArray[np.number], ranks_per_node: int
) -> npt.NDArray[np.float64]:
    """[num_layers, ep]; `Placement.rank_loads` of each layer.

    Args:
        load: [num_layers, num_experts].
    """
    return np.stack(
        [
            placed.rank_loads(of_layer, ranks_per_node)
            for placed, of_layer in zip(placements, load, strict=True)
        ]
    )


def max_over_mean(num_tokens: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    """Load imbalance along the last axis: the fullest over the mean; 1 is even, 0 is no load.

    Args:
        num_tokens: [..., num_experts or num_ranks].
    """
    mean = num_tokens.mean(axis=-1)
    fullest = num_tokens.max(axis=-1)
    ratio: npt.NDArray[np.float64] = np.divide(
        fullest, mean, out=np.zeros_like(mean), where=mean > 0
    )
    return ratio


def total_max_over_mean(num_tokens: npt.NDArray[np.number]) -> float:
    """Sum over layers of the fullest ranks over the sum of the means; 0 without tokens.

    Args:
        num_tokens: [num_layers, num_ranks].
    """
    mean = float(num_tokens.mean(axis=1).sum())
    return float(num_tokens.max(axis=1).sum()) / mean if mean else 0.0


def partition_slots(num_experts: int, ep: int, num_redundant: int) -> tuple[range, ...]:
    """The slots of each rank, near-equal in number, the longer ones first; every rank has one.

    Raises:
        SpecError: some rank would hold an expert twice.
    """
    num_slots = max(num_experts + num_redundant, ep)
    if num_slots > num_experts * ep:
        most = num_experts * ep - num_experts
        raise SpecError(
            f"{num_slots} physical experts on {ep} rank{'s' * (ep > 1)}: a rank holds each of the "
            f"{num_experts} experts at most once, so at most {most} can be redundant"
        )
    return partition(num_slots, ep)


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


def most_of_a_rank(parts: Iterable[Part]) -> int:
    """The most that any rank sends or receives, in units of 1 / `WHOLE` of an expert."""
    busy: Counter[tuple[str, int]] = Counter()
    for part in parts:
        for end in (("sends", part.move.source), ("receives", part.move.rank)):
            busy[end] += part.end - part.begin
    return max(busy.values(), default=0)


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
