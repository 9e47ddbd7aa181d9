"""Indexers: what attention sees by them, bytes by hand, counts beside those of transformers."""

import numpy as np
import pytest

from cli.screen import refusing
from cost.families import (
    TYPES,
    flops,
    only,
    operations,
    published,
)
from expertlane.balance.holding import Slices
from expertlane.cost.laws.device import stand_ins
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.memory import held_kv_bytes, kept_bytes
from expertlane.cost.step.batch_sizes import pairs_and_positions
from expertlane.cost.step.operation import NumberTypes, OpKind
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing

OWN, SHARED = Mixing(choice="own"), Mixing(choice="shared")
CHOOSING = {OpKind.INDEX, OpKind.INDEX_DECODE, OpKind.CHOOSE}


def test_bytes_of_a_position_by_hand():
    deepseek = published("deepseek-v3.2")
    assert held_kv_bytes(deepseek, TYPES, 8) == 576 * 2
    with_index = held_kv_bytes(deepseek, TYPES, 8, has_index=True)
    assert with_index == 576 * 2 + 128 + 4  # an index key in float8, with its scale
    assert kept_bytes(deepseek, TYPES, 8, range(61)) == (61 * with_index, 0)
    glm = published("glm-5.2")  # 21 of its layers have an indexer
    assert kept_bytes(glm, TYPES, 8, range(78)) == (78 * 576 * 2 + 21 * 132, 0)
    assert kept_bytes(glm, TYPES, 8, range(3, 6)) == (3 * 576 * 2, 0)
    minimax = published("minimax-m3")  # the first three have none; a key of 128 values of 16 bits
    of_kv = 2 * 4 * 128 * 2
    assert kept_bytes(minimax, TYPES, 1, range(60)) == (60 * of_kv + 57 * 256, 0)
    assert kept_bytes(minimax, TYPES, 8, range(60)) == (60 * of_kv // 4 + 57 * 256, 0)
    float8 = NumberTypes.asked("bfloat16", "float8")
    assert kept_bytes(minimax, float8, 1, range(3, 4)) == (2 * 4 * (128 + 1) + 256, 0)


def test_ranks_hold_the_index_queries_of_their_keys_and_values():
    minimax = published("minimax-m3")
    for tp in (1, 2, 4, 8, 16):
        for rank in range(tp):
            own = Slices(tp, rank)
            heads = own.kv_heads(minimax)
            rows = own.of_tensor(minimax, "layers.3.index_query")
            assert rows == range(heads.start * 128, heads.stop * 128)
            assert own.of_tensor(minimax, "layers.3.index_key") == range(128)
    assert Slices(8, 3).of_tensor(published("glm-5.2"), "layers.0.index_query") == range(32 * 128)


def test_an_indexer_scores_all_and_attention_sees_few():
    model = published("deepseek-v3.2")
    for num_cached in (1000, 50_000):
        ops = operations(model, OWN, 2, 1, num_cached)
        index, sparse = only(ops, OpKind.INDEX_DECODE), only(ops, OpKind.LATENT_DECODE)
        seen = num_cached + 1
        assert index.flops[0] == 2 * 2 * seen * 64 * 128
        assert index.kv_bytes[0] == 2 * seen * 132
        assert sparse.flops[0] == 2 * 2 * min(seen, 2048) * 128 * (576 + 512)
    sparse = only(operations(model, OWN, 1, 4096), OpKind.SPARSE)
    assert sparse.sizes["query_key_pairs"][0] == 2048 * 2049 // 2 + 2048 * 2048
    few = operations(model, OWN, 1, 4096, tp=16)  # its kernel computes 64 heads at least
    assert only(few, OpKind.SPARSE).sizes["heads"] == 64.0


def test_prompts_that_an_indexer_would_take_whole_are_neither_scored_nor_sparse():
    for mixing in (OWN, SHARED):
        kinds = {each.kind for each in operations(published("glm-5.2"), mixing, 2, 1024, 1024)}
        assert OpKind.LATENT_PREFILL in kinds
        assert not kinds & {*CHOOSING, OpKind.SPARSE}
    longer = {each.kind for each in operations(published("glm-5.2"), OWN, 2, 1024, 1025)}
    assert OpKind.LATENT_PREFILL not in longer
    assert {OpKind.INDEX, OpKind.CHOOSE, OpKind.SPARSE} <= longer


@pytest.mark.parametrize(("num_new", "num_cached"), [(1, 9000), (5000, 0)])
def test_a_shared_choice_costs_what_is_left_without_an_indexer(num_new, num_cached):
    model = published("glm-5.2")
    own, shared = (operations(model, mixing, 2, num_new, num_cached) for mixing in (OWN, SHARED))
    assert not {each.kind for each in shared} & CHOOSING
    chosen = OpKind.LATENT_DECODE if num_new == 1 else OpKind.SPARSE
    assert only(own, chosen).sizes == only(shared, chosen).sizes
    projections = 2 * 2 * num_new * (32 * 128 * 2048 + (128 + 32) * 6144)
    assert flops(own) - flops(shared) == projections + flops(own, *CHOOSING)


def test_blocks_are_chosen_for_each_head_of_keys_and_values():
    model = published("minimax-m3")
    for num_cached, seen in ((0, 1), (1000, 1001), (50_000, 15 * 128 + 50_000 % 128 + 1)):
        ops = operations(model, OWN, 2, 1, num_cached)
        index, sparse = only(ops, OpKind.INDEX_DECODE), only(ops, OpKind.DECODE_ATTENTION)
        assert index.dtype == "bfloat16"
        assert index.flops[0] == 2 * 2 * (num_cached + 1) * 4 * 128
        assert index.kv_bytes[0] == 2 * (num_cached + 1) * 256
        assert sparse.flops[0] == 2 * 4 * seen * 64 * 128
        assert sparse.kv_bytes[0] == 2 * seen * 2 * 4 * 128 * 2
    of_rank = operations(model, OWN, 2, 1, 50_000, tp=8)  # one index head, which two ranks have
    assert 4 * flops(of_rank, OpKind.INDEX_DECODE) == index.flops[0]
    assert 8 * flops(of_rank, OpKind.DECODE_ATTENTION) == sparse.flops[0]


def test_keys_and_values_that_are_chosen_by_head_are_not_shared_by_positions():
    minimax = published("minimax-m3")
    assert Layout(tp=8).most_dcp(minimax) == 1
    with refusing("dcp=2 indexer minimax-m3 head not priced valid 1"):
        Layout(tp=8, dcp=2).check_model(minimax)


def test_kernels_of_blocks_score_short_prompts_too():
    kinds = {each.kind for each in operations(published("minimax-m3"), OWN, 2, 100)}
    assert {OpKind.INDEX, OpKind.SPARSE_GROUPED} <= kinds
    dense = {each.kind for each in operations(published("minimax-m3"), Mixing(), 2, 5000)}
    assert OpKind.PREFILL_ATTENTION in dense
    assert not dense & {*CHOOSING, OpKind.SPARSE_GROUPED}


def test_pairs_of_blocks_are_sums_over_tokens():
    def seen(position, window, block):  # from 1
        return position if position <= window else window - block + (position - 1) % block + 1

    for block, window in ((1, 1), (1, 6), (3, 3), (3, 9), (4, 8)):
        for num_cached in range(0, 30, 7):
            for num_new in (0, 1, 2, 5, 40):
                new = range(num_cached + 1, num_cached + num_new + 1)
                pairs, positions = pairs_and_positions(
                    np.array([num_new]), np.array([num_cached]), window, block
                )
                assert pairs[0] == sum(seen(each, window, block) for each in new)
                if num_new == 1:
                    assert positions[0] == seen(num_cached + 1, window, block)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-v3.2", "as latent attention to as many"),
        ("minimax-m3", "as attention of grouped queries to as many"),
    ],
)
def test_what_was_not_measured_is_said(name, words):
    said = " ".join(stand_ins(read_profile("h200"), NumberTypes.asked("bfloat16"), published(name)))
    assert words in said
    assert ("Sparse attention of prompts" in said) == (name == "minimax-m3")
    assert "Scores of an indexer in bfloat16" in said
