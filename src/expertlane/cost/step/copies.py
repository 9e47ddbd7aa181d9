"""Which of an expert's copies a rank sends its tokens to, as the engine's ranks choose."""

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.stage_mesh import StageMesh


class CopyChoice:
    """The choice of all ranks of a stage.

    A copy on the rank itself comes first, else those on its node, else all; of several a rank
    takes each in turn, beginning with its own number.

    Attributes:
        num_experts: logical ones.
    """

    def __init__(self, placement: Placement, mesh: StageMesh) -> None:
        self.num_experts = placement.num_experts
        held = placement.slots().T >= 0  # [E, ep]
        self._only: Ints | None = None
        if (held.sum(axis=1) == 1).all():
            self._only = held.argmax(axis=1)
            return
        nodes = mesh.nodes_of_ep_group  # [R, ep]
        is_own = np.arange(placement.ep) == mesh.ep_rank[:, None]
        is_near = nodes == mesh.node[:, None]
        usable = held & is_own[:, None]  # [R, E, ep]
        for others in (held & is_near[:, None], np.broadcast_to(held, usable.shape)):
            usable = np.where(usable.any(axis=2, keepdims=True), usable, others)
        self._num_copies = usable.sum(axis=2).ravel()  # [R · E]
        order = np.argsort(~usable, axis=2, kind="stable")[..., : self._num_copies.max()]
        self._table = order.reshape(len(self._num_copies), -1)

    @property
    def has_copies(self) -> bool:
        """Whether any expert has more than one."""
        return self._only is None

    def ep_ranks(self, topk_ids: Ints, rank: Ints) -> Ints:
        """[T, K]; the ep rank that computes each pair.

        Args:
            topk_ids: [T, K]; logical experts, rank after rank, each rank's in its order.
            rank: [T]; the stage's rank that owns each token.
        """
        if self._only is not None:
            return self._only[topk_ids]
        chooser = (rank[:, None] * self.num_experts + topk_ids).ravel()
        turns, num_copies = np.zeros_like(chooser), self._num_copies[chooser]
        open_pairs = np.flatnonzero(num_copies > 1)
        first = rank[open_pairs // topk_ids.shape[1]]
        turns[open_pairs] = _num_equal_before(chooser[open_pairs], len(self._num_copies)) + first
        ranks: Ints = self._table[chooser, turns % num_copies]
        return ranks.reshape(topk_ids.shape)


def _num_equal_before(values: Ints, num_values: int) -> Ints:
    """[n]; how many equal values stand before each."""
    narrow = values.astype(np.min_scalar_type(num_values))  # sorted by radix where 16 bits serve
    order = np.argsort(narrow, kind="stable")
    counts = np.bincount(values, minlength=num_values)
    starts = np.cumsum(counts) - counts
    num_before = np.empty_like(values)
    num_before[order] = np.arange(len(values)) - starts[values[order]]
    return num_before
