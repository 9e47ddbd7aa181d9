"""Bookkeeping of dispatch by torch's operations: rows for each peer, and pairs of each expert.

A *physical id* names a slot of a rank, as ep_rank × slots + slot; -1 is none. Shapes: T tokens of
this rank, R rows, K = top_k ids in each, P token-expert pairs, numbered by row, then choice.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.products import PairGroups


@dataclass(frozen=True)
class PeerRows:
    """Rows sent to peers: one for each peer that a token reaches, sorted by peer, then token.

    Attributes:
        counts: [num_peers]; rows for each peer; a peer's rows may end with padding.
        tokens: [R]; the token of each row; any token for padding, whose ids are -1.
        ids: [R, K] int32; ids modulo the divisor, as the peer knows them; -1 for other peers' ids.
        places: [T, num_peers]; the row of each token for each peer, -1 for none.
    """

    counts: Tensor
    tokens: Tensor
    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class Outgoing:
    """Rows and pairs that leave for the peers in a flat all-to-all.

    Attributes:
        ids: [T, K] int32; the physical id of each pair.
        counts: [2 · num_peers]; rows for each peer, then pairs for each peer.
        tokens: [R]; the token of each row; rows are sorted by peer, then token.
        ids_there: [R, K] int32; ids modulo the divisor, as the peer knows them; -1 for other
            peers' ids.
        places: [T, K]; the index of each pair among all sorted by peer, -1 for none.
    """

    ids: Tensor
    counts: Tensor
    tokens: Tensor
    ids_there: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class RowParts:
    """A matrix [num_rows, width] in parts of rows, each contiguous; rows count across parts.

    Attributes:
        pointers: [num_parts] int64; address of each part.
        num_rows: [num_parts]; rows of each part.
        whole: the matrix as one tensor, if the parts are adjacent.
    """

    pointers: Any
    num_rows: Sequence[int]
    width: int
    dtype: torch.dtype
    whole: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, num_parts: int = 1) -> Self:
        """Divide contiguous rows [num_rows, width] into equal parts."""
        num, begin = rows.shape[0] // num_parts, rows.data_ptr()
        step = num * rows.shape[1] * rows.itemsize
        pointers = array("q", range(begin, begin + num_parts * step, step) if step else [begin])
        return cls(pointers, [num] * len(pointers), rows.shape[1], rows.dtype, rows)

    def tensor(self) -> Tensor:
        """The matrix [num_rows, width] as one tensor; a copy where the parts are not adjacent."""
        if self.whole is not None:
            return self.whole
        row_bytes = self.width * self.dtype.itemsize
        ends = [num * row_bytes for num in accumulate(self.num_rows)]
        rows = torch.empty(sum(self.num_rows), self.width, dtype=self.dtype)
        for pointer, end, num in zip(self.pointers, ends, self.num_rows, strict=False):
            num_bytes = num * row_bytes
            ctypes.memmove(rows.data_ptr() + end - num_bytes, pointer, num_bytes)
        return rows


class Bookkeeping:
    """The operations, as backends inherit them; `dispatch.cpp` matches them."""

    def choose_copies(
        self, topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int
    ) -> Tensor:
        """Physical ids [T, K] int32 of top-k ids; an expert's copies take turns in order of pairs.

        Args:
            topk_ids: [T, K] int64; -1 for none, which stays -1.
            table: [num_experts, most copies] int64; physical ids of each expert's copies.
            num_copies: [num_experts] int64; copies of each expert that are used.
            first: the turn of each expert's first pair: copy `first` modulo its copies.
        """
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        ids = topk_ids.flatten()
        copy: Tensor | int = 0
        if table.shape[1] > 1:
            copy = (_num_equal_before(ids) + first) % num_copies[ids]
        return table[ids, copy].where(ids >= 0, -1).view_as(topk_ids).int()

    def rows_by_peer(
        self, ids: Tensor, divisor: int, num_peers: int, *, padded: bool = False
    ) -> PeerRows:
        """Rows for the peers id // divisor, which know the ids as id % divisor.

        Args:
            ids: [T, K] int32, -1 for none; rows need not be adjacent in memory.
            padded: give T rows for each peer, so that the host need not ask for their number.
        """
        num_tokens, on = ids.shape[0], ids.device
        peers = torch.div(ids, divisor, rounding_mode="floor")
        reached = torch.zeros(num_tokens, num_peers + 1, dtype=torch.bool, device=on)
        reached = reached.scatter_(1, peers.where(peers >= 0, num_peers).long(), True)
        reached = reached.narrow(1, 0, num_peers)
        counts, peer = reached.sum(0), torch.arange(num_peers, device=on)
        begin = peer * num_tokens if padded else counts.cumsum(0) - counts
        num_rows = num_peers * num_tokens if padded else int(counts.sum())
        places = reached.cumsum(0) - 1 + begin
        # What is no row goes behind all rows.
        to = places.where(reached, num_rows).flatten()

        def by_row(values: Tensor, default: int) -> Tensor:
            of_rows = torch.full((num_rows + 1,), default, device=on)
            return of_rows.scatter_(0, to, values.expand(reached.shape).flatten()).narrow(
                0, 0, num_rows
            )

        tokens = by_row(torch.arange(num_tokens, device=on).unsqueeze(1), 0)
        is_theirs = peers.index_select(0, tokens) == by_row(peer, -2).unsqueeze(1)
        ids_there = (ids.index_select(0, tokens) % divisor).where(is_theirs, -1)
        return PeerRows(counts, tokens, ids_there, places.where(reached, -1))

    def outgoing(
        self,
        topk_ids: Tensor,
        table: Tensor,
        num_copies: Tensor,
        first: int,
        divisor: int,
        num_peers: int,
    ) -> Outgoing:
        """Choose copies, and group the tokens' rows and pairs by the peers id // divisor.

        Args:
            topk_ids, table, num_copies, first: see `choose_copies`.
        """
        ids = self.choose_copies(topk_ids, table, num_copies, first)
        rows = self.rows_by_peer(ids, divisor, num_peers)
        pairs = self.group_pairs(ids, 0, divisor, num_peers, ids.numel())
        counts = torch.cat([rows.counts, pairs.counts])
        places = inverse(pairs.order).view_as(ids).where(ids >= 0, -1)
        return Outgoing(ids, counts, rows.tokens, rows.ids, places)

    def fan_out(
        self, ids: Tensor, divisor: int, nodes: Tensor, node: int
    ) -> tuple[Tensor, Tensor, int, int]:
        """Fan-out: how many ranks and nodes each token reaches.

        Args:
            ids: [T, K] int32; no -1.
            divisor: the rank of an id is id // divisor.
            nodes: [num_ranks] int64; the node of each rank, from 0.
            node: the node of this rank.

        Returns:
            Ranks [T] and nodes [T] that each token reaches; then, summed over tokens, the ranks
            reached on other nodes, and the other nodes reached.
        """
        reached = torch.zeros(len(ids), len(nodes), device=ids.device)
        reached.scatter_(1, (ids // divisor).long(), 1.0)
        by_node = (reached @ F.one_hot(nodes).float()).long()  # [T, num_nodes]
        ranks, num_nodes, here = by_node.sum(1), (by_node > 0).sum(1), by_node[:, node]
        remote_nodes = num_nodes - (here > 0).long()
        return ranks, num_nodes, int((ranks - here).sum()), int(remote_nodes.sum())

    def group_pairs(
        self, ids: Tensor, first: int, divisor: int, num_groups: int, num_pairs: int | None = None
    ) -> PairGroups:
        """Sort pairs by their groups (id - first) // divisor; ids of other groups make no pair.

        Args:
            ids: [R, K] int32; rows need not be adjacent in memory.
            num_pairs: P, an upper bound of the number of pairs, R · K at most, so that the host
                need not ask a GPU for it. With R · K, ids that make no pair are numbered too.
        """
        most = ids.numel()
        groups = torch.div(ids.flatten() - first, divisor, rounding_mode="floor")
        is_pair = (groups >= 0) & (groups < num_groups)
        groups = groups.where(is_pair, num_groups)  # behind the others
        num_before = is_pair.cumsum(0)  # and itself
        if num_pairs is None:
            num_pairs = int(num_before[-1]) if most else 0
        number = torch.arange(most, device=ids.device)
        if num_pairs < most:  # there is one at least
            number = torch.where(is_pair, num_before - 1, num_before.max() + number - num_before)
        pair = stable_order(groups, num_groups + 1).narrow(0, 0, num_pairs)  # row · K + choice
        counts = number.new_zeros(num_groups + 1).index_add_(0, groups, torch.ones_like(number))
        numbers = number.where(is_pair, -1).view(ids.shape)
        counts, order = counts.narrow(0, 0, num_groups), number.index_select(0, pair)
        return PairGroups(counts, pair // ids.shape[1], order, numbers)

    def pack(self, parts: Sequence[tuple[Tensor, Tensor | None]], packed: Tensor) -> None:
        """Concatenate the bytes of several columns, row by row.

        Args:
            parts: each [num_rows, columns] of any dtype, and None; or [num, columns] and the index
                [num_rows] of the row of it that each packed row takes.
            packed: [num_rows, bytes of all parts] uint8; filled here.
        """
        begin = 0
        for part, rows in parts:
            end = begin + part.shape[1] * part.itemsize
            # A typed view: a byte view of a one-column tensor with stride 0 fails.
            place = packed[:, begin:end].view(part.dtype)
            if rows is None:
                place.copy_(part)
            else:
                torch.index_select(part, 0, rows, out=place)  # ten times as fast as part[rows]
            begin = end


def inverse(order: Tensor) -> Tensor:
    """The inverse [n] of a permutation [n]: the index at which each number stands in `order`."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def stable_order(values: Tensor, num_values: int) -> Tensor:
    """Stable argsort [n] of values [n] from 0 to `num_values` - 1."""
    if values.device.type == "cpu":
        narrow = values.numpy().astype(np.min_scalar_type(num_values))  # numpy then sorts by radix
        return torch.from_numpy(np.argsort(narrow, kind="stable"))
    return torch.argsort(values, stable=True)


def _num_equal_before(ids: Tensor) -> Tensor:
    """[n]; how many earlier ids are equal to each."""
    order = torch.argsort(ids, stable=True)
    ordered, places = ids[order], torch.arange(len(ids), device=ids.device)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(is_first, places, 0).cummax(0).values if len(ids) else places
    num_before = torch.empty_like(places)
    num_before[order] = places - start
    return num_before
