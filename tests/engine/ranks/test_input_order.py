"""When a stage begins to receive what the stage before it sends."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.stage.token_stage import TokenStage
from expertlane.schedule.plan import Batch, RankBatch, RankStep
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


def batch_of(seq):
    one = np.ones(1, dtype=np.int64)
    return Batch(
        np.array([seq]), one, one - 1, one, np.array([[seq]], dtype=np.int32), one.astype(bool)
    )


@pytest.mark.parametrize(
    ("is_over_nccl", "expected"),
    [(False, ["in", "in", "run", "run"]), (True, ["in", "run", "in", "run"])],
)
def test_a_receive_of_nccl_is_not_ahead_of_a_send(is_over_nccl, expected):
    """Its transfers of a group follow one another; others are begun as early as can be."""
    limits = Limits(
        vocab_size=8,
        max_model_len=4,
        num_blocks=2,
        block_size=4,
        max_num_batched_tokens=4,
        max_num_seqs=2,
    )
    told = []

    class RecordingStage(TokenStage):
        _is_over_nccl = is_over_nccl

        def _begin_input(self, micro_batch, chosen):
            told.append("in")
            return super()._begin_input(micro_batch, chosen)

        def _run_micro_batch(self, parts, arriving):
            told.append("run")
            return super()._run_micro_batch(parts, arriving)

    stage = RecordingStage(Layout(), limits)
    stage._recorder = SimpleNamespace(**vars(stage._recorder), checks=None)
    micro_batches = tuple(own for seq in range(2) for own in RankBatch.of_dp_ranks([batch_of(seq)]))
    outcome = stage.run(
        RankStep(0, 0, Phase.PREFILL, micro_batches=micro_batches, admitted={}, record=False)
    )
    assert told == expected
    assert [*outcome.token_ids] == [0, 1]
