"""Random step plans for tests of counts: mixed, empty and uneven batches."""

from collections.abc import Sequence

import numpy as np

from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase

BLOCK_SIZE = 4
MAX_POSITIONS = 32
MAX_SEQS = 8  # of a data-parallel rank, over all micro-batches

# What the sequences of a data-parallel rank's batch may be: (new tokens, positions cached).
PREFILL = ((7, 0), (3, 0), (1, 0), (12, 0))
CHUNKS = ((5, 9), (4, 8), (8, 0))
DECODE = ((1, 5), (1, 20), (1, 0), (1, 31 - 1))


def random_batch(
    rng: np.random.Generator,
    kinds: Sequence[tuple[int, int]],
    num_seqs: int,
    first_seq: int,
    first_slot: int,
    vocab_size: int,
) -> Batch:
    """Some sequences of these kinds.

    Args:
        first_seq: id of the first sequence.
        first_slot: which of the cache's places for a sequence the first one has.
    """
    chosen = [kinds[int(kind)] for kind in rng.integers(len(kinds), size=num_seqs)]
    num_new = np.array([new for new, _ in chosen], dtype=np.int64)
    width = MAX_POSITIONS // BLOCK_SIZE
    slots = first_slot + np.arange(num_seqs)
    return Batch(
        seq_ids=first_seq + np.arange(num_seqs),
        num_scheduled_tokens=num_new,
        num_computed_tokens=np.array([cached for _, cached in chosen], dtype=np.int64),
        token_ids=rng.integers(vocab_size, size=int(num_new.sum())),
        block_tables=(slots[:, None] * width + np.arange(width)).astype(np.int32),
        yields_token=rng.random(num_seqs) < 0.75,
    )


def random_plan(
    rng: np.random.Generator,
    dp: int,
    num_micro_batches: int,
    vocab_size: int,
    kinds: Sequence[tuple[int, int]],
    *,
    step: int = 0,
    share_empty: float = 0.3,
) -> StepPlan:
    """A step whose batches differ, some of them empty.

    Args:
        share_empty: of the batches.
    """
    micro_batches = []
    for number in range(num_micro_batches):
        batches = []
        most = MAX_SEQS // num_micro_batches
        for dp_rank in range(dp):
            num_seqs = 0 if rng.random() < share_empty else int(rng.integers(1, most + 1))
            first = (number * dp + dp_rank) * MAX_SEQS
            batches.append(random_batch(rng, kinds, num_seqs, first, number * most, vocab_size))
        micro_batches.append(tuple(batches))
    return StepPlan(
        step=step,
        replica=0,
        phase=Phase.PREFILL if kinds is PREFILL else Phase.DECODE,
        micro_batches=tuple(micro_batches),
        record=True,
        record_routing=True,
    )
