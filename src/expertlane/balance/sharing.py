"""How copies share an expert's load, as the engine's senders choose among them.

A sender takes the copy on its own rank, else those on its node by turns, else all by turns. With
tokens on every rank alike, a copy then gets its part of its own node's tokens, and of those from
nodes without a copy. So copies share a load evenly exactly where all nodes that hold any, if they
are full, hold equally many.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Floats, Ints

Bools = npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class CopiesOnNodes:
    """The numbers of copies on full nodes, and which changes keep an expert's shares even.

    Attributes:
        num_on_node: [num_layers, num_experts, num_nodes].
    """

    num_on_node: Ints

    @classmethod
    def of(cls, slots: Ints, num_experts: int, num_nodes: int) -> "CopiesOnNodes":
        """Count the copies in slots.

        Args:
            slots: [num_layers, num_ranks, most slots]; experts or EMPTY.
        """
        num_layers = len(slots)
        layer, rank, slot = np.nonzero(slots != EMPTY)
        node = rank * num_nodes // slots.shape[1]
        at = (layer * num_experts + slots[layer, rank, slot]) * num_nodes + node
        counts = np.bincount(at, minlength=num_layers * num_experts * num_nodes)
        return cls(counts.reshape(num_layers, num_experts, num_nodes))

    @cached_property
    def copies(self) -> Ints:
        """[num_layers, num_experts]."""
        copies: Ints = self.num_on_node.sum(axis=2)
        return copies

    def per_copy(self, load: Floats) -> Floats:
        """[num_layers, num_experts, num_nodes]; the load of a copy on each node.

        Args:
            load: [num_layers, num_experts].
        """
        sizes = np.ones(self.num_on_node.shape[2], dtype=np.int64)
        return load[:, :, None] * _share_per_copy(self.num_on_node, sizes)

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
