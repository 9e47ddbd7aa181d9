from dataclasses import replace

import numpy as np
import pytest
import torch

from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.spec.layout import Layout
from schedule.handmade import BLOCK_SIZE, paged_batch

CPU = torch.device("cpu")


def batch(*parts):
    """Parts are (slot, num_computed, num_scheduled); token ids count up from 100."""
    return paged_batch([(seq, *part) for seq, part in enumerate(parts)])


def forward_batch(*batches, tp=1, rank=0):
    layout = Layout(dp=len(batches), tp=tp)
    at, num_tokens = layout.coordinates(rank), [batch.num_tokens for batch in batches]
    return ForwardBatch(batches[at.dp_rank], num_tokens, layout, at, CPU, BLOCK_SIZE)


def test_slots_are_where_the_block_tables_say():
    """Slot s has blocks s + 24, s + 16, s + 8 and s, of 4 positions each."""
    given = forward_batch(batch((0, 0, 3), (1, 7, 1), (2, 3, 2)))
    assert given.pages.slots.tolist() == [96, 97, 98, 17 * 4 + 3, 26 * 4 + 3, 18 * 4]


def test_positions_follow_what_was_computed():
    given = forward_batch(batch((0, 0, 3), (1, 7, 1), (2, 4, 2)))
    assert given.pages.positions.tolist() == [0, 1, 2, 7, 4, 5]


@pytest.mark.parametrize(
    ("part", "pairs"),
    [((0, 0, 1), 1), ((0, 0, 3), 6), ((0, 4, 1), 5), ((0, 4, 3), 5 + 6 + 7)],
)
def test_query_key_pairs(part, pairs):
    assert forward_batch(batch(part)).pairs_and_positions(None)[0] == pairs
    assert forward_batch(batch(part, (1, 0, 2))).pairs_and_positions(None)[0] == pairs + 3


def test_tokens_are_owned_near_equally():
    given = batch((0, 0, 3), (1, 0, 2))
    ranks = [forward_batch(given, tp=4, rank=rank) for rank in range(4)]
    assert [rank.tokens_of_tp_rank for rank in ranks] == [[2, 1, 1, 1]] * 4
    assert [rank.num_owned for rank in ranks] == [2, 1, 1, 1]
    owned = [rank.owned_token_ids.tolist() for rank in ranks]
    assert owned == [[100, 101], [102], [103], [104]]


def test_the_owner_of_a_sequence_s_last_token_finishes_it():
    given = batch((0, 0, 3), (1, 0, 2))
    ranks = [forward_batch(given, tp=4, rank=rank) for rank in range(4)]
    # Tokens 2 and 4 are last; slices begin at 0, 2, 3 and 4.
    assert [rank.last_tokens.tolist() for rank in ranks] == [[], [0], [], [0]]
    assert ranks[0].last_tokens_of_tp_rank == [0, 1, 0, 1]


def test_ranks_know_how_much_everyone_owns():
    given = forward_batch(batch((0, 0, 3)), batch(), batch((0, 0, 1)), tp=2, rank=2)
    assert given.tokens_of_stage_rank == [2, 1, 0, 0, 1, 0]
    assert given.num_owned == 0  # rank 2 is of the second data-parallel rank


def test_an_empty_batch():
    given = forward_batch(batch(), tp=2)
    assert given.pages.positions.shape == given.owned_token_ids.shape == (0,)
    assert given.last_tokens_of_tp_rank == [0, 0]


def test_a_window_limits_pairs_and_positions_read():
    given = forward_batch(batch((0, 4, 3), (1, 4, 3)))
    assert given.pairs_and_positions(2)[0] == 2 * (2 + 2 + 2)
    assert given.pairs_and_positions(6)[0] == 2 * (5 + 6 + 6)
    assert given.pairs_and_positions(2)[1] == 2 * (3 + 1)
    assert given.pairs_and_positions(None)[1] == given.pairs_and_positions(99)[1] == 2 * 7


def test_only_sequences_that_yield_reach_the_head():
    whole = batch((0, 0, 3), (1, 0, 2), (2, 5, 1))
    some = replace(whole, yields_token=np.array([False, True, True]))
    given, other = (forward_batch(some, tp=2, rank=rank) for rank in range(2))
    assert given.batch.yielding_seq_ids == [1, 2]
    assert [given.last_tokens.tolist(), other.last_tokens.tolist()] == [[], [1, 2]]
    assert given.last_tokens_of_tp_rank == [0, 2]
