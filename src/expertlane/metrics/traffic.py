"""What travels between ranks, how far tokens spread, and where it is hottest.

All from step records and without torch. Of one deployment, for one phase or for all its steps:

    seen = summarise_traffic(layout, steps, ranks_per_node=8)
    seen.sent_bytes.sum(axis=0)[Traffic.PAYLOAD]  # [source, destination]
    by_link(seen.sent_bytes, 8)[Stage.DISPATCH, Traffic.PAYLOAD, Link.INTER_NODE]
    seen.fan_out.nodes_per_token, seen.fan_out.num_saved_copies

and of one step `sent_matrix(layout, step)`. What of the communication is exposed and what overlap
hides is in `stage_time`: `StageTime.exposed_s` and `hidden_communication`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.metrics.stragglers import LastArrivals, last_arrivals
from expertlane.results.step_record import RankRecord, StepRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FanOut:
    """Over how many experts, ranks and nodes the tokens spread; a token counts once a layer.

    Attributes:
        tokens_by_ranks_reached, tokens_by_nodes_reached: [world_size + 1].
        experts_per_token, ranks_per_token, nodes_per_token: means; the first is top-k.
        num_remote_rank_copies: (token, rank on another node) pairs: what crosses nodes where one
            copy goes to every rank.
        num_remote_node_copies: (token, other node) pairs: what has to cross at least.
    """

    tokens_by_ranks_reached: _Counts
    tokens_by_nodes_reached: _Counts
    experts_per_token: float
    ranks_per_token: float
    nodes_per_token: float
    num_remote_rank_copies: int
    num_remote_node_copies: int

    @property
    def num_saved_copies(self) -> int:
        """Copies that hierarchical dispatch keeps off the links between nodes."""
        return self.num_remote_rank_copies - self.num_remote_node_copies


@dataclass(frozen=True)
class HottestRank:
    """`over_mean`: its amount over the mean of the ranks compared; 1 is even."""

    rank: int
    amount: int
    over_mean: float


@dataclass(frozen=True)
class HottestExpert:
    """`share`: of its layer's token-expert pairs."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class HottestLayer:
    """The least even layer: token-expert pairs of its fullest expert over the mean."""

    layer: int
    max_over_mean: float


@dataclass(frozen=True, eq=False)
class TrafficMetrics:
    """The traffic of one deployment over some steps.

    Attributes:
        sent_bytes: [num_stages, num_kinds_of_traffic, source, destination]; global ranks.
        sent_bytes_of_step: [num_steps, num_kinds_of_traffic, 2 kinds of link].
        payload_error: root mean square of what rounding to a narrower payload changed, over that
            of the hidden states; None where nothing was rounded.
        fan_out: None where no dispatch counted any token.
        receiver: the rank to which most bytes of all kinds are sent; None where none are.
        busiest: the rank with most token-expert pairs, among those that report any of their
            expert tensor-parallel group; None where there are none.
        expert, layer: None where no expert got a token.
        last: how often each rank came last.
    """

    sent_bytes: _Counts
    sent_bytes_of_step: _Counts
    payload_error: float | None
    fan_out: FanOut | None
    receiver: HottestRank | None
    busiest: HottestRank | None
    expert: HottestExpert | None
    layer: HottestLayer | None
    last: LastArrivals


def summarise_traffic(
    layout: Layout, steps: Sequence[StepRecord], ranks_per_node: int
) -> TrafficMetrics:
    """Everything about the traffic of `steps`, of all replicas, in any order.

    Raises:
        ValueError: there are no steps, or one of them carries no rank records.
    """
    if not steps or not all(step.records for step in steps):
        raise ValueError("no steps, or a step without rank records: its plan did not ask for them")
    sent_bytes = np.zeros_like(sent_matrix(layout, steps[0]))
    of_steps = []
    for step in steps:
        matrix = sent_matrix(layout, step)
        sent_bytes += matrix
        of_steps.append(by_link(matrix.sum(axis=0), ranks_per_node))
    records = [record for step in steps for record in step.records]
    num_tokens: _Counts = np.sum([record.num_tokens_per_expert for record in records], axis=0)
    of_rank = np.zeros(layout.world_size, dtype=np.int64)
    for record in records:
        of_rank[record.rank] += record.num_tokens_per_expert.sum()
    reporting = [rank for rank in range(len(of_rank)) if not layout.coordinates(rank).etp_rank]
    return TrafficMetrics(
        sent_bytes=sent_bytes,
        sent_bytes_of_step=np.stack(of_steps),
        payload_error=_payload_error(records),
        fan_out=_fan_out(records, int(num_tokens.sum())),
        receiver=_hottest_rank(sent_bytes.sum(axis=(0, 1, 2)), range(layout.world_size)),
        busiest=_hottest_rank(of_rank, reporting),
        expert=_hottest_expert(num_tokens),
        layer=_hottest_layer(num_tokens),
        last=last_arrivals(layout, steps),
    )


def sent_matrix(layout: Layout, step: StepRecord) -> _Counts:
    """[num_stages, num_kinds_of_traffic, source, destination]; bytes of one step."""
    size = layout.world_size
    matrix = np.zeros((len(Stage), len(Traffic), size, size), dtype=np.int64)
    for record in step.records:
        matrix[:, :, record.rank] = record.sent_bytes
    return matrix


def by_link(sent_bytes: _Counts, ranks_per_node: int) -> _Counts:
    """Sum [..., source, destination] to [..., 2 kinds of link]."""
    node = np.arange(sent_bytes.shape[-1]) // ranks_per_node
    is_inside = node[:, None] == node
    of_link = np.empty((*sent_bytes.shape[:-2], len(Link)), dtype=np.int64)
    of_link[..., Link.INTRA_NODE] = sent_bytes[..., is_inside].sum(axis=-1)
    of_link[..., Link.INTER_NODE] = sent_bytes[..., ~is_inside].sum(axis=-1)
    return of_link


def _fan_out(records: Sequence[RankRecord], num_pairs: int) -> FanOut | None:
    by_ranks = np.sum([record.tokens_by_ranks_reached for record in records], axis=0)
    by_nodes = np.sum([record.tokens_by_nodes_reached for record in records], axis=0)
    num_tokens = int(by_ranks.sum())
    if not num_tokens:
        return None
    places = np.arange(len(by_ranks))
    return FanOut(
        tokens_by_ranks_reached=by_ranks,
        tokens_by_nodes_reached=by_nodes,
        experts_per_token=num_pairs / num_tokens,
        ranks_per_token=int(places @ by_ranks) / num_tokens,
        nodes_per_token=int(places @ by_nodes) / num_tokens,
        num_remote_rank_copies=sum(record.num_remote_rank_copies for record in records),
        num_remote_node_copies=sum(record.num_remote_node_copies for record in records),
    )


def _payload_error(records: Sequence[RankRecord]) -> float | None:
    error_squares, squares = np.sum([record.payload_squares for record in records], axis=0)
    return float(np.sqrt(error_squares / squares)) if squares else None


def _hottest_rank(amounts: _Counts, ranks: Sequence[int]) -> HottestRank | None:
    """The first of `ranks` with the largest amount; `amounts`: [world_size]."""
    compared = amounts[list(ranks)]
    if not compared.any():
        return None
    place = int(compared.argmax())
    most = int(compared[place])
    return HottestRank(ranks[place], most, most / float(compared.mean()))


def _hottest_expert(num_tokens: _Counts) -> HottestExpert | None:
    """By share of its layer, so that layers with a few more tokens do not win by that."""
    of_layer = num_tokens.sum(axis=1, keepdims=True)
    if not of_layer.any():
        return None
    shares = num_tokens / np.maximum(of_layer, 1)
    layer, expert = np.unravel_index(shares.argmax(), shares.shape)
    return HottestExpert(int(layer), int(expert), float(shares[layer, expert]))


def _hottest_layer(num_tokens: _Counts) -> HottestLayer | None:
    mean = num_tokens.mean(axis=1)
    if not mean.any():
        return None
    ratios = num_tokens.max(axis=1) / np.where(mean > 0, mean, 1.0)
    layer = int(ratios.argmax())
    return HottestLayer(layer, float(ratios[layer]))
