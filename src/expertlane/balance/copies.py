"""The copy of an expert that computes a token-expert pair.

The choice needs no message between ranks. A rank's pairs go to the copy on the rank itself, else to
those on its node, else to all of them. Several copies take turns in the order of the rank's pairs,
beginning with the rank's number in its stage: so ranks begin with different copies, and the load is
spread.

R ranks of a stage, E experts, C copies at most, T tokens, K = top_k.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import Placement

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

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
    """

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
