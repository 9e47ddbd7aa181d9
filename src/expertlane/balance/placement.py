"""Placements of experts on ranks, and the moves between two.

First: how many copies each expert has, and their packing onto ranks: greedy, all layers at once.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError
from expertlane.spec.layout import partition

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EMPTY = -1  # in a table of slots or items: there is none


def num_copies(load: Floats, num_slots: int, valid: Ints) -> Ints:
    """[num_layers, num_experts]; extra copies go to the expert with most load per copy.

    It gets as many at once as it takes to the next valid number. Where too few are left for
    that, others get them; if that is so for all, numbers are valid that were not.

    Args:
        load: [num_layers, num_experts].
        num_slots: copies of all experts of a layer, num_experts to num_experts x ep.
        valid: numbers of copies, from 1 to ep, rising.
    """
    rows = np.arange(len(load))
    copies = np.ones(load.shape, dtype=np.int64)
    per_copy = load.copy()
    left = np.full(len(load), num_slots - load.shape[1])
    most = int(valid[-1])
    ahead = valid[np.searchsorted(valid, np.arange(most) + 1)] - np.arange(most)
    ahead = np.append(ahead, num_slots + 1)  # nothing comes after the last
    steps = ahead[copies]
    while left.any():
        can = steps <= left[:, None]
        is_stuck = ~can.any(axis=1)
        can[is_stuck] = copies[is_stuck] < most
        chosen = np.where(can, per_copy, -np.inf).argmax(axis=1)
        more = np.minimum(np.where(is_stuck, 1, steps[rows, chosen]), left)
        copies[rows, chosen] += more
        left -= more
        count = copies[rows, chosen]
        per_copy[rows, chosen] = load[rows, chosen] / count
        steps[rows, chosen] = ahead[count]
    return copies


def pack(items: Ints, per_copy: Floats, capacity: Ints, num_nodes: int = 1) -> Ints:
    """Put copies on ranks: heaviest first, each on the least loaded that has room and lacks it.

    This is the longest-processing-time rule (R. L. Graham, 1969) under a count of slots. Where
    there is room, each expert has equally many copies on all nodes that hold it, and as many such
    nodes as that allows.

    Args:
        items: [num_layers, num_items]; the expert of each copy; EMPTY at the end of shorter rows.
        per_copy: [num_layers, num_experts]; the load of each copy of an expert.
        capacity: [num_layers, num_ranks]; the slots of each rank, in all as many as the items,
            differing within a layer by at most one; no expert has more copies than ranks.
        num_nodes: equal numbers of consecutive ranks.

    Returns:
        [num_layers, num_ranks, most slots]; experts, then EMPTY.
    """
    num_layers, num_ranks = capacity.shape
    rows = np.arange(num_layers)
    weight = np.where(items == EMPTY, -np.inf, np.take_along_axis(per_copy, items, axis=1))
    items = np.take_along_axis(items, np.argsort(-weight, axis=1, kind="stable"), axis=1)
    slots = np.full((num_layers, num_ranks, int(capacity.max(initial=0))), EMPTY, dtype=np.int64)
    holds = np.zeros((num_layers, num_ranks, per_copy.shape[1]), dtype=bool)
    num_held = np.zeros_like(capacity)
    loads = np.zeros(capacity.shape)
    wanted_nodes = nodes_of_copies(num_nodes, num_ranks // num_nodes)
    copies = np.zeros(per_copy.shape, dtype=np.int64)
    np.add.at(copies, (rows[:, None], items), items != EMPTY)
    for expert in items.T:
        is_held, num = holds[rows, :, expert], copies[rows, expert]
        fits = (num_held < capacity) & ~is_held
        if num_nodes > 1 and (num > 1).any():
            on_node = is_held.reshape(num_layers, num_nodes, -1).sum(axis=2)
            fits = _where_shares_stay_even(fits, on_node, num, wanted_nodes[num])
        rank = np.where(fits, loads, np.inf).argmin(axis=1)
        placed = fits[rows, rank]
        for row in np.nonzero(~placed & (expert != EMPTY))[0]:
            _exchange_in(slots[row], capacity[row], holds[row], int(expert[row]))
            num_held[row] = (slots[row] != EMPTY).sum(axis=1)
            loads[row] = holds[row] @ per_copy[row]
        at = np.nonzero(placed & (expert != EMPTY))[0]
        slots[at, rank[at], num_held[at, rank[at]]] = expert[at]
        holds[at, rank[at], expert[at]] = True
        num_held[at, rank[at]] += 1
        loads[at, rank[at]] += per_copy[at, expert[at]]
    return slots


def nodes_of_copies(num_nodes: int, ranks_per_node: int) -> Ints:
    """[ep + 1]; by number of copies, the most nodes that hold equally many; 0 for no copy."""
    counts, nodes = np.arange(num_nodes * ranks_per_node + 1)[:, None], np.arange(1, num_nodes + 1)
    can = (counts % nodes == 0) & (counts // nodes <= ranks_per_node)
    most: Ints = np.where(can, nodes, 0).max(axis=1)
    return most


def _where_shares_stay_even(fits: Bools, on_node: Ints, copies: Ints, num_nodes: Ints) -> Bools:
    """[num_layers, num_ranks]; ranks of `fits` on nodes short of copies, else all of `fits`.

    Args:
        on_node: [num_layers, num_nodes]; copies there already, of `copies` in all.
        num_nodes: [num_layers]; nodes that the copies belong on; 0 for all.
    """
    num_nodes = np.where(num_nodes, num_nodes, on_node.shape[1])[:, None]
    has_begun = on_node > 0
    is_short = on_node < -(-copies[:, None] // num_nodes)
    is_short &= has_begun | (has_begun.sum(axis=1, keepdims=True) < num_nodes)
    wanted = fits & np.repeat(is_short, fits.shape[1] // on_node.shape[1], axis=1)
    return np.where(wanted.any(axis=1, keepdims=True), wanted, fits)


def _exchange_in(slots: Ints, capacity: Ints, holds: Bools, expert: int) -> None:
    """Place an expert where all ranks with room hold it already, in place.

    A full rank without it hands another expert over to a rank with capacity. There is one to hand
    over: the full rank has at least as many experts as the other one, and lacks one of them.

    Args:
        slots: [num_ranks, most slots].
        capacity: [num_ranks].
        holds: [num_ranks, num_experts].
    """
    num_held = (slots != EMPTY).sum(axis=1)
    free = int(np.nonzero(num_held < capacity)[0][0])
    full = int(np.nonzero(~holds[:, expert])[0][0])
    slot = next(s for s in range(num_held[full]) if not holds[free, slots[full, s]])
    moved = slots[full, slot]
    slots[full, slot] = expert
    slots[free, num_held[free]] = moved
    holds[full, [moved, expert]] = False, True
    holds[free, moved] = True


def share_of_ranks(is_held: Bools, ranks_per_node: int) -> Floats:
    """[..., ep]; the part of an expert's load that each rank computes.

    Args:
        is_held: [..., ep]; whether a rank holds a copy; some rank does.
        ranks_per_node: consecutive ranks that share a node; the last node may have fewer.
    """
    first = np.arange(0, is_held.shape[-1], ranks_per_node)
    sizes = np.diff(first, append=is_held.shape[-1])
    per_copy = _share_per_copy(np.add.reduceat(is_held.astype(np.int64), first, axis=-1), sizes)
    return np.where(is_held, np.repeat(per_copy, sizes, axis=-1), 0.0)


def _share_per_copy(num_on_node: Ints, sizes: Ints) -> Floats:
    """[..., num_nodes]; the part that a copy on each node gets."""
    far = ((num_on_node == 0) * sizes).sum(axis=-1, keepdims=True)  # ranks without one on the node
    near = sizes / np.maximum(num_on_node, 1)
    share: Floats = (near + far / num_on_node.sum(axis=-1, keepdims=True)) / sizes.sum()
    return share


@dataclass(frozen=True, eq=False)
class Packing:
    """Layers packed side by side: the expert in each slot, and the loads that follow.

    Nodes are equal numbers of consecutive ranks. Senders choose copies as the engine's do.

    Attributes:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY.
        load: [num_layers, num_experts].
    """

    slots: Ints
    load: Floats
    num_nodes: int

    def of_layers(self, layers: npt.NDArray[Any]) -> "Packing":
        """Some layers, by indices or a mask; a copy."""
        return Packing(self.slots[layers], self.load[layers], self.num_nodes)

    @property
    def mean(self) -> Floats:
        """[num_layers]; the load of a rank."""
        mean: Floats = self.load.sum(axis=1) / self.slots.shape[1]
        return mean

    @property
    def node_of_rank(self) -> Ints:
        """[num_ranks]."""
        num_ranks = self.slots.shape[1]
        node: Ints = np.arange(num_ranks) * self.num_nodes // num_ranks
        return node

    @cached_property
    def num_on_node(self) -> Ints:
        """[num_layers, num_experts, num_nodes]; copies there."""
        shape = (*self.load.shape, self.num_nodes)
        layer, rank, slot = np.nonzero(self.slots != EMPTY)
        expert, node = self.slots[layer, rank, slot], self.node_of_rank[rank]
        at = (layer * shape[1] + expert) * shape[2] + node
        return np.bincount(at, minlength=prod(shape)).reshape(shape)

    @cached_property
    def copies(self) -> Ints:
        """[num_layers, num_experts]."""
        copies: Ints = self.num_on_node.sum(axis=2)
        return copies

    @cached_property
    def per_copy(self) -> Floats:
        """[num_layers, num_experts, num_nodes]; the load of a copy on each node."""
        sizes = np.ones(self.num_nodes, dtype=np.int64)
        return self.load[:, :, None] * _share_per_copy(self.num_on_node, sizes)

    @cached_property
    def weights(self) -> Floats:
        """[num_layers, num_ranks, most slots]; the load of the copy in each slot."""
        layer = np.arange(len(self.slots))[:, None, None]
        per_copy = self.per_copy[layer, self.slots, self.node_of_rank[:, None]]
        return np.where(self.slots == EMPTY, 0.0, per_copy)

    @property
    def loads(self) -> Floats:
        """[num_layers, num_ranks]."""
        loads: Floats = self.weights.sum(axis=2)
        return loads

    @property
    def highest(self) -> Floats:
        """[num_layers]; the load of the fullest rank."""
        highest: Floats = self.loads.max(axis=1)
        return highest

    def may_move_to(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether any copy may, from another node."""
        has_one = self.num_on_node.max(axis=2, keepdims=True) == 1
        may: Bools = (has_one & (self.num_on_node == 0)) | (self.copies <= 2)[:, :, None]
        return may

    def may_gain(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether a copy more there leaves shares even."""
        return self._is_even_with(1)

    def may_lose(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether a copy less there leaves shares even."""
        return self._is_even_with(-1) & (self.num_on_node > 0)

    def _is_even_with(self, more: int) -> Bools:
        counts = self.num_on_node
        after = counts + more
        num_nodes = (counts > 0).sum(axis=2, keepdims=True) + (after > 0) - (counts > 0)
        squares = (counts**2).sum(axis=2, keepdims=True) + after**2 - counts**2
        # Counts are equal where their squares sum to no more than they must (Cauchy-Schwarz).
        is_even: Bools = num_nodes * squares == (self.copies[:, :, None] + more) ** 2
        return is_even


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
        capacity = [len(slots) for slots in partition_slots(num_experts, ep, num_redundant)]
        # Of experts with equal load the packer gives each rank in turn one.
        slots = pack(
            np.arange(sum(capacity))[None] % num_experts,
            np.ones((1, num_experts)),
            np.array([capacity]),
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
        with few pairs in a batch, the copies that come first in turn get more than this says.

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
class MovedPart:
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


def next_slice(waiting: deque[MovedPart], most: int) -> list[MovedPart]:
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
        capacity = most - max(sent[part.move.source], received[part.move.rank])
        if capacity <= 0:
            left.append(part)
            continue
        end = min(part.end, part.begin + capacity)
        taken.append(replace(part, end=end))
        sent[part.move.source] += end - part.begin
        received[part.move.rank] += end - part.begin
        if end < part.end:
            left.append(replace(part, begin=end))
    waiting.extendleft(reversed(left))
    return taken


def most_of_a_rank(parts: Iterable[MovedPart]) -> int:
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
