"""The `traffic` section of a deployment: who sent what to whom, and where it was hottest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from expertlane.results.estimate import Strict


@dataclass(frozen=True)
class TrafficBytes(Strict):
    """Bytes sent to other ranks over one kind of link; padding only fills static shapes."""

    payload: int
    metadata: int
    padding: int


@dataclass(frozen=True)
class FanOutResult(Strict):
    """How far tokens spread; a token counts once a layer.

    Attributes:
        experts_per_token, ranks_per_token, nodes_per_token: means.
        tokens_by_ranks_reached, tokens_by_nodes_reached: [num_ranks + 1]; tokens that reached
            0, 1, 2 … ranks or nodes, their own among them.
        num_remote_rank_copies: (token, rank on another node) pairs.
        num_remote_node_copies: (token, other node) pairs.
    """

    experts_per_token: float
    ranks_per_token: float
    nodes_per_token: float
    tokens_by_ranks_reached: tuple[int, ...]
    tokens_by_nodes_reached: tuple[int, ...]
    num_remote_rank_copies: int
    num_remote_node_copies: int

    @property
    def num_saved_copies(self) -> int:
        """What one copy a node keeps off the links between nodes, against one copy a rank."""
        return self.num_remote_rank_copies - self.num_remote_node_copies


@dataclass(frozen=True)
class HottestRankResult(Strict):
    """`amount`: bytes or token-expert pairs; `over_mean`: 1 is even."""

    rank: int
    amount: int
    over_mean: float


@dataclass(frozen=True)
class HottestExpertResult(Strict):
    """`share`: of its layer's token-expert pairs."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class HottestLayerResult(Strict):
    """The least even layer: its fullest expert over the mean."""

    layer: int
    max_over_mean: float


@dataclass(frozen=True)
class TrafficResult(Strict):
    """One phase of one deployment; sums over steps unless it says otherwise.

    Attributes:
        sent_bytes: by kind of traffic; [source][destination], global ranks.
        by_stage: by stage and link; the stages that sent anything.
        payload_bytes_of_step: by link; [num_steps].
        payload_error: root mean square of what rounding to a narrower payload changed, over that
            of the hidden states; None where nothing was rounded.
        fan_out: None where no dispatch counted any token.
        receiver: the rank to which most bytes are sent; None where none are.
        busiest: the rank with most token-expert pairs; None where there are none.
        expert, layer: None where no expert got a token.
        num_last_arrivals: [num_ranks]; how often each rank was the last of its pipeline stage to
            come to a dispatch or a combine.
        num_meetings: [num_ranks]; how many of those its stage had at which somebody waited.
    """

    sent_bytes: dict[str, tuple[tuple[int, ...], ...]]
    by_stage: dict[str, dict[str, TrafficBytes]]
    payload_bytes_of_step: dict[str, tuple[int, ...]]
    payload_error: float | None
    fan_out: FanOutResult | None
    receiver: HottestRankResult | None
    busiest: HottestRankResult | None
    expert: HottestExpertResult | None
    layer: HottestLayerResult | None
    num_last_arrivals: tuple[int, ...]
    num_meetings: tuple[int, ...]

    @property
    def straggler(self) -> int | None:
        """The rank that came last to the largest share of its meetings; None without meetings."""
        ranks = [rank for rank, num in enumerate(self.num_meetings) if num]
        return max(ranks, key=self.last_share, default=None)

    def last_share(self, rank: int) -> float:
        """At how many of its stage's meetings a rank came last."""
        return self.num_last_arrivals[rank] / self.num_meetings[rank]


@dataclass(frozen=True)
class FanOut(Strict):
    """How far tokens spread; a token counts once a layer.

    Attributes:
        tokens_by_ranks_reached, tokens_by_nodes_reached: tokens that reached 0, 1, 2 … ranks or
            nodes, their own among them.
        experts_per_token: mean.
        num_remote_rank_copies: (token, rank on another node) pairs: what crosses nodes where one
            copy goes to every rank.
        num_remote_node_copies: (token, other node) pairs: what has to cross at least.
    """

    tokens_by_ranks_reached: tuple[int, ...]
    tokens_by_nodes_reached: tuple[int, ...] = ()
    experts_per_token: float | None = None
    num_remote_rank_copies: int | None = None
    num_remote_node_copies: int | None = None

    @property
    def ranks_per_token(self) -> float:
        """Mean."""
        return _mean_place(self.tokens_by_ranks_reached)

    @property
    def nodes_per_token(self) -> float | None:
        """Mean."""
        nodes = self.tokens_by_nodes_reached
        return _mean_place(nodes) if nodes else None

    @property
    def num_saved_copies(self) -> int | None:
        """What one copy a node keeps off the links between nodes, against one copy a rank."""
        ranks, nodes = self.num_remote_rank_copies, self.num_remote_node_copies
        return None if ranks is None or nodes is None else ranks - nodes


def _mean_place(counts: Sequence[int]) -> float:
    return sum(place * num for place, num in enumerate(counts)) / (sum(counts) or 1)


@dataclass(frozen=True)
class HottestRank(Strict):
    """`amount`: bytes or token-expert pairs; `over_mean`: 1 is even."""

    rank: int
    amount: int
    over_mean: float


@dataclass(frozen=True)
class HottestExpert(Strict):
    """`share`: of its layer's token-expert pairs."""

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
    """Who sent what to whom, and where it was hottest; sums over steps unless it says otherwise.

    Attributes:
        by_link: to other ranks.
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
        num_last_arrivals: [num_ranks]; how often each rank was the last of its pipeline stage to
            come to a dispatch or a combine.
        num_meetings: [num_ranks]; how many of those its stage had at which somebody waited.
        busiest_over_mean: token-expert pairs of a layer's busiest rank over the mean of ranks; mean
            over layers and steps.
    """

    by_link: dict[str, TrafficBytes]
    sent_bytes: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
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
        """At how many of its stage's meetings a rank came last."""
        return self.num_last_arrivals[rank] / self.num_meetings[rank]
