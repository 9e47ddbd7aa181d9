"""Choice of the copy that computes a token-expert pair: the definitions others are held to.

`CopyChoice` needs no word between ranks. A rank's pairs go to the copy on the rank itself, else to
those on its node, else to all of them. Several copies take turns in the order of the rank's pairs,
beginning with the rank's number in its stage: so ranks begin with different copies, and the load is
spread.

`BalancedCopies` goes by the counts of all ranks: pairs are shared among copies so that the fullest
rank has least, by an exact flow. It begins with what `CopyChoice` would do, and moves pairs off
ranks that have too many: along the shortest paths of a graph in which rank u leads to rank v where
u computes pairs of an expert that v holds too. "Too many" is at first more than the mean, rounded
up. Where no path leads on, the ranks that were reached hold every copy of what they share among
themselves, so no sharing leaves their fullest with less than their own mean: that, rounded up, is
the next target (Newton's method for the parametric flow). So the fullest rank ends with the optimum
of the linear program over shares of pairs, rounded up, unless so many paths are needed that the
search is cut off. Senders whose way does not get longer give their pairs first: own rank, own node,
another node.

R ranks of a stage, E experts, M of them with several copies, C copies at most, T tokens, K = top_k.
`engine/ops/even_copies.cpp` is equal to `BalancedCopies`, pair by pair.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import Placement
from expertlane.spec.deployment import CopyMethod

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PATHS_OF_RANK = 16  # a rank's share of the paths that a step may take; a few suffice
_OWN, _NEAR, _FAR = range(3)  # distances: the same rank, the same node, another node


class CopyChoice:
    """The copy of an expert that computes each token-expert pair, for all ranks of a stage.

    Args:
        ep_rank: [R]; the ep coordinate of each rank.
        nodes: [R, ep]; the nodes of the ranks of each rank's `ep` group.

    Attributes:
        num_experts: logical ones.
        holders: [E, C]; ep ranks that hold a copy, ascending, then others.
        num_held: [E].
        is_balanced: whether copies are chosen by the pair counts of all ranks.
    """

    is_balanced = False

    def __init__(self, placement: Placement, ep_rank: Ints, nodes: Ints) -> None:
        self.num_experts = placement.num_experts
        self._ep_rank, self._nodes = ep_rank, nodes
        held = placement.slots().T >= 0  # [E, ep]
        self.num_held: Ints = held.sum(axis=1)
        most = int(self.num_held.max())
        order = np.argsort(~held, axis=1, kind="stable")
        self.holders: Ints = np.ascontiguousarray(order[:, :most])
        self._is_held: Bools = np.arange(most) < self.num_held[:, None]

    def ep_ranks(self, topk_ids: Ints, rank: Ints) -> Ints:
        """[T, K]; the ep rank that computes each pair.

        Args:
            topk_ids: [T, K]; logical experts, rank after rank, each rank's in its order.
            rank: [T]; the stage's rank that owns each token.
        """
        experts = topk_ids.ravel()
        ranks: Ints = self.holders[experts, 0]  # the only one, where there is one copy
        several = np.flatnonzero(self.num_held[experts] > 1)
        if not len(several):
            return ranks.reshape(topk_ids.shape)
        num_choosers = len(self._ep_rank) * self.num_experts
        sender = rank[several // topk_ids.shape[1]]
        chooser = sender * self.num_experts + experts[several]
        if len(chooser) < num_choosers:
            table, num_copies = self.usable(*np.divmod(chooser, self.num_experts))
        else:
            table, num_copies = (each[chooser] for each in self._of_all)
        turns = np.zeros_like(chooser)
        is_open = np.flatnonzero(num_copies > 1)
        turns[is_open] = num_equal_before(chooser[is_open], num_choosers) + sender[is_open]
        ranks[several] = table[np.arange(len(chooser)), turns % num_copies]
        return ranks.reshape(topk_ids.shape)

    def shared_out(self, topk_ids: Ints, rank: Ints) -> tuple[Ints, int]:
        """`ep_ranks`, and the pairs that balancing takes off the fullest rank: here none."""
        return self.ep_ranks(topk_ids, rank), 0

    @cached_property
    def _of_all(self) -> tuple[Ints, Ints]:
        """`usable` of every rank and expert."""
        return self.usable(*np.indices((len(self._ep_rank), self.num_experts)).reshape(2, -1))

    def usable(self, rank: Ints, expert: Ints) -> tuple[Ints, Ints]:
        """The ep ranks that a rank sends an expert's pairs to come first; [n, C], how many."""
        holders = self.holders[expert]
        usable = _nearest(self._distance(rank, holders), self._is_held[expert])
        order = np.argsort(~usable, axis=1, kind="stable")
        return np.take_along_axis(holders, order, axis=1), usable.sum(axis=1)

    def _distance(self, rank: Ints, to: Ints) -> Ints:
        """[n, C]; from ranks [n] to ep ranks [n, C] of their groups."""
        rank = rank[:, None]
        own = self._ep_rank[rank]
        is_near = self._nodes[rank, to] == self._nodes[rank, own]
        return np.where(to == own, _OWN, np.where(is_near, _NEAR, _FAR))


def _nearest(distance: Ints, is_held: Bools) -> Bools:
    """[..., C]; which copies a sender uses: all those at the least distance."""
    distance = np.where(is_held, distance, _FAR + 1)
    usable: Bools = distance == distance.min(axis=-1, keepdims=True)
    return usable


def num_equal_before(values: Ints, num_values: int) -> Ints:
    """[n]; how many equal values stand before each."""
    narrow = values.astype(np.min_scalar_type(num_values))  # sorted by radix where 16 bits serve
    order = np.argsort(narrow, kind="stable")
    counts = np.bincount(values, minlength=num_values)
    starts = np.cumsum(counts) - counts
    num_before = np.empty_like(values)
    num_before[order] = np.arange(len(values)) - starts[values[order]]
    return num_before


@dataclass(frozen=True, eq=False)
class Shares:
    """A layer's token-expert pairs, shared among the copies of their experts.

    Attributes:
        quotas: [R, M, C]; pairs of each rank for each copy of an expert with several.
        fullest_before: pairs of the fullest ep rank, as `CopyChoice` has them.
        fullest: pairs of the fullest ep rank.
        least: lower bound on `fullest`; equal to it unless the search was cut off.
        num_paths: paths along which pairs were moved.
    """

    quotas: Ints
    fullest_before: int
    fullest: int
    least: int
    num_paths: int

    @property
    def num_saved(self) -> int:
        """Pairs that the fullest rank has less than before."""
        return self.fullest_before - self.fullest


class BalancedCopies(CopyChoice):
    """Copies chosen by the pair counts of all ranks of a stage, so that the fullest has least.

    Attributes:
        distance: [R, ep]; from a rank to each of its `ep` group: itself, same node, other node.
        shared: [M]; experts with several copies.
    """

    def __init__(self, placement: Placement, ep_rank: Ints, nodes: Ints) -> None:
        super().__init__(placement, ep_rank, nodes)
        self.distance = self._distance(np.arange(len(ep_rank)), np.arange(placement.ep)[None])
        self.shared = np.flatnonzero(self.num_held > 1)
        self.is_balanced = len(self.shared) > 0

    def ep_ranks(self, topk_ids: Ints, rank: Ints) -> Ints:
        """[T, K]; the ep rank that computes each pair, as in `CopyChoice.ep_ranks`."""
        return self.shared_out(topk_ids, rank)[0]

    def shared_out(self, topk_ids: Ints, rank: Ints) -> tuple[Ints, int]:
        """`ep_ranks`, and the pairs that balancing takes off the fullest rank."""
        if not self.is_balanced:
            return super().ep_ranks(topk_ids, rank), 0
        num_ranks, num_shared = len(self.distance), len(self.shared)
        chooser = (rank[:, None] * self.num_experts + topk_ids).ravel()
        counts = np.bincount(chooser, minlength=num_ranks * self.num_experts)
        shares = self.share(counts.reshape(num_ranks, -1))
        place = self.place_of_expert[topk_ids.ravel()]
        several = np.flatnonzero(place >= 0)
        turns = num_equal_before(chooser[several], num_ranks * self.num_experts)
        sender = rank.repeat(topk_ids.shape[1])[several]
        ends = shares.quotas.cumsum(axis=2).reshape(num_ranks * num_shared, -1)
        copy = np.zeros_like(chooser)
        copy[several] = (turns[:, None] >= ends[sender * num_shared + place[several]]).sum(axis=1)
        found: Ints = self.holders[topk_ids.ravel(), copy]
        return found.reshape(topk_ids.shape), shares.num_saved

    @cached_property
    def place_of_expert(self) -> Ints:
        """[E]; its place in `shared`, -1 for one with a single copy."""
        place = np.full(self.num_experts, -1)
        place[self.shared] = np.arange(len(self.shared))
        return place

    def share(self, counts: Ints) -> Shares:
        """Share the pairs of a layer.

        Args:
            counts: [R, E]; pairs of each rank's own tokens, by expert.
        """
        quotas = self._in_turn(counts[:, self.shared])
        of_copies = quotas.sum(axis=0)  # [M, C]
        single = self.num_held == 1
        loads = np.bincount(
            self.holders[single, 0], counts[:, single].sum(axis=0), self.distance.shape[1]
        ).astype(np.int64)
        num_held, holders = self.num_held[self.shared], self.holders[self.shared]
        np.add.at(loads, holders, of_copies)
        before = int(loads.max())
        ranks = [of[:num].tolist() for of, num in zip(holders, num_held.tolist(), strict=True)]
        flow = _Flow(loads.tolist(), ranks, of_copies.tolist())
        least = flow.run()
        for place, wanted in enumerate(flow.pairs):
            change = np.array(wanted) - of_copies[place]
            if change.any():
                _hand_over(quotas[:, place], self.distance[:, holders[place]], change.tolist())
        return Shares(quotas, before, max(flow.loads), least, flow.num_paths)

    def _in_turn(self, counts: Ints) -> Ints:
        """[R, M, C]; pairs for each copy by `CopyChoice`, whose copies take turns.

        Args:
            counts: [R, M].
        """
        distance = self.distance[:, self.holders[self.shared]]
        usable = _nearest(distance, self._is_held[self.shared])
        num = usable.sum(axis=2, keepdims=True)
        turn = (usable.cumsum(axis=2) - 1 - np.arange(len(counts))[:, None, None]) % num
        pairs: Ints = np.where(usable, (counts[:, :, None] + num - 1 - turn) // num, 0)
        return pairs


class _Flow:
    """Pairs on their way from ranks with too many to ranks with too few.

    Args:
        loads: [ep]; pairs of each ep rank.
        holders: [M][copies]; ep ranks.
        pairs: [M][C]; pairs of each copy.
    """

    def __init__(self, loads: list[int], holders: list[list[int]], pairs: list[list[int]]) -> None:
        self.loads, self.pairs = loads, pairs
        self.num_paths = 0
        self._holders = holders
        self._of_rank: list[list[tuple[int, int]]] = [[] for _ in loads]
        for expert, ranks in enumerate(holders):
            for copy, rank in enumerate(ranks):
                self._of_rank[rank].append((expert, copy))

    def run(self) -> int:
        """Lower the fullest rank; return a lower bound on its pairs."""
        loads = self.loads
        target = -(-sum(loads) // len(loads))
        while max(loads) > target and self.num_paths < PATHS_OF_RANK * len(loads):
            came, end = self._search(target)
            if end is None:
                target = -(-sum(loads[rank] for rank in came) // len(came))
            else:
                self._push(came, end, target)
                self.num_paths += 1
        return target

    def _search(self, target: int) -> tuple[dict[int, tuple[int, int, int, int]], int | None]:
        """Search breadth-first from the ranks above the target.

        Returns:
            By rank reached: the rank before it (-1 for one above the target), the expert, and the
            copies that pairs leave and go to; and the first rank below the target, if any.
        """
        queue = [rank for rank, load in enumerate(self.loads) if load > target]
        came = dict.fromkeys(queue, (-1, 0, 0, 0))
        for rank in queue:  # which grows
            for expert, copy in self._of_rank[rank]:
                if not self.pairs[expert][copy]:
                    continue
                for to, other in enumerate(self._holders[expert]):
                    if other not in came:
                        came[other] = rank, expert, copy, to
                        if self.loads[other] < target:
                            return came, other
                        queue.append(other)
        return came, None

    def _push(self, came: dict[int, tuple[int, int, int, int]], end: int, target: int) -> None:
        path, rank = [], end
        while (step := came[rank])[0] >= 0:
            path.append(step[1:])
            rank = step[0]
        amount = min(self.loads[rank] - target, target - self.loads[end])
        amount = min(amount, *(self.pairs[expert][copy] for expert, copy, _ in path))
        for expert, copy, to in path:
            self.pairs[expert][copy] -= amount
            self.pairs[expert][to] += amount
        self.loads[rank] -= amount
        self.loads[end] += amount


def _hand_over(quotas: Ints, distance: Ints, change: list[int]) -> None:
    """Give pairs of one expert to other copies, in place; first where the way gets no longer.

    Args:
        quotas: [R, C].
        distance: [R, C]; from each sender.
        change: [C]; how many pairs more each copy gets.
    """
    for give, _ in enumerate(change):
        for take, _ in enumerate(change):
            if change[give] >= 0 or change[take] <= 0:
                continue
            amount = min(-change[give], change[take])
            change[give] += amount
            change[take] -= amount
            longer = distance[:, take] - distance[:, give]
            for extra in range(_FAR + 1):
                for rank in np.flatnonzero((longer == extra) & (quotas[:, give] > 0)).tolist():
                    moved = min(amount, int(quotas[rank, give]))
                    quotas[rank, give] -= moved
                    quotas[rank, take] += moved
                    amount -= moved


def copy_choice(method: CopyMethod, placement: Placement, ep_rank: Ints, nodes: Ints) -> CopyChoice:
    """`BalancedCopies` or `CopyChoice`, by the method's name."""
    kind = BalancedCopies if method == "balanced" else CopyChoice
    return kind(placement, ep_rank, nodes)
