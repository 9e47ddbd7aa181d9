import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams, SamplingState
from schedule.handmade import paged_batch


def make_batch(lengths: list[int]) -> Batch:
    return paged_batch([(10 + i, i, 5 + i, length) for i, length in enumerate(lengths)])


@pytest.mark.parametrize(("lengths", "sizes"), [([], [0, 0]), ([4], [4, 0]), ([1, 2], [1, 2])])
def test_zero_one_and_two_sequences_in_two_parts(lengths, sizes):
    assert [part.num_tokens for part in make_batch(lengths).split(2)] == sizes


def test_parts_are_near_equal_in_tokens():
    """A long prompt among decodes weighs as much as all of them."""
    assert [part.num_tokens for part in make_batch([1, 1, 1, 1, 12, 1]).split(2)] == [4, 13]
    assert [part.num_tokens for part in make_batch([12, 1, 1, 1]).split(2)] == [12, 3]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 5))
def test_every_token_is_in_one_part(lengths, num_parts):
    whole = make_batch(lengths)
    parts = whole.split(num_parts)
    assert len(parts) == num_parts
    for name in ("seq_ids", "token_ids", "num_computed_tokens", "block_tables"):
        of_parts = np.concatenate([getattr(part, name) for part in parts])
        assert of_parts.tolist() == getattr(whole, name).tolist()
    assert all(part.yields_token.tolist() == [True] * part.num_seqs for part in parts)
    assert [part.num_scheduled_tokens.sum() for part in parts] == [p.num_tokens for p in parts]


@pytest.mark.parametrize(("num_seqs", "sizes"), [(6, [2, 2, 2]), (7, [2, 3, 2]), (2, [1, 0, 1])])
def test_equal_sequences_are_shared_out_near_equally(num_seqs, sizes):
    assert [part.num_seqs for part in make_batch([3] * num_seqs).split(3)] == sizes


@settings(derandomize=True, deadline=None)
@given(st.one_of(st.lists(st.just(1), max_size=9), st.lists(st.integers(1, 9), max_size=9)))
def test_the_sizes_of_halves(lengths):
    batch = make_batch(lengths)
    assert batch.num_tokens_of_halves() == [part.num_tokens for part in batch.split(2)]


def test_a_data_parallel_rank_gets_its_own_batches_and_the_others_sizes():
    nothing = np.empty(0, dtype=np.int64)
    states = {seq: SamplingState(SamplingParams(), seq, nothing, nothing) for seq in (10, 11, 30)}
    other = paged_batch([(30, 1, 5, 4), (31, 2, 5, 1)])
    plan = StepPlan(
        7,
        1,
        Phase.DECODE,
        ((make_batch([2, 1]), make_batch([])), (make_batch([]), other)),
        admitted=states,
        released=(3,),
        num_uncommitted=1,
        record=False,
    )
    first, second = plan.of_dp_ranks()
    for step in (first, second):
        assert (step.step, step.replica, step.phase) == (7, 1, Phase.DECODE)
        assert (step.released, step.num_uncommitted, step.record) == ((3,), 1, False)
        assert [part.num_tokens for part in step.micro_batches] == [[3, 0], [0, 5]]
        halves = [part.num_tokens_of_halves for part in step.micro_batches]
        assert halves == [[[2, 1], [0, 0]], [[0, 0], [4, 1]]]
        assert [part.can_split for part in step.micro_batches] == [True, True]
    assert [part.own.seq_ids.tolist() for part in first.micro_batches] == [[10, 11], []]
    assert [part.own.seq_ids.tolist() for part in second.micro_batches] == [[], [30, 31]]
    assert first.admitted.keys() == {10, 11}
    assert second.admitted.keys() == {30}
