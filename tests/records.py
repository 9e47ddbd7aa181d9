"""Hand-made step records for tests of metrics and of what is made from them."""

from collections.abc import Mapping, Sequence

import numpy as np

from expertlane.results.step_record import RankRecord, StepRecord
from expertlane.spec.names import Link, Phase, Stage, Traffic

Times = Mapping[tuple[int, int, Stage], float]  # (micro-batch, layer slot, stage) to seconds


def rank_record(
    rank: int,
    *,
    wall: Times | None = None,
    cpu: Times | None = None,
    blocked: Times | None = None,
    process_cpu_s: float = 0.0,
    num_micro_batches: int = 1,
    tokens: Sequence[Sequence[int]] = ((0, 0),),
    flops: int = 0,
    weight_bytes: int = 0,
    kv_bytes: int = 0,
    sent: Mapping[tuple[Stage, Traffic, int], int] | None = None,
    world_size: int = 1,
    num_collectives: int = 0,
    by_ranks_reached: Sequence[int] = (),
    by_nodes_reached: Sequence[int] = (),
    num_remote_copies: tuple[int, int] = (0, 0),
) -> RankRecord:
    """One rank's record; `flops` and `weight_bytes` count in EXPERTS, collectives in DISPATCH.

    Args:
        sent: (stage, traffic, to rank) to bytes.
        by_ranks_reached, by_nodes_reached: the histograms' first places; the rest is 0.
        num_remote_copies: of ranks, of nodes.
    """
    num_tokens = np.array(tokens, dtype=np.int64)

    def times(given: Times | None) -> np.ndarray:
        array = np.zeros((num_micro_batches, len(num_tokens) + 1, len(Stage)))
        for place, seconds in (given or {}).items():
            array[place] = seconds
        return array

    def at(stage: Stage, count: int) -> np.ndarray:
        counts = np.zeros(len(Stage), dtype=np.int64)
        counts[stage] = count
        return counts

    sent_bytes = np.zeros((len(Stage), len(Traffic), world_size), dtype=np.int64)
    for place, num_bytes in (sent or {}).items():
        sent_bytes[place] = num_bytes
    histograms = np.zeros((2, world_size + 1), dtype=np.int64)
    for histogram, given in zip(histograms, (by_ranks_reached, by_nodes_reached), strict=True):
        histogram[: len(given)] = given
    return RankRecord(
        rank=rank,
        wall_s=times(wall),
        cpu_s=times(cpu),
        blocked_s=times(blocked),
        process_cpu_s=process_cpu_s,
        flops=at(Stage.EXPERTS, flops),
        weight_bytes=at(Stage.EXPERTS, weight_bytes),
        kv_bytes=kv_bytes,
        sent_bytes=sent_bytes,
        num_collectives=at(Stage.DISPATCH, num_collectives),
        num_tokens_per_expert=num_tokens,
        tokens_by_ranks_reached=histograms[0],
        tokens_by_nodes_reached=histograms[1],
        num_remote_rank_copies=num_remote_copies[0],
        num_remote_node_copies=num_remote_copies[1],
    )


def sent_over(
    record: RankRecord, traffic: Traffic, link: Link = Link.INTRA_NODE, ranks_per_node: int = 8
) -> int:
    """Bytes a rank sent in all stages over one kind of link."""
    own_node = record.rank // ranks_per_node
    to_ranks = record.sent_bytes.sum(axis=0)[traffic].tolist()
    is_link = {True: Link.INTRA_NODE, False: Link.INTER_NODE}
    return sum(
        num_bytes
        for rank, num_bytes in enumerate(to_ranks)
        if is_link[rank // ranks_per_node == own_node] is link
    )


def step_record(
    submitted_s: float,
    finished_s: float,
    seq_ids: Sequence[int],
    records: Sequence[RankRecord],
    *,
    phase: Phase = Phase.DECODE,
    replica: int = 0,
    num_tokens: int | None = None,
) -> StepRecord:
    """One step; one token a sequence unless `num_tokens` says otherwise."""
    return StepRecord(
        phase=phase,
        replica=replica,
        num_micro_batches=len(records[0].wall_s) if records else 1,
        seq_ids=tuple(seq_ids),
        num_tokens=len(seq_ids) if num_tokens is None else num_tokens,
        submitted_s=submitted_s,
        finished_s=finished_s,
        records=tuple(records),
    )
