"""How the tokens of a stage spread over the ranks of their experts, in one layer.

R ranks of the stage, T tokens of them all, K = top_k, E experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.copies import CopyChoice
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.stage_mesh import StageMesh


@dataclass(frozen=True, eq=False)
class FanOut:
    """How far tokens spread; the counters of a record.

    Attributes:
        by_ranks_reached, by_nodes_reached: [R, ep + 1]; tokens by how many they reach.
        num_remote_rank_copies: [R]; (token, rank on another node) pairs.
        num_remote_node_copies: [R]; (token, other node) pairs.
    """

    by_ranks_reached: Ints
    by_nodes_reached: Ints
    num_remote_rank_copies: Ints
    num_remote_node_copies: Ints


@dataclass(frozen=True, eq=False)
class DispatchCounts:
    """All that the sizes of dispatch, experts and combine turn on.

    Attributes:
        rows: [R, ep]; tokens of each rank that reach each ep rank.
        pairs: [R, ep]; their token-expert pairs.
        node_rows: [R, num_ep_nodes]; tokens that reach each node; None unless asked for.
        num_tokens_per_expert: [ep, E]; pairs that each ep rank computes.
        fan_out: None unless asked for, and on a stage of one rank.
    """

    rows: Ints
    pairs: Ints
    node_rows: Ints | None
    num_tokens_per_expert: Ints
    fan_out: FanOut | None = None

    @property
    def pairs_of_ep_rank(self) -> Ints:
        """[ep]."""
        pairs: Ints = self.pairs.sum(axis=0)
        return pairs

    @property
    def active_of_ep_rank(self) -> Ints:
        """[ep]; experts with any token."""
        active: Ints = np.count_nonzero(self.num_tokens_per_expert, axis=1)
        return active


def count_dispatch(
    topk_ids: Ints,
    owned: Ints,
    choice: CopyChoice,
    mesh: StageMesh,
    *,
    by_node: bool = False,
    fan_out: bool = False,
) -> DispatchCounts:
    """Count one layer's tokens.

    Args:
        topk_ids: [T, K] int64; logical experts, rank after rank.
        owned: [R]; how many of the tokens are whose.
        by_node: count `node_rows`, for the hierarchical form.
        fan_out: count `fan_out`, for a record.
    """
    ep, num_ranks, num_experts = mesh.layout.ep, mesh.size, choice.num_experts
    rank = np.arange(num_ranks).repeat(owned)
    ep_ranks = choice.ep_ranks(topk_ids, rank)
    at = rank[:, None] * ep + ep_ranks
    pairs = np.bincount(at.ravel(), minlength=num_ranks * ep).reshape(num_ranks, ep)
    place = (ep_ranks * num_experts + topk_ids).ravel()
    per_expert = np.bincount(place, minlength=ep * num_experts).reshape(ep, num_experts)
    reached = np.zeros((len(rank), ep), dtype=np.bool_)
    reached[np.arange(len(rank))[:, None], ep_ranks] = True
    node_rows = None
    if by_node:
        of_nodes = reached.reshape(len(rank), mesh.num_ep_nodes, mesh.ep_per_node)
        node_rows = _sum_of_rank(np.logical_or.reduce(of_nodes, axis=2), owned)
    return DispatchCounts(
        rows=_sum_of_rank(reached, owned),
        pairs=pairs,
        node_rows=node_rows,
        num_tokens_per_expert=per_expert,
        fan_out=_fan_out(reached, rank, mesh) if fan_out and num_ranks > 1 else None,
    )


def _sum_of_rank(values: npt.NDArray[np.bool_], owned: Ints) -> Ints:
    """[R, n]; sums of values [T, n] over each rank's tokens."""
    sums = np.zeros((len(owned), values.shape[1]), dtype=np.int64)
    some = owned > 0
    if some.any():
        starts = (np.cumsum(owned) - owned)[some]
        sums[some] = np.add.reduceat(values, starts, axis=0, dtype=np.int64)
    return sums


def _fan_out(reached: npt.NDArray[np.bool_], rank: Ints, mesh: StageMesh) -> FanOut:
    ep, num_ranks = mesh.layout.ep, mesh.size
    ranks, nodes, here = np.zeros((3, len(rank)), dtype=np.int64)
    for etp_rank in range(mesh.layout.etp):  # their ep groups may lie on nodes differently
        starts_node = np.diff(mesh.nodes_of_ep_group[etp_rank], prepend=-1) > 0  # [ep]
        own = (np.cumsum(starts_node) - 1)[mesh.ep_rank[rank]]
        tokens = np.flatnonzero(mesh.etp_rank[rank] == etp_rank)
        there = np.add.reduceat(  # ranks reached on each node
            reached[tokens], np.flatnonzero(starts_node), axis=1, dtype=np.int64
        )
        ranks[tokens], nodes[tokens] = there.sum(axis=1), np.count_nonzero(there, axis=1)
        here[tokens] = there[np.arange(len(tokens)), own[tokens]]

    def histogram(values: Ints) -> Ints:
        at = rank * (ep + 1) + values
        return np.bincount(at, minlength=num_ranks * (ep + 1)).reshape(num_ranks, ep + 1)

    def total(values: Ints) -> Ints:
        return np.bincount(rank, values, num_ranks).astype(np.int64)

    return FanOut(
        histogram(ranks), histogram(nodes), total(ranks - here), total(nodes - (here > 0))
    )
