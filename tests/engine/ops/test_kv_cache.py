import torch

from expertlane.engine.ops.kv_cache import attention_groups
from schedule.handmade import BLOCK_SIZE, paged_batch

CPU = torch.device("cpu")
NO = -torch.inf


def groups_of(*parts, max_len=16):
    """Parts are (num_computed, num_scheduled)."""
    parts = [(seq, seq, *part) for seq, part in enumerate(parts)]
    return attention_groups(paged_batch(parts, max_len=max_len), BLOCK_SIZE, CPU)


def test_prompts_of_one_length_are_one_causal_group():
    (group,) = groups_of((0, 3), (0, 3))
    assert (group.num_seqs, group.num_scheduled, group.num_positions) == (2, 3, 3)
    assert group.is_fresh
    assert group.is_causal(None)
    assert group.is_causal(3)
    assert not group.is_causal(2)
    assert group.tokens.tolist() == [0, 1, 2, 3, 4, 5]


def test_decodes_of_unequal_lengths_are_one_masked_group():
    (group,) = groups_of((4, 1), (6, 1), (0, 1))
    assert (group.num_seqs, group.num_scheduled, group.num_positions) == (3, 1, 7)
    assert not group.is_fresh
    expected = [[0, 0, 0, 0, 0, NO, NO], [0] * 7, [0, NO, NO, NO, NO, NO, NO]]
    assert group.mask(None, torch.float32)[:, 0, 0].tolist() == expected
    windowed = [[NO, NO, NO, 0, 0, NO, NO], [NO] * 5 + [0, 0], [0, NO, NO, NO, NO, NO, NO]]
    assert group.mask(2, torch.float32)[:, 0, 0].tolist() == windowed


def test_prompts_chunks_and_decodes_are_apart_and_keep_their_tokens():
    groups = groups_of((0, 2), (4, 1), (3, 2), (0, 2), (5, 1))
    by_tokens = {tuple(group.tokens.tolist()): group for group in groups}
    assert set(by_tokens) == {(0, 1, 5, 6), (2, 7), (3, 4)}
    assert by_tokens[0, 1, 5, 6].is_fresh
    assert by_tokens[2, 7].num_positions == 6


def test_decodes_of_far_apart_lengths_are_not_padded_to_one():
    groups = groups_of((3, 1), (200, 1), max_len=256)
    assert sorted(group.num_positions for group in groups) == [4, 201]


def test_padding_lies_in_a_sequence_s_own_blocks():
    """A block of another sequence may hold what is not a number."""
    batch = paged_batch([(0, 0, 1, 1), (1, 1, 9, 1)])
    batch.block_tables[0, 1:] = -1
    (group,) = attention_groups(batch, BLOCK_SIZE, CPU)
    assert group.block_tables.tolist() == [[24, 24, 24], [25, 17, 9]]
