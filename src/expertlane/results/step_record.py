"""Measurements and counters of one step."""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


@dataclass(frozen=True, eq=False)
class RankEvents:
    """Intervals of one rank's time in a step, N of them.

    Attributes:
        start_s: origin of the times, on a clock that ranks of one host share.
        track: [N]; places in `list(Track)`.
        stage: [N].
        layer: [N]; hidden layer, -1 outside of any.
        micro_batch: [N].
        begin_s, end_s: [N]; from `start_s`.
        flops, num_bytes: [N]; where they are known for each interval, else empty. Bytes are sent
            on the network, read on the others.
    """

    start_s: float
    track: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    micro_batch: npt.NDArray[np.int64]
    begin_s: npt.NDArray[np.float64]
    end_s: npt.NDArray[np.float64]
    flops: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    num_bytes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Action(IntEnum):
    """Kind of an entry of `RankOperations`."""

    COMPUTE = 0
    POST = 1  # begin a transfer
    WAIT = 2  # need its result
    ARRIVE = 3  # need what the previous pipeline stage sends


@dataclass(frozen=True, eq=False)
class RankOperations:
    """The operations of one rank in a step, in order: N entries and M transfers.

    Attributes:
        action: [N]; an `Action`.
        stage, layer, micro_batch: [N]; layer -1 outside of any.
        cpu_s: [N]; CPU time of the rank's thread where it computes, else 0.
        transfer: [N]; index of the transfer that is started or waited for, -1 for none.
        kind: [M]; place in `list(TransferKind)`.
        first_rank: [M]; the lowest global rank of the group.
        sent_bytes: [M, world_size]; bytes to each global rank, 0 for this one.
    """

    action: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    micro_batch: npt.NDArray[np.int64]
    cpu_s: npt.NDArray[np.float64]
    transfer: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int64]
    first_rank: npt.NDArray[np.int64]
    sent_bytes: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankWaits:
    """Each wait of a rank for others in a step, in order, N of them.

    Attributes:
        cell: [N]; places in the flattened times of a `RankRecord`.
        blocked_s: [N].
    """

    cell: npt.NDArray[np.int64]
    blocked_s: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RankCounts:
    """Counters of one rank over one step.

    Attributes:
        rank: global rank.
        flops: [num_stages]; floating-point operations, a multiply and an add counted as two.
        weight_bytes: [num_stages]; weights read, each matrix once per use.
        kv_bytes: keys and values read from the cache.
        sent_bytes: [num_stages, num_kinds_of_traffic, world_size]; bytes sent to each global rank;
            0 for this one.
        num_collectives: [num_stages]; collectives and point-to-point sends this rank began.
        num_tokens_per_expert: [num_layers, num_experts]; token-expert pairs this rank computed;
            zero where another rank of its expert tensor-parallel group reports them.
        tokens_by_ranks_reached: [world_size + 1]; number of its own tokens, summed over layers,
            with experts on so many ranks.
        tokens_by_nodes_reached: [world_size + 1]; likewise by nodes.
        num_remote_rank_copies: (token, rank on another node) pairs among them: what crosses nodes
            with one copy a rank.
        num_remote_node_copies: (token, other node) pairs: what crosses with one copy a node.
    """

    rank: int
    flops: npt.NDArray[np.int64]
    weight_bytes: npt.NDArray[np.int64]
    kv_bytes: int
    sent_bytes: npt.NDArray[np.int64]
    num_collectives: npt.NDArray[np.int64]
    num_tokens_per_expert: npt.NDArray[np.int64]
    tokens_by_ranks_reached: npt.NDArray[np.int64]
    tokens_by_nodes_reached: npt.NDArray[np.int64]
    num_remote_rank_copies: int
    num_remote_node_copies: int


@dataclass(frozen=True, eq=False)
class RankRecord(RankCounts):
    """Times and counters of one rank over one step.

    The slot axis of the times is the model's layers followed by one slot for what is outside any
    layer (embedding, PP transfer, head, waiting for the plan); a rank fills only its own layers.

    Attributes:
        wall_s: [num_micro_batches, num_layers + 1, num_stages]; wall time.
        cpu_s: same shape; CPU time of the rank's main thread.
        blocked_s: same shape; the part of `wall_s` spent blocked in a wait for other ranks.
        waits: of which `blocked_s` is the sum; None in virtual time.
        process_cpu_s: CPU time of all threads of the rank during the step.
        payload_squares: [2]; of hidden states that travelled in a narrower type, the sum of the
            squares of what rounding changed, and of the hidden states themselves.
        topk_ids: by MoE layer of this rank's stage, [num_tokens, num_experts_per_tok] int32; the
            logical experts that its own tokens chose, in the order of computation, which is the
            same in all layers. Empty unless the plan asked for it.
        events: intervals of its time; None unless the plan asked for them.
        operations: for replay; None unless the plan asked for them.
        transfers_s: [2]; in virtual time, seconds that dispatch and combine were in flight, and
            those of them that the rank waited for; else None.
    """

    wall_s: npt.NDArray[np.float64]
    cpu_s: npt.NDArray[np.float64]
    blocked_s: npt.NDArray[np.float64]
    process_cpu_s: float
    waits: RankWaits | None = None
    payload_squares: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    topk_ids: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    events: RankEvents | None = None
    operations: RankOperations | None = None
    transfers_s: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One finished step, for metrics.

    Attributes:
        seq_ids: the sequences that got a new token.
        num_tokens: tokens computed: prompt tokens in a prefill, one a sequence in decoding.
        submitted_s, finished_s: on the runner's clock.
        records: one a rank of the replica.
        run: repetition of the workload that it belongs to.
        spell: steps of one phase with none of the other in between; counted within a run.
    """

    phase: Phase
    replica: int
    num_micro_batches: int
    seq_ids: tuple[int, ...]
    num_tokens: int
    submitted_s: float
    finished_s: float
    records: tuple[RankRecord, ...]
    run: int = 0
    spell: int = 0


def by_pipeline_stage(layout: Layout, step: StepRecord) -> dict[int, list[RankRecord]]:
    """The records of the ranks of each pipeline stage."""
    groups = defaultdict(list)
    for record in step.records:
        groups[layout.coordinates(record.rank).pp_rank].append(record)
    return groups


@dataclass(frozen=True, eq=False)
class RankTotals:
    """Totals of one rank, E of whose experts have had tokens.

    Attributes:
        num_steps: steps that it took part in.
        spent_ns: [num_stages]; wall time, waits included.
        waited_ns: [num_stages]; the part of it spent waiting for other ranks.
        experts: [E]; logical experts that it computed in any layer.
        num_tokens: [num_layers, E]; token-expert pairs that it computed; zero where another rank
            of its expert tensor-parallel group reports them.
        sent_bytes: [num_links]; bytes sent to other ranks, weights of moved experts included.
        overlapped_ns: time of transfers within steps and a pipeline stage, from their begin
            until their result was needed.
        exposed_ns: waiting time for the results of these transfers.
    """

    num_steps: int
    spent_ns: npt.NDArray[np.int64]
    waited_ns: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    sent_bytes: npt.NDArray[np.int64]
    overlapped_ns: int
    exposed_ns: int

    def nothing(self) -> "RankTotals":
        """Totals of an idle rank of the same model."""
        none = self.experts[:0], self.num_tokens[:, :0], np.zeros_like(self.sent_bytes)
        times = np.zeros_like(self.spent_ns), np.zeros_like(self.waited_ns)
        return RankTotals(0, *times, *none, 0, 0)

    def __add__(self, other: "RankTotals") -> "RankTotals":
        """The sum of two totals, as of a rank and the one that it replaced."""
        experts = np.union1d(self.experts, other.experts)
        num_tokens = np.zeros((len(self.num_tokens), len(experts)), dtype=np.int64)
        for each in (self, other):
            num_tokens[:, np.searchsorted(experts, each.experts)] += each.num_tokens
        sums = {
            name: value + getattr(other, name)
            for name, value in vars(self).items()
            if name not in ("experts", "num_tokens")
        }
        return RankTotals(**sums, experts=experts, num_tokens=num_tokens)
