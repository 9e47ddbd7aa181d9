"""Hand-made step records for tests of metrics and of what is made from them."""

from collections.abc import Mapping, Sequence

import numpy as np

from expertlane.spec.names import Phase, Stage
from expertlane.spec.record import RankRecord, StepRecord

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
    sent: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    num_collectives: int = 0,
) -> RankRecord:
    """One rank's record; `flops` and `weight_bytes` count in EXPERTS, collectives in DISPATCH."""
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

    return RankRecord(
        rank=rank,
        wall_s=times(wall),
        cpu_s=times(cpu),
        blocked_s=times(blocked),
        process_cpu_s=process_cpu_s,
        flops=at(Stage.EXPERTS, flops),
        weight_bytes=at(Stage.EXPERTS, weight_bytes),
        kv_bytes=kv_bytes,
        sent_bytes=np.array(sent, dtype=np.int64),
        num_collectives=at(Stage.DISPATCH, num_collectives),
        num_tokens_per_expert=num_tokens,
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
