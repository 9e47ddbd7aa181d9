"""What a rank computes, by torch's own operations: the reference, and what runs on GPUs.

Dispatch has ids of experts. A *physical id* names a slot of a rank; -1 is none. Shapes: T tokens, R
rows, K = top_k ids in each, P token-expert pairs, numbered by row, then choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.ops.kv_cache import AttentionGroup, AttentionParams, KVCache, PagedBatch
from expertlane.ops.moe_step import LocalExperts
from expertlane.ops.narrow import NarrowWeight
from expertlane.ops.products import (
    Activation,
    Expert,
    Experts,
    GroupedExperts,
    HeadsLinear,
    Linear,
    LoopedExperts,
    OnednnLinear,
    PairGroups,
)
from expertlane.ops.router import Router, RouterParams
from expertlane.ops.row_parts import RowParts
from expertlane.ops.step import AttentionPart, AttentionWeights, HeadPart


@dataclass(frozen=True)
class PeerRows:
    """Rows of tokens for peers: one for each peer that a token reaches, by peer, then token.

    Attributes:
        counts: [num_peers]; rows for each.
        tokens: [R]; the token of each row.
        ids: [R, K] int32; by what the peer knows its ids, -1 for other peers'.
        places: [T, num_peers]; the row of each token for each peer, -1 for none.
    """

    counts: Tensor
    tokens: Tensor
    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class Outgoing:
    """What leaves for the peers in a flat all-to-all.

    Attributes:
        ids: [T, K] int32; the copy of each pair.
        counts: [2 · num_peers]; rows for each peer, then pairs.
        tokens: [R]; the token of each row; rows are as those of `PeerRows`.
        ids_there: [R, K] int32; by what the peer knows its ids, -1 for other peers'.
        places: [T, K]; where each pair stands among all by peer.
    """

    ids: Tensor
    counts: Tensor
    tokens: Tensor
    ids_there: Tensor
    places: Tensor


class TorchBackend:
    """Every operation in which backends differ; others replace what they do better."""

    keeps_narrow = False  # whether products read weights of one byte

    def linear(self, weight: Tensor | NarrowWeight, bias: Tensor | None = None) -> Linear:
        """A product with a weight [out_features, in_features], packed where that is faster."""
        if isinstance(weight, NarrowWeight):
            weight = weight.widened()
        return (OnednnLinear if OnednnLinear.suits(weight) else Linear)(weight, bias)

    def experts(self, held: Sequence[Expert], activation: Activation) -> Experts:
        """Experts side by side, applied as suits them best."""
        suits = GroupedExperts.suits(held)
        return (GroupedExperts if suits else LoopedExperts)(held, activation)

    def router(self, params: RouterParams) -> Router:
        """The norm before an MoE block, and its router."""
        return Router(params, self.rms_norm)

    def local_experts(
        self, router: Router, experts: Experts, dtype: torch.dtype
    ) -> LocalExperts | None:
        """An MoE block whose experts are all here, in few calls; None where there is no such.

        Args:
            dtype: of hidden states, as of `attention_part` and `head_part`.
        """
        return None

    def attention_part(self, weights: AttentionWeights, dtype: torch.dtype) -> AttentionPart | None:
        """A layer's attention in one call; None where there is no such."""
        return None

    def head_part(
        self, head: Linear, norm: Tensor | None, eps: float, dtype: torch.dtype
    ) -> HeadPart | None:
        """The output head in one call; None where there is no such.

        Args:
            norm: the weight of the norm before it, to be a part of it too.
        """
        return None

    def draw_tokens(
        self,
        scores: Tensor,
        temperature: Tensor,
        limits: tuple[Tensor | None, Tensor | None, Tensor | None],
        seeds: npt.NDArray[np.uint64],
        num_drawn: Tensor,
    ) -> Tensor | None:
        """Tokens drawn as `model.draw` defines it, in one pass; None where there is no such.

        Args:
            scores: [num_rows, vocab_size] float32.
            temperature: [num_rows, 1] float32; above 0.
            limits: top-k, top-p and min-p as `keep_likeliest` takes them.
            seeds: [num_rows].
            num_drawn: [num_rows] int64; tokens drawn so far, to be raised by one.

        Returns:
            [num_rows]; -1 where the greatest score is not finite.
        """
        return None

    def heads_linear(self, weight: Tensor) -> HeadsLinear:
        """A product with a matrix for each head: weight [num_heads, out_features, in_features]."""
        return HeadsLinear(weight)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """Store new tokens' keys and values; causal attention over their sequences.

        Args:
            query: [num_tokens, num_heads, key_dim].
            key, value: [num_tokens, num_kv_heads, …]; values are empty where they are a part of
                the keys.

        Returns:
            [num_tokens, num_heads, value_dim].
        """
        value_dim, scale, window, sinks = params
        cache.clear(batch.begun_blocks)
        cache.write(batch.slots, key, value)

        def attend(group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if group.is_fresh:
                keys, values = group.by_head(key), group.by_head(value)
            else:
                keys, values = cache.read(group.block_tables, group.num_positions)
            if values.shape[-1] == 0:  # the latent is both
                values = keys[..., :value_dim]
            is_causal = group.is_causal(window)
            out = _attend(
                group.by_head(query),
                keys,
                values,
                mask=None if is_causal else group.mask(window, query.dtype),
                is_causal=is_causal,
                scale=scale,
                sinks=sinks,
            )
            return out.transpose(1, 2).flatten(0, 1)

        if len(batch.groups) == 1:  # all tokens, in their order
            return attend(batch.groups[0], query, key, value)
        out = query.new_empty((*query.shape[:2], value_dim))
        for group in batch.groups:
            of_group = (x.index_select(0, group.tokens) for x in (query, key, value))
            out[group.tokens] = attend(group, *of_group)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

        Args:
            x: [num_rows, size].
            weight: [size] float32.
        """
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def rms_norm_heads_(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every head, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
            weight: [num_heads, head_dim] float32.
        """
        return (F.rms_norm(x.float(), x.shape[2:], None, eps) * weight).to(x.dtype)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
        """Turn the last `rotary_dim` values of each head by their angles, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
            cos, sin: [num_tokens, 1, rotary_dim] float32; the first half of `sin` is negative.
            interleave: pairs are (2i, 2i + 1), and come out as (i, i + rotary_dim / 2): queries and
                keys may leave them in either order, as long as both do.
        """
        dim = cos.shape[-1]
        turning = x[..., x.shape[-1] - dim :].float()
        if interleave:
            turning = torch.cat([turning[..., 0::2], turning[..., 1::2]], dim=-1)
        swapped = turning.roll(dim // 2, dims=-1)
        turned = torch.addcmul(turning * cos, swapped, sin).to(x.dtype)
        if dim == x.shape[-1]:
            return turned
        return torch.cat([x[..., : x.shape[-1] - dim], turned], dim=-1)

    def choose_copies(
        self, topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int
    ) -> Tensor:
        """[T, K] int32; physical ids of logical experts, whose copies take turns in order of pairs.

        Args:
            topk_ids: [T, K] int64.
            table: [num_experts, most copies] int64; physical ids.
            num_copies: [num_experts] int64; how many of them are to be used.
            first: the turn to begin with.
        """
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        ids = topk_ids.flatten()
        copy: Tensor | int = 0
        if table.shape[1] > 1:
            copy = (_num_equal_before(ids) + first) % num_copies[ids]
        return table[ids, copy].view_as(topk_ids).int()

    def rows_by_peer(self, ids: Tensor, divisor: int, num_peers: int) -> PeerRows:
        """Rows for the peers id // divisor, which know the ids as id % divisor.

        Args:
            ids: [T, K] int32, rows may be apart; -1 for none.
        """
        peers = torch.div(ids, divisor, rounding_mode="floor")
        reached = torch.zeros(len(ids), num_peers + 1, dtype=torch.bool, device=ids.device)
        reached = reached.scatter_(1, peers.where(peers >= 0, num_peers).long(), True)
        reached = reached[:, :num_peers]
        peer, tokens = reached.t().nonzero(as_tuple=True)
        is_theirs = peers.index_select(0, tokens) == peer[:, None]
        ids_there = torch.where(is_theirs, ids.index_select(0, tokens) % divisor, -1)
        places = torch.full(reached.shape, -1, device=ids.device)
        places[tokens, peer] = torch.arange(len(tokens), device=ids.device)
        return PeerRows(reached.sum(0), tokens, ids_there, places)

    def outgoing(
        self,
        topk_ids: Tensor,
        table: Tensor,
        num_copies: Tensor,
        first: int,
        divisor: int,
        num_peers: int,
    ) -> Outgoing:
        """Copies of pairs, and the rows that they make for the peers id // divisor.

        Args:
            topk_ids, table, num_copies, first: as `choose_copies` takes them.
        """
        ids = self.choose_copies(topk_ids, table, num_copies, first)
        rows = self.rows_by_peer(ids, divisor, num_peers)
        pairs = self.group_pairs(ids, 0, divisor, num_peers)
        counts = torch.cat([rows.counts, pairs.counts])
        return Outgoing(ids, counts, rows.tokens, rows.ids, inverse(pairs.order).view_as(ids))

    def fan_out(
        self, ids: Tensor, divisor: int, nodes: Tensor, node: int
    ) -> tuple[Tensor, Tensor, int, int]:
        """How many ranks and nodes hold some id of a token, [T] each; and all that are elsewhere.

        Args:
            ids: [T, K] int32; none missing.
            divisor: the rank of an id is id // divisor.
            nodes: [num_ranks] int64; the node of each rank, from 0.
            node: this rank's own; other nodes and their ranks are elsewhere.
        """
        reached = torch.zeros(len(ids), len(nodes), device=ids.device)
        reached.scatter_(1, (ids // divisor).long(), 1.0)
        by_node = (reached @ F.one_hot(nodes).float()).long()  # [T, num_nodes]
        ranks, num_nodes, here = by_node.sum(1), (by_node > 0).sum(1), by_node[:, node]
        remote_nodes = num_nodes - (here > 0).long()
        return ranks, num_nodes, int((ranks - here).sum()), int(remote_nodes.sum())

    def group_pairs(self, ids: Tensor, first: int, divisor: int, num_groups: int) -> PairGroups:
        """Pairs by the groups (id - first) // divisor; ids of other groups belong to no pair.

        Args:
            ids: [R, K] int32, rows may be apart.
        """
        groups = torch.div(ids.flatten() - first, divisor, rounding_mode="floor")
        pair = ((groups >= 0) & (groups < num_groups)).nonzero().squeeze(1)  # row · K + choice
        groups = groups[pair]
        order = stable_order(groups, num_groups)
        numbers = torch.full((ids.numel(),), -1, device=ids.device)
        numbers[pair] = torch.arange(len(pair), device=ids.device)
        counts = torch.bincount(groups, minlength=num_groups)
        return PairGroups(counts, pair[order] // ids.shape[1], order, numbers.view(ids.shape))

    def pack(self, parts: Sequence[tuple[Tensor, Tensor | None]], packed: Tensor) -> None:
        """Put parts of rows side by side.

        Args:
            parts: each [num_rows, columns], of any dtype; or [num, columns] and the row of it that
                each row takes, [num_rows].
            packed: [num_rows, bytes of all]; to be filled.
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

    def gather_sum(
        self,
        values: Tensor | RowParts,
        places: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Sum some rows of `values`, in float32 and in the order given; zero where there are none.

        Args:
            values: [num_values, H].
            places: [R, M] int64; the rows that go into each sum, -1 for none.
            weights: [R, M] float32; None for ones.
            out: what is returned, if given.

        Returns:
            [R, H] in the dtype of `values`.
        """
        values = values.tensor() if isinstance(values, RowParts) else values
        total = values.new_zeros((len(places), values.shape[1]), dtype=torch.float32)
        for number, column in enumerate(places.unbind(1)):
            there = (column >= 0).nonzero().squeeze(1)
            rows = values[column[there]].float()
            if weights is not None:
                rows *= weights[there, number, None]
            total.index_add_(0, there, rows)  # no row twice
        return total.to(values.dtype) if out is None else out.copy_(total)

    def sum_parts(self, rows: RowParts, num_parts: int) -> Tensor:
        """[num_rows / num_parts, width]; equal parts added up, in float32 and in order."""
        whole = rows.tensor()
        parts = whole.view(num_parts, len(whole) // num_parts, rows.width)
        return parts.sum(dim=0, dtype=torch.float32).to(rows.dtype)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention of new tokens over the positions of their sequences.

    Args:
        query: [num_seqs, num_heads, num_scheduled, key_dim].
        keys, values: [num_seqs, num_kv_heads, num_positions, …].
        mask: [num_seqs or 1, 1, num_scheduled, num_positions]; addends to the logits.
        is_causal: query i sees positions 0 to i; without a mask.
        sinks: [num_heads] float32.

    Returns:
        [num_seqs, num_heads, num_scheduled, value_dim].
    """
    if sinks is None:
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    logits = (query @ keys.transpose(-1, -2)).float() * scale
    if is_causal:
        mask = logits.new_full(logits.shape[-2:], -torch.inf).triu(1)
    if mask is not None:
        logits = logits + mask
    sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values


def inverse(order: Tensor) -> Tensor:
    """[n]; where each of n things stands in an order of them."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def stable_order(values: Tensor, num_values: int) -> Tensor:
    """[n]; the order of values [n] that are less than `num_values`, equal ones as they stand."""
    if values.device.type == "cpu":
        narrow = values.numpy().astype(np.min_scalar_type(num_values))  # numpy then sorts by radix
        return torch.from_numpy(np.argsort(narrow, kind="stable"))
    return torch.argsort(values, stable=True)


def _num_equal_before(ids: Tensor) -> Tensor:
    """[n]; how many equal ids stand before each."""
    order = torch.argsort(ids, stable=True)
    ordered, places = ids[order], torch.arange(len(ids), device=ids.device)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(is_first, places, 0).cummax(0).values if len(ids) else places
    num_before = torch.empty_like(places)
    num_before[order] = places - start
    return num_before
