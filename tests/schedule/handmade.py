"""Batches put together by hand, in a paged cache whose blocks lie in no order."""

from collections.abc import Sequence

import numpy as np

from expertlane.schedule.plan import Batch

BLOCK_SIZE = 4


def paged_batch(
    parts: Sequence[tuple[int, int, int, int]],
    token_ids: np.ndarray | None = None,
    *,
    num_slots: int = 8,
    max_len: int = 16,
) -> Batch:
    """Parts are (seq_id, slot, num_computed, num_scheduled); each yields a token.

    Slot s has the blocks s + i × num_slots, the last ones first. Token ids count up from 100
    unless given.
    """
    seqs, slots, computed, scheduled = np.array(parts, dtype=np.int64).reshape(-1, 4).T
    width = -(-max_len // BLOCK_SIZE)
    return Batch(
        seq_ids=seqs,
        num_scheduled_tokens=scheduled,
        num_computed_tokens=computed,
        token_ids=np.arange(100, 100 + scheduled.sum()) if token_ids is None else token_ids,
        block_tables=(slots[:, None] + np.arange(width)[::-1] * num_slots).astype(np.int32),
        yields_token=np.ones(len(seqs), dtype=np.bool_),
    )
