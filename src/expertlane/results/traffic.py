"""Traffic between ranks, fan-out of tokens, and hot spots.

Of one deployment, for one phase or for all its steps:

    seen = traffic_record(layout, steps, ranks_per_node=8)
    seen.sent_bytes["payload"][source][destination]
    seen.by_stage["dispatch"]["inter-node"].payload
    seen.fan_out.nodes_per_token

and of one step `sent_matrix(layout, step)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import numpy.typing as npt

from expertlane.results.step_record import RankRecord, StepRecord, by_pipeline_stage
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic
from expertlane.spec.ranges import Strict, Valid

_Counts = npt.NDArray[np.int64]


_Square = Annotated[
    tuple[tuple[int, ...], ...],
    Valid(
        lambda rows: (
            bool(rows)
            and {*map(len, rows)} == {len(rows)}
            and all(num >= 0 for row in rows for num in row)
            and not any(row[rank] for rank, row in enumerate(rows))
        ),
        "as many rows as each has numbers, from 0 on, 0 from a rank to itself",
    ),
]
_Reached = Annotated[tuple[int, ...], Valid(lambda nums: not nums or min(nums) >= 0, "from 0 on")]


@dataclass(frozen=True)
class TrafficBytes(Strict):
    """Bytes sent to other ranks over one kind of link; padding only fills static shapes."""

    payload: int
    metadata: int
    padding: int


@dataclass(frozen=True)
class FanOut(Strict):
    """Ranks and nodes that tokens reach; a token counts once a layer.

    Attributes:
        tokens_by_ranks_reached, tokens_by_nodes_reached: tokens that reached 0, 1, 2 … ranks or
            nodes, their own among them.
        experts_per_token: mean over tokens.
        num_remote_rank_copies: (token, rank on another node) pairs: what crosses nodes where one
            copy goes to every rank.
        num_remote_node_copies: (token, other node) pairs: what has to cross at least.
    """

    tokens_by_ranks_reached: _Reached
    tokens_by_nodes_reached: _Reached = ()
    experts_per_token: float | None = None
    num_remote_rank_copies: int | None = None
    num_remote_node_copies: int | None = None

    @property
    def ranks_per_token(self) -> float:
        """Mean over tokens and layers."""
        return _mean_place(self.tokens_by_ranks_reached)

    @property
    def nodes_per_token(self) -> float | None:
        """Mean over tokens and layers."""
        nodes = self.tokens_by_nodes_reached
        return _mean_place(nodes) if nodes else None


def _mean_place(counts: Sequence[int]) -> float:
    return sum(place * num for place, num in enumerate(counts)) / (sum(counts) or 1)


@dataclass(frozen=True)
class HottestRank(Strict):
    """The rank with the largest `amount`, bytes or token-expert pairs; `over_mean`: 1 is even."""

    rank: int
    amount: int
    over_mean: float


@dataclass(frozen=True)
class HottestExpert(Strict):
    """The expert with the largest `share` of its layer's token-expert pairs."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class HottestLayer(Strict):
    """The least even layer: its fullest expert over the mean."""

    layer: int
    max_over_mean: float


@dataclass(frozen=True)
class TrafficRecord(Strict):
    """Bytes between ranks, and where traffic is hottest; sums over steps unless it says otherwise.

    Attributes:
        by_link: bytes sent to other ranks.
        sent_bytes: by kind of traffic; [source][destination], ranks of the deployment. Simulated:
            payload alone, of the largest step, between the ranks of one replica.
        by_stage: by stage and link; the stages that sent anything.
        payload_bytes_of_step: by link; [num_steps].
        payload_error: root mean square of what rounding to a narrower payload changed, over that
            of the hidden states; None where nothing was rounded.
        fan_out: None where no dispatch counted any token. Simulated: of the largest step.
        receiver: the rank to which most bytes are sent; None where none are.
        busiest: the rank with most token-expert pairs, of those that report any of their expert
            tensor-parallel group; None where there are none.
        expert, layer: None where no expert got a token.
        num_last_arrivals: [num_ranks]; times that each rank was the last of its pipeline stage to
            come to a dispatch or a combine.
        num_meetings: [num_ranks]; meetings of its stage at which any rank waited.
        busiest_over_mean: token-expert pairs of a layer's busiest rank over the mean of ranks; mean
            over layers and steps.
    """

    by_link: dict[str, TrafficBytes]
    sent_bytes: dict[str, _Square] = field(default_factory=dict)
    by_stage: dict[str, dict[str, TrafficBytes]] = field(default_factory=dict)
    payload_bytes_of_step: dict[str, tuple[int, ...]] = field(default_factory=dict)
    payload_error: float | None = None
    fan_out: FanOut | None = None
    receiver: HottestRank | None = None
    busiest: HottestRank | None = None
    expert: HottestExpert | None = None
    layer: HottestLayer | None = None
    num_last_arrivals: tuple[int, ...] = ()
    num_meetings: tuple[int, ...] = ()
    busiest_over_mean: float | None = None

    @property
    def straggler(self) -> int | None:
        """The rank that came last to the largest share of its meetings; None without meetings."""
        ranks = [rank for rank, num in enumerate(self.num_meetings) if num]
        return max(ranks, key=self.last_share, default=None)

    def last_share(self, rank: int) -> float:
        """Share of its stage's meetings to which a rank came last."""
        return self.num_last_arrivals[rank] / self.num_meetings[rank]


def traffic_record(
    layout: Layout, steps: Sequence[StepRecord], ranks_per_node: int
) -> TrafficRecord:
    """Traffic of `steps`, of all replicas, in any order.

    Raises:
        ValueError: there are no steps, or one of them carries no rank records.
    """
    if not steps or not all(step.records for step in steps):
        raise ValueError("no steps, or a step without rank records: its plan did not ask for them")
    sent_bytes = np.zeros_like(sent_matrix(layout, steps[0]))
    payload_of_step = []
    for step in steps:
        matrix = sent_matrix(layout, step)
        sent_bytes += matrix
        payload_of_step.append(by_link(matrix[:, Traffic.PAYLOAD].sum(axis=0), ranks_per_node))
    of_links = np.stack(payload_of_step, axis=1)  # [num_links, num_steps]
    of_kinds = sent_bytes.sum(axis=0)
    records = [record for step in steps for record in step.records]
    num_tokens: _Counts = np.sum([record.num_tokens_per_expert for record in records], axis=0)
    of_rank = np.zeros(layout.world_size, dtype=np.int64)
    for record in records:
        of_rank[record.rank] += record.num_tokens_per_expert.sum()
    reporting = [rank for rank in range(len(of_rank)) if not layout.coordinates(rank).etp_rank]
    num_last, num_meetings = last_arrivals(layout, steps)
    return TrafficRecord(
        by_link=bytes_by_link(by_link(of_kinds, ranks_per_node).T),
        sent_bytes={kind.label: tuple(map(_counts, of_kinds[kind])) for kind in Traffic},
        by_stage={
            stage.label: bytes_by_link(by_link(sent_bytes[stage], ranks_per_node).T)
            for stage in Stage
            if sent_bytes[stage].any()
        },
        payload_bytes_of_step={link.label: _counts(of_links[link]) for link in Link},
        payload_error=_payload_error(records),
        fan_out=_fan_out(records, int(num_tokens.sum())),
        receiver=_hottest_rank(of_kinds.sum(axis=(0, 1)), range(layout.world_size)),
        busiest=_hottest_rank(of_rank, reporting),
        expert=_hottest_expert(num_tokens),
        layer=_hottest_layer(num_tokens),
        num_last_arrivals=_counts(num_last),
        num_meetings=_counts(num_meetings),
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


def bytes_by_link(of_links: _Counts) -> dict[str, TrafficBytes]:
    """Bytes by the label of a link, from [num_links, num_kinds_of_traffic]."""
    return {link.label: TrafficBytes(*_counts(of_links[link])) for link in Link}


def last_arrivals(layout: Layout, steps: Sequence[StepRecord]) -> tuple[_Counts, _Counts]:
    """Times that each rank came last to its pipeline stage's meetings, and number of meetings.

    Last is the rank that was blocked least. A meeting is one (step, micro-batch, layer) of dispatch
    or of combine, of one pipeline stage of one replica, at which somebody waited: where all were
    blocked equally long, nobody was last. Both are [world_size].
    """
    num_last, num_meetings = np.zeros((2, layout.world_size), dtype=np.int64)
    for step in steps:
        for records in by_pipeline_stage(layout, step).values():
            ranks = [record.rank for record in records]
            blocked = np.stack([record.blocked_s for record in records])
            blocked_s = blocked[..., [Stage.DISPATCH, Stage.COMBINE]]
            waited = blocked_s.max(axis=0) > blocked_s.min(axis=0)
            last = blocked_s.argmin(axis=0)[waited]
            num_last[ranks] += np.bincount(last, minlength=len(ranks))
            num_meetings[ranks] += len(last)
    return num_last, num_meetings


def _counts(values: _Counts) -> tuple[int, ...]:
    return tuple(map(int, values))


def _fan_out(records: Sequence[RankRecord], num_pairs: int) -> FanOut | None:
    by_ranks = np.sum([record.tokens_by_ranks_reached for record in records], axis=0)
    by_nodes = np.sum([record.tokens_by_nodes_reached for record in records], axis=0)
    num_tokens = int(by_ranks.sum())
    if not num_tokens:
        return None
    return FanOut(
        tokens_by_ranks_reached=_counts(by_ranks),
        tokens_by_nodes_reached=_counts(by_nodes),
        experts_per_token=num_pairs / num_tokens,
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
    """The expert with the largest share of its layer's tokens, however few those are."""
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
