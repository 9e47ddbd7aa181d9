"""Flat all-to-all dispatch and combine: tokens travel to the ranks of their experts and back.

A token is sent once to each expert-parallel rank it reaches (at the sender's own etp_rank), then
gathered over the expert tensor-parallel group; expert outputs take the same way back, one row for
every token-expert pair, and are summed at home in float32 in the order of the token's choices. So
the sum does not depend on which rank computed what. Without expert parallelism (ep = 1) every rank
has all of a token's experts, so the router's weights travel with it and one row comes back.

Shapes: T tokens of this rank, K = top_k, R rows received, P token-expert pairs received,
H = hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.kernels.cpu import kernels_for
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh

_ID = torch.int32
_ID_BYTES = 4
_ROWS, _PAIRS = 0, 1


@dataclass(frozen=True)
class Dispatched:
    """Tokens that arrived, and the way back for their results.

    Attributes:
        rows: [P, H]; the input of the experts, grouped by expert.
        weights: [R, K] float32; the router's weights of the rows; None if ep > 1.
        num_tokens_per_expert: [num_local_experts].
        order: [P]; which pair, in order of arrival, stands at each place of `rows`.
        returns_to_etp_rank: [etp]; how many rows go back to each rank of the etp group.
        pairs_from: [ep]; of this rank's own, how many came from each ep rank.
        pairs_to: [ep]; how many pairs this rank sent to each ep rank.
        send_order: [T·K]; the pair (token·K + choice) at each place of what was sent.
    """

    rows: Tensor
    weights: Tensor | None
    num_tokens_per_expert: list[int]
    order: Tensor
    returns_to_etp_rank: list[int]
    pairs_from: list[int]
    pairs_to: list[int]
    send_order: Tensor


class AllToAllDispatcher:
    """Sends every token to the ranks that hold its experts; drops none, whatever the load."""

    def __init__(self, mesh: ParallelMesh, placement: Placement, device: torch.device) -> None:
        self._mesh = mesh
        self._num_local_experts = len(placement.experts_of_rank[mesh.at.ep_rank])
        self._rank_of_expert = torch.tensor(placement.rank_of_expert(), device=device)
        first = [experts.start for experts in placement.experts_of_rank]
        self._first_of_rank = torch.tensor(first, device=device)

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[Dispatched]:
        """Send this rank's tokens and receive those for its experts.

        Args:
            x: [T, H].
            topk_ids: [T, K]; logical experts.
            topk_weights: [T, K] float32.
            tokens_of_stage_rank: [dp·tp]; tokens owned by each rank of the stage.
        """
        ep, top_k = self._mesh.layout.ep, topk_ids.shape[1]
        rank_of_pair = self._rank_of_expert[topk_ids]  # [T, K]
        reached = torch.zeros(len(x), ep, dtype=torch.bool, device=x.device)
        reached.scatter_(1, rank_of_pair, True)
        if ep == 1:
            counts = np.array([[[n, n * top_k]] for n in tokens_of_stage_rank])
        else:
            pairs = torch.bincount(rank_of_pair.flatten(), minlength=ep)
            own_counts = torch.stack([reached.sum(0), pairs], dim=1)  # [ep, 2]
            width = own_counts.numel() * own_counts.itemsize
            gathered = yield self._mesh.stage.all_gather(
                own_counts.view(1, -1), [1] * self._mesh.stage.size, metadata_bytes=width
            )
            counts = gathered.view(-1, ep, 2).cpu().numpy()
        weights = topk_weights if ep == 1 else None
        rows, ids, weights = yield from self._exchange(
            x, topk_ids, weights, rank_of_pair, reached, counts
        )
        return self._group_by_expert(rows, ids, weights, rank_of_pair, counts)

    def _exchange(
        self,
        x: Tensor,
        topk_ids: Tensor,
        weights: Tensor | None,
        rank_of_pair: Tensor,
        reached: Tensor,
        counts: npt.NDArray[np.int64],
    ) -> Steps[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows for this rank's experts [R, H], local experts [R, K] or -1, and weights [R, K]."""
        mesh = self._mesh
        to_rank, token = reached.t().nonzero(as_tuple=True)  # by rank, then token
        here = rank_of_pair[token] == to_rank[:, None]
        local = topk_ids[token] - self._first_of_rank[to_rank][:, None]
        ids = torch.where(here, local, -1).to(_ID)
        if mesh.stage.size == 1:
            return x, ids, weights
        ep, etp, at = mesh.layout.ep, mesh.layout.etp, mesh.at
        id_bytes = ids.shape[1] * _ID_BYTES
        metadata = id_bytes if weights is None else 2 * id_bytes  # a weight is as long as an id
        packed = torch.empty(
            (len(ids), metadata + x.shape[1] * x.itemsize), dtype=torch.uint8, device=x.device
        )
        packed[:, :id_bytes].view(_ID)[:] = ids
        if weights is not None:
            packed[:, id_bytes:metadata].view(torch.float32)[:] = weights[token]
        packed[:, metadata:].view(x.dtype)[:] = x[token]
        arriving = counts[:, at.ep_rank, _ROWS].reshape(ep, etp)  # from (ep_rank, etp_rank)
        if ep > 1:
            send = counts[at.ep_rank * etp + at.etp_rank, :, _ROWS].tolist()
            packed = yield mesh.ep.all_to_all(
                packed, send, arriving[:, at.etp_rank].tolist(), metadata_bytes=metadata
            )
        if etp > 1:
            packed = yield mesh.etp.all_gather(
                packed, arriving.sum(axis=0).tolist(), metadata_bytes=metadata
            )
        if weights is not None:
            weights = packed[:, id_bytes:metadata].view(torch.float32)
        return packed[:, metadata:].view(x.dtype), packed[:, :id_bytes].view(_ID), weights

    def _group_by_expert(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor | None,
        rank_of_pair: Tensor,
        counts: npt.NDArray[np.int64],
    ) -> Dispatched:
        layout, at = self._mesh.layout, self._mesh.at
        row_of_pair, choice = (ids >= 0).nonzero(as_tuple=True)
        expert_of_pair = ids[row_of_pair, choice].long()
        order, num_tokens = _by_expert(expert_of_pair, self._num_local_experts)
        arrived = counts[:, at.ep_rank, _PAIRS].reshape(layout.ep, layout.etp)
        returning = arrived if weights is None else counts[:, 0, _ROWS].reshape(1, layout.etp)
        return Dispatched(
            rows=rows[row_of_pair[order]],
            weights=weights,
            num_tokens_per_expert=num_tokens,
            order=order,
            returns_to_etp_rank=returning.sum(axis=0).tolist(),
            pairs_from=arrived[:, at.etp_rank].tolist(),
            pairs_to=counts[at.ep_rank * layout.etp + at.etp_rank, :, _PAIRS].tolist(),
            send_order=torch.argsort(rank_of_pair.flatten(), stable=True),
        )

    def combine(self, sent: Dispatched, results: Tensor, topk_weights: Tensor) -> Steps[Tensor]:
        """Bring expert outputs home and sum them by the router's weights.

        Args:
            results: [P, H]; outputs of the experts for `sent.rows`, partial sums under etp.
            topk_weights: [T, K] float32.

        Returns:
            [T, H] in the dtype of `results`.
        """
        mesh = self._mesh
        arrived = torch.empty_like(results)
        arrived[sent.order] = results
        if sent.weights is not None:
            arrived = _weighted_sum(arrived, sent.weights)
        if mesh.layout.etp > 1:
            arrived = yield mesh.etp.reduce_scatter(arrived, sent.returns_to_etp_rank)
        if sent.weights is not None:
            return arrived
        if mesh.layout.ep > 1:
            arrived = yield mesh.ep.all_to_all(arrived, sent.pairs_from, sent.pairs_to)
        of_pair = torch.empty_like(arrived)
        of_pair[sent.send_order] = arrived
        return _weighted_sum(of_pair, topk_weights)


class LocalDispatcher:
    """What `AllToAllDispatcher` does where one rank holds all experts and all tokens."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[Dispatched]:
        """Group tokens by expert; as `AllToAllDispatcher.dispatch`."""
        order, num_tokens = _by_expert(topk_ids.flatten(), self._num_experts)
        rows = x.index_select(0, order // topk_ids.shape[1])
        return Dispatched(rows, topk_weights, num_tokens, order, [], [], [], order)
        yield  # a generator like the other's, though it never waits

    def combine(self, sent: Dispatched, results: Tensor, topk_weights: Tensor) -> Steps[Tensor]:
        """Sum the outputs of each token's experts; as `AllToAllDispatcher.combine`."""
        kernels = kernels_for(results) if results.shape[1] % 16 == 0 else None
        if kernels is not None:
            places = torch.empty_like(sent.order)
            places[sent.order] = torch.arange(len(places))
            return kernels.weighted_sum(results, places, topk_weights)
        of_pair = torch.empty_like(results).index_copy_(0, sent.order, results)
        return _weighted_sum(of_pair, topk_weights)
        yield


def _by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The order of pairs by expert, stable, and how many pairs each expert has."""
    if experts.device.type == "cpu":  # numpy takes a tenth of torch's time for the few of a step
        on_host = experts.numpy()
        order = torch.from_numpy(np.argsort(on_host, kind="stable"))
        return order, np.bincount(on_host, minlength=num_experts).tolist()
    counts: list[int] = torch.bincount(experts, minlength=num_experts).tolist()
    return torch.argsort(experts, stable=True), counts


def _weighted_sum(of_pair: Tensor, weights: Tensor) -> Tensor:
    """[T, H] of rows [T · K, H] and weights [T, K]; summed in float32."""
    rows = of_pair.view(*weights.shape, of_pair.shape[1])
    return (rows.float() * weights[:, :, None]).sum(dim=1).to(of_pair.dtype)
