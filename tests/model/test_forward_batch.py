import numpy as np
import pytest
import torch

from expertlane.model.forward_batch import AttentionRun, ForwardBatch
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Layout

CPU = torch.device("cpu")


def batch(*parts):
    """Parts are (slot, num_computed, num_scheduled); token ids count up from 100."""
    slots, computed, scheduled = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    return Batch(
        seq_ids=np.arange(len(parts)),
        slots=slots,
        num_scheduled_tokens=scheduled,
        num_computed_tokens=computed,
        token_ids=np.arange(100, 100 + scheduled.sum()),
    )


def forward_batch(*batches, tp=1, rank=0):
    layout = Layout(dp=len(batches), tp=tp)
    return ForwardBatch(batches, layout, layout.coordinates(rank), CPU)


def test_positions_follow_what_was_computed():
    given = forward_batch(batch((0, 0, 3), (1, 7, 1), (2, 4, 2)))
    assert given.positions.tolist() == [0, 1, 2, 7, 4, 5]


@pytest.mark.parametrize(
    ("parts", "runs"),
    [
        ([], []),
        ([(3, 0, 2)], [AttentionRun(0, 3, 1, 2, 0)]),
        # Equal lengths and consecutive slots: one run.
        ([(0, 4, 1), (1, 4, 1), (2, 4, 1)], [AttentionRun(0, 0, 3, 1, 4)]),
        # A gap between slots, and slots that go down.
        ([(0, 4, 1), (2, 4, 1)], [AttentionRun(0, 0, 1, 1, 4), AttentionRun(1, 2, 1, 1, 4)]),
        ([(1, 4, 1), (0, 4, 1)], [AttentionRun(0, 1, 1, 1, 4), AttentionRun(1, 0, 1, 1, 4)]),
        # Other lengths, computed or scheduled.
        (
            [(0, 0, 2), (1, 0, 3), (2, 0, 3), (3, 1, 3)],
            [
                AttentionRun(0, 0, 1, 2, 0),
                AttentionRun(2, 1, 2, 3, 0),
                AttentionRun(8, 3, 1, 3, 1),
            ],
        ),
    ],
)
def test_runs_of_sequences_that_attention_takes_as_one(parts, runs):
    assert forward_batch(batch(*parts)).attention_runs == runs


@pytest.mark.parametrize(
    ("num_seqs", "num_scheduled", "num_computed", "pairs"),
    [(1, 1, 0, 1), (1, 3, 0, 6), (1, 1, 4, 5), (2, 3, 4, 2 * (5 + 6 + 7))],
)
def test_query_key_pairs(num_seqs, num_scheduled, num_computed, pairs):
    run = AttentionRun(0, 0, num_seqs, num_scheduled, num_computed)
    assert run.num_query_key_pairs(None) == pairs


def test_tokens_are_owned_near_equally():
    given = batch((0, 0, 3), (1, 0, 2))
    ranks = [forward_batch(given, tp=4, rank=rank) for rank in range(4)]
    assert [rank.tokens_of_tp_rank for rank in ranks] == [[2, 1, 1, 1]] * 4
    assert [rank.num_owned for rank in ranks] == [2, 1, 1, 1]
    owned = [rank.owned_token_ids.tolist() for rank in ranks]
    assert owned == [[100, 101], [102], [103], [104]]


def test_the_owner_of_a_sequence_s_last_token_finishes_it():
    given = forward_batch(batch((0, 0, 3), (1, 0, 2)), tp=4)
    # Tokens 2 and 4 are last; slices begin at 0, 2, 3 and 4.
    assert [given.last_tokens(rank).tolist() for rank in range(4)] == [[], [0], [], [0]]
    assert given.last_tokens_of_tp_rank == [0, 1, 0, 1]


def test_ranks_know_how_much_everyone_owns():
    given = forward_batch(batch((0, 0, 3)), batch(), batch((0, 0, 1)), tp=2, rank=2)
    assert given.tokens_of_stage_rank == [2, 1, 0, 0, 1, 0]
    assert given.num_owned == 0  # rank 2 is of the second data-parallel rank


def test_an_empty_batch():
    given = forward_batch(batch(), tp=2)
    assert given.positions.shape == given.owned_token_ids.shape == (0,)
    assert given.last_tokens_of_tp_rank == [0, 0]


def test_a_window_limits_pairs_and_positions_read():
    run = AttentionRun(0, 0, num_seqs=2, num_scheduled=3, num_computed=4)
    assert run.num_query_key_pairs(2) == 2 * (2 + 2 + 2)
    assert run.num_query_key_pairs(6) == 2 * (5 + 6 + 6)
    assert run.num_positions_read(2) == 2 * (3 + 1)
    assert run.num_positions_read(None) == run.num_positions_read(99) == 2 * 7
