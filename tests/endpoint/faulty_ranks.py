"""The fork server of ranks with one planted error, named by the environment variable `FAULT`."""

import os
from dataclasses import replace
from typing import Any

import numpy as np

from expertlane.engine.model.attention import RotaryEmbedding
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.ranks import fork_server
from expertlane.schedule.plan import UNKNOWN, Batch

FAULT = "EXPERTLANE_TEST_FAULT"
LARGE_BATCH, FAR = "wrong at batch > 8", "wrong beyond 2,048"
_MOST, _NEAR = 8, 2048


def _off_by_one(batch: Batch) -> Batch:
    """Each sequence after the eighth gets the first new token of the one before."""
    if batch.num_seqs <= _MOST:
        return batch
    firsts = np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens
    wrong, token_ids = firsts[_MOST:], batch.token_ids.copy()
    before = batch.token_ids[firsts[_MOST - 1 : -1]]
    is_known = (before != UNKNOWN) & (token_ids[wrong] != UNKNOWN)
    token_ids[wrong[is_known]] = before[is_known]
    return replace(batch, token_ids=token_ids)


def _plant_in_batches() -> None:
    right = ForwardBatch.__init__

    def wrong(self: ForwardBatch, batch: Batch, *given: Any, **more: Any) -> None:
        right(self, _off_by_one(batch), *given, **more)

    ForwardBatch.__init__ = wrong  # type: ignore[method-assign]


def _plant_in_positions() -> None:
    right = RotaryEmbedding.__init__

    def wrong(self: RotaryEmbedding, *given: Any, **more: Any) -> None:
        """Positions begin anew beyond the first 2,048."""
        right(self, *given, **more)
        for table in (self.cos, self.sin):
            table[_NEAR:] = table[: len(table) - _NEAR].clone()

    RotaryEmbedding.__init__ = wrong  # type: ignore[method-assign]


_PLANTED = {LARGE_BATCH: _plant_in_batches, FAR: _plant_in_positions}


def main() -> None:
    """Serve the launcher with ranks that are wrong."""
    if plant := _PLANTED.get(os.environ.get(FAULT, "")):
        plant()
    fork_server.main()
