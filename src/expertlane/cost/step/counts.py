"""Positions of a stage's ranks, and counts of its tokens by expert rank.

All that describes a dispatch form (`cost.step.layer`) turns on `DispatchCounts`. There are three
kinds: *real* counts of what the ranks of a run chose, and *sampled* ones of choices that were drawn
or traced (both `TokenCounts`), and *expected* ones of a rank that stands for all
(`cost.step.expected_counts`).

R ranks of the stage, T tokens of them all, K = top_k, E experts; A is R, or a number of scenarios.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from expertlane.balance.copies import CopyChoice
from expertlane.cost.step.operation import Amounts, Ints, RankGroups, RowsByLink
from expertlane.spec.layout import Layout

Axis = Literal["tp", "dcp", "ep", "etp", "stage", "ep_inter", "ep_intra"]


@dataclass(frozen=True, eq=False)
class StageMesh:
    """One pipeline stage of one replica; R ranks.

    Args:
        first_rank: global rank of the stage's first.
    """

    layout: Layout
    first_rank: int
    ranks_per_node: int

    @classmethod
    def of(cls, layout: Layout, replica: int, pp_rank: int, ranks_per_node: int) -> "StageMesh":
        """The stage at a place of a layout."""
        first = replica * layout.replica_size + pp_rank * layout.stage_size
        return cls(layout, first, ranks_per_node)

    @property
    def size(self) -> int:
        """Ranks, R."""
        return self.layout.stage_size

    @cached_property
    def _places(self) -> Ints:
        return np.arange(self.size)

    @cached_property
    def node(self) -> Ints:
        """[R]; each rank's node."""
        node: Ints = (self.first_rank + self._places) // self.ranks_per_node
        return node

    @cached_property
    def tp_rank(self) -> Ints:
        """[R]."""
        return self._places % self.layout.tp

    @cached_property
    def ep_rank(self) -> Ints:
        """[R]."""
        return self._places // self.layout.etp

    @cached_property
    def etp_rank(self) -> Ints:
        """[R]."""
        return self._places % self.layout.etp

    @cached_property
    def ep_per_node(self) -> int:
        """Ranks of an `ep` group on one node.

        Raises:
            SpecError: not equally many on each.
        """
        return self.layout.ep_ranks_per_node(self.ranks_per_node)

    @property
    def num_ep_nodes(self) -> int:
        """Nodes that an `ep` group lies on, where equally many of its ranks are on each."""
        return self.layout.ep // self.ep_per_node

    @cached_property
    def _groups(self) -> dict[Axis, RankGroups]:
        return {}

    def groups(self, axis: Axis) -> RankGroups:
        """The groups of ranks along an axis."""
        if axis not in self._groups:
            self._groups[axis] = RankGroups(self._group(axis), self.node)
        return self._groups[axis]

    def _group(self, axis: Axis) -> Ints:
        layout = self.layout
        match axis:
            case "tp":
                return self._places // layout.tp
            case "dcp":
                return self._places // layout.dcp
            case "etp":
                return self.ep_rank
            case "ep":
                return self.etp_rank
            case "stage":
                return np.zeros_like(self._places)
            case "ep_intra":
                return self.ep_rank // self.ep_per_node * layout.etp + self.etp_rank
            case "ep_inter":
                return self.ep_rank % self.ep_per_node * layout.etp + self.etp_rank

    @cached_property
    def nodes_of_ep_group(self) -> Ints:
        """[R, ep]; the nodes of the ranks of each rank's `ep` group."""
        layout = self.layout
        by_etp_rank = self.node.reshape(layout.ep, layout.etp).T
        nodes: Ints = by_etp_rank[self.etp_rank]
        return nodes


# Rows by source and destination, [R, R], of which those outside a transfer's groups do not count;
# or those of the rank that stands for all.
Exchange = Amounts | RowsByLink


@dataclass(frozen=True, eq=False)
class NodeCounts:
    """Further counts for hierarchical dispatch; [A] each.

    Attributes:
        rows_sent: one row for each node that a token of the rank reaches, its own too.
        rows: rows sent within `ep_inter` groups.
        rows_arriving: rows that the rank gets, to be forwarded inside its node.
        rows_forwarded: rows that it forwards to ep ranks of its node, those to itself included.
        forwarded: rows forwarded within `ep_intra` groups.
    """

    rows_sent: Amounts
    rows: Exchange
    rows_arriving: Amounts
    rows_forwarded: Amounts
    forwarded: Exchange


@dataclass(frozen=True, eq=False)
class DispatchCounts:
    """The counts that sizes of dispatch, experts and combine follow from; [A] each.

    A row is a token on its way to an ep rank, one however many of that rank's experts it chose. A
    pair is a token with one of its experts.

    Attributes:
        stage_tokens: tokens of all ranks of the stage.
        rows_sent: rows of the rank's own tokens, those to itself included.
        rows, pairs: rows sent within `ep` groups, and their pairs.
        rows_arriving, pairs_arriving: rows and pairs received within the rank's `ep` group, before
            they are gathered over `etp`.
        capacity_arriving: rows received if every rank of the group sent it all of its tokens.
        rows_computed, pairs_computed: rows and pairs that the rank's experts compute.
        active_experts: experts of the rank with at least one pair.
        by_node: None unless the form is hierarchical.
    """

    stage_tokens: Amounts
    rows_sent: Amounts
    rows: Exchange
    pairs: Exchange
    rows_arriving: Amounts
    pairs_arriving: Amounts
    capacity_arriving: Amounts
    rows_computed: Amounts
    pairs_computed: Amounts
    active_experts: Amounts
    by_node: NodeCounts | None


@dataclass(frozen=True, eq=False)
class FanOut:
    """Ranks and nodes that tokens reach; the counters of a record.

    Attributes:
        by_ranks_reached, by_nodes_reached: [R, ep + 1]; number of tokens by how many they reach.
        num_remote_rank_copies: [R]; (token, rank on another node) pairs.
        num_remote_node_copies: [R]; (token, other node) pairs.
    """

    by_ranks_reached: Ints
    by_nodes_reached: Ints
    num_remote_rank_copies: Ints
    num_remote_node_copies: Ints


@dataclass(frozen=True, eq=False)
class TokenCounts(DispatchCounts):
    """Counts of all ranks of a stage, from the experts that each of their tokens chose.

    Attributes:
        rows_to: [R, ep]; tokens of each rank that reach each ep rank.
        pairs_of_ep_rank: [ep]; pairs that each ep rank computes.
        num_tokens_per_expert: [ep, E]; pairs by ep rank and expert.
        fan_out: None unless asked for, and on a stage of one rank.
    """

    rows_to: Ints
    pairs_of_ep_rank: Ints
    num_tokens_per_expert: Ints
    fan_out: FanOut | None


def count_dispatch(
    topk_ids: Ints,
    owned: Ints,
    choice: CopyChoice,
    mesh: StageMesh,
    *,
    by_node: bool = False,
    fan_out: bool = False,
) -> TokenCounts:
    """Count one layer's tokens.

    Args:
        topk_ids: [T, K] int64; logical experts, rank after rank; -1 for those that compute nothing,
            which no rank is told of.
        owned: [R]; tokens that each rank owns.
        by_node: count `by_node`, for the hierarchical form.
        fan_out: count `fan_out`, for a record.
    """
    ep, num_ranks, num_experts = mesh.layout.ep, mesh.size, choice.num_experts
    rank = np.arange(num_ranks).repeat(owned)
    topk_ids, token = computing(topk_ids)
    ep_ranks = choice.ep_ranks(topk_ids, rank[token[:, 0]])
    at = rank[token] * ep + ep_ranks
    pairs_to = np.bincount(at.ravel(), minlength=num_ranks * ep).reshape(num_ranks, ep)
    place = (ep_ranks * num_experts + topk_ids).ravel()
    per_expert = np.bincount(place, minlength=ep * num_experts).reshape(ep, num_experts)
    reached = np.zeros((len(rank), ep), dtype=np.bool_)
    reached[token, ep_ranks] = True
    rows_to = _sum_of_rank(reached, owned)
    pairs_of_ep_rank = pairs_to.sum(axis=0)
    return TokenCounts(
        stage_tokens=np.full(num_ranks, owned.sum()),
        rows_sent=rows_to.sum(axis=1),
        rows=rows_to[:, mesh.ep_rank],
        pairs=pairs_to[:, mesh.ep_rank],
        rows_arriving=_arriving(rows_to, mesh),
        pairs_arriving=_arriving(pairs_to, mesh),
        capacity_arriving=owned.reshape(ep, -1).sum(axis=0)[mesh.etp_rank],
        rows_computed=rows_to.sum(axis=0)[mesh.ep_rank],
        pairs_computed=pairs_of_ep_rank[mesh.ep_rank],
        active_experts=np.count_nonzero(per_expert, axis=1)[mesh.ep_rank],
        by_node=_count_by_node(reached, rows_to, owned, mesh) if by_node else None,
        rows_to=rows_to,
        pairs_of_ep_rank=pairs_of_ep_rank,
        num_tokens_per_expert=per_expert,
        fan_out=_fan_out(reached, rank, mesh) if fan_out and num_ranks > 1 else None,
    )


def computing(topk_ids: Ints) -> tuple[Ints, Ints]:
    """The choices of experts that compute, and whose they are.

    Args:
        topk_ids: [T, K]; negative for experts that compute nothing.

    Returns:
        [N, M] and [N, 1]: all choices of each token, or one by one where any computes nothing.
    """
    token = np.arange(len(topk_ids))[:, None]
    if not (is_none := topk_ids < 0).any():
        return topk_ids, token
    place: Ints = np.nonzero(~is_none)[0][:, None]
    return topk_ids[~is_none][:, None], place


def _arriving(rows: Ints, mesh: StageMesh) -> Ints:
    """[R]; rows that each rank receives from ranks with its own etp_rank, of those sent [R, ep]."""
    ep = rows.shape[1]
    arriving: Ints = rows.reshape(ep, mesh.layout.etp, ep).sum(axis=0).T.ravel()
    return arriving


def _count_by_node(
    reached: npt.NDArray[np.bool_], rows_to: Ints, owned: Ints, mesh: StageMesh
) -> NodeCounts:
    num_nodes, size, etp = mesh.num_ep_nodes, mesh.ep_per_node, mesh.layout.etp
    of_nodes = reached.reshape(len(reached), num_nodes, size)
    to_nodes = _sum_of_rank(np.logical_or.reduce(of_nodes, axis=2), owned)  # [R, nodes]
    arriving = to_nodes.reshape(num_nodes, size, etp, num_nodes).sum(axis=0)
    # [node of the token, place in it, etp, node of the expert's rank, its place]
    inside = rows_to.reshape(num_nodes, size, etp, num_nodes, size).sum(axis=0)
    inside = inside.transpose(2, 0, 1, 3).reshape(mesh.size, size)  # by place in the own node
    return NodeCounts(
        rows_sent=to_nodes.sum(axis=1),
        rows=to_nodes[:, mesh.ep_rank // size],
        rows_arriving=arriving.transpose(2, 0, 1).ravel(),
        rows_forwarded=inside.sum(axis=1),
        forwarded=inside[:, mesh.ep_rank % size],
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
