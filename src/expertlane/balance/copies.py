"""Which copy of an expert computes a token-expert pair: the definition that all others are held to.

`balance.even_copies` has another, by the counts of all ranks; this one needs no word between them.

A rank's pairs go to the copy on the rank itself, else to those on its node, else to all of them.
Several copies take turns in the order of the rank's pairs, beginning with the rank's number in its
stage: so ranks begin with different copies, and the load is spread without a word between them.

R ranks of a stage, E experts, T tokens, K = top_k.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import Placement

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class CopyChoice:
    """The copy of an expert that computes each token-expert pair, for all ranks of a stage.

    Args:
        ep_rank: [R]; the ep coordinate of each rank.
        nodes: [R, ep]; the nodes of the ranks of each rank's `ep` group.

    Attributes:
        num_experts: logical ones.
        is_balanced: whether copies are chosen by the pair counts of all ranks.
    """

    is_balanced = False

    def __init__(self, placement: Placement, ep_rank: Ints, nodes: Ints) -> None:
        self.num_experts = placement.num_experts
        self._ep_rank, self._nodes = ep_rank, nodes
        held = placement.slots().T >= 0  # [E, ep]
        num_held = held.sum(axis=1)
        self._first: Ints = held.argmax(axis=1)  # the only one, where there is one copy
        self._is_shared: Bools = num_held > 1
        most = int(num_held.max())
        self._holders: Ints = np.argsort(~held, axis=1, kind="stable")[:, :most]  # [E, copies]
        self._is_held: Bools = np.arange(most) < num_held[:, None]

    def ep_ranks(self, topk_ids: Ints, rank: Ints) -> Ints:
        """[T, K]; the ep rank that computes each pair.

        Args:
            topk_ids: [T, K]; logical experts, rank after rank, each rank's in its order.
            rank: [T]; the stage's rank that owns each token.
        """
        experts = topk_ids.ravel()
        ranks: Ints = self._first[experts]
        shared = np.flatnonzero(self._is_shared[experts])
        if not len(shared):
            return ranks.reshape(topk_ids.shape)
        num_choosers = len(self._ep_rank) * self.num_experts
        sender = rank[shared // topk_ids.shape[1]]
        chooser = sender * self.num_experts + experts[shared]
        if len(chooser) < num_choosers:
            table, num_copies = self._usable(*np.divmod(chooser, self.num_experts))
        else:
            table, num_copies = (each[chooser] for each in self._of_all)
        turns = np.zeros_like(chooser)
        is_open = np.flatnonzero(num_copies > 1)
        turns[is_open] = num_equal_before(chooser[is_open], num_choosers) + sender[is_open]
        ranks[shared] = table[np.arange(len(chooser)), turns % num_copies]
        return ranks.reshape(topk_ids.shape)

    def shared_out(self, topk_ids: Ints, rank: Ints) -> tuple[Ints, int]:
        """`ep_ranks`, and the pairs that balancing takes off the fullest rank: here none."""
        return self.ep_ranks(topk_ids, rank), 0

    @cached_property
    def _of_all(self) -> tuple[Ints, Ints]:
        """`_usable` of every rank and expert."""
        return self._usable(*np.indices((len(self._ep_rank), self.num_experts)).reshape(2, -1))

    def _usable(self, rank: Ints, expert: Ints) -> tuple[Ints, Ints]:
        """The ep ranks that a rank sends an expert's pairs to come first; [n, copies], how many."""
        holders = self._holders[expert]
        own = self._ep_rank[rank][:, None]
        is_near = self._nodes[rank[:, None], holders] == self._nodes[rank[:, None], own]
        is_held = self._is_held[expert]
        usable = is_held & (holders == own)
        for others in (is_held & is_near, is_held):
            usable = np.where(usable.any(axis=1, keepdims=True), usable, others)
        order = np.argsort(~usable, axis=1, kind="stable")
        return np.take_along_axis(holders, order, axis=1), usable.sum(axis=1)


def usable_copies(is_held: Bools, ep_rank: Ints, nodes: Ints) -> Bools:
    """[R, E, ep]; whether a rank sends pairs of an expert to an ep rank.

    Args:
        is_held: [E, ep]; whether an ep rank has a copy; some has.
        ep_rank, nodes: as in `CopyChoice`.
    """
    is_own = np.arange(is_held.shape[1]) == ep_rank[:, None]  # [R, ep]
    is_near = nodes == np.take_along_axis(nodes, ep_rank[:, None], axis=1)
    usable: Bools = is_held & is_own[:, None]
    for others in (is_held & is_near[:, None], np.broadcast_to(is_held, usable.shape)):
        usable = np.where(usable.any(axis=2, keepdims=True), usable, others)
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
