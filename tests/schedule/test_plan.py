import numpy as np
import pytest

from expertlane.schedule.plan import Batch


def make_batch(lengths: list[int]) -> Batch:
    num_seqs = len(lengths)
    return Batch(
        seq_ids=np.arange(10, 10 + num_seqs),
        slots=np.arange(num_seqs),
        num_scheduled_tokens=np.array(lengths, dtype=np.int64),
        num_computed_tokens=np.arange(5, 5 + num_seqs),
        token_ids=np.arange(100, 100 + sum(lengths)),
    )


def test_a_batch_is_cut_at_sequence_borders():
    first, second = make_batch([2, 1, 3]).split(2)
    assert (first.num_seqs, first.num_tokens) == (2, 3)
    assert first.seq_ids.tolist() == [10, 11]
    assert first.slots.tolist() == [0, 1]
    assert first.num_scheduled_tokens.tolist() == [2, 1]
    assert first.num_computed_tokens.tolist() == [5, 6]
    assert first.token_ids.tolist() == [100, 101, 102]
    assert (second.num_seqs, second.num_tokens) == (1, 3)
    assert second.seq_ids.tolist() == [12]
    assert second.token_ids.tolist() == [103, 104, 105]


@pytest.mark.parametrize(("lengths", "sizes"), [([], [0, 0]), ([4], [4, 0]), ([1, 2], [1, 2])])
def test_zero_one_and_two_sequences_in_two_parts(lengths, sizes):
    assert [part.num_tokens for part in make_batch(lengths).split(2)] == sizes


def test_one_part_is_the_whole():
    (part,) = make_batch([2, 1]).split(1)
    assert part.token_ids.tolist() == [100, 101, 102]
    assert part.seq_ids.tolist() == [10, 11]
