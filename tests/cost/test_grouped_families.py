"""Heads, gates and latents of families that are planned alone: bytes by hand, FLOPs of classes."""

import re

import pytest

from cost.families import (
    GROUPED,
    MIXERS,
    flops,
    only,
    operations,
    placed,
    published,
)
from expertlane.balance.holding import Slices
from expertlane.cost.memory import BLOCK_SIZE, kept_bytes
from expertlane.cost.step.operation import NumberTypes, OpKind
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing
from expertlane.spec.tensors import cut_dim, layer_name, layer_shapes


def attention(model, window, num_new, num_cached=0, tp=1):
    """Operations of one sequence."""
    return operations(model, Mixing("attention", window), 1, num_new, num_cached, tp)


def test_bytes_of_a_position_by_hand():
    types = NumberTypes.asked("bfloat16")
    for name, of_position in {
        "phi-3.5-moe": 32 * 2 * 8 * 128 * 2,
        "hunyuan-a13b": 32 * 2 * 8 * 128 * 2,
        "hy3-preview": 80 * 2 * 8 * 128 * 2,
        "kimi-k2.5": 61 * (512 + 64) * 2,
        "step3": 61 * 2 * 256 * 2,  # one head of keys, one of values
    }.items():
        model = published(name)
        assert kept_bytes(model, types, 1, range(model.num_hidden_layers)) == (of_position, 0)


def test_windows_are_kept_alone_where_their_heads_are_their_own():
    types = NumberTypes.asked("bfloat16")
    mimo = published("mimo-v2-flash")  # nine layers see all; windows are of 129, in blocks of 16
    of_window = 39 * (9 + 1) * 16 * 8 * (192 + 128) * 2
    assert kept_bytes(mimo, types, 1, range(48)) == (9 * 4 * (192 + 128) * 2, of_window)
    of_rank = 39 * (9 + 1) * 16 * 1 * (192 + 128) * 2  # four heads of the others are held twice
    assert kept_bytes(mimo, types, 8, range(48)) == (9 * 1 * (192 + 128) * 2, of_rank)
    step = published("step-3.5-flash")
    of_window = 33 * (512 + 16) * 2 * 8 * 128 * 2
    assert kept_bytes(step, types, 1, range(45)) == (12 * 2 * 8 * 128 * 2, of_window)
    # A sequence of a million tokens takes as many blocks for its windows as one of a thousand.
    blocks = placed(mimo, Layout(tp=8), types).state_blocks(Limits(mimo.vocab_size, 1024, 10**6))
    assert blocks == -(-of_rank // (BLOCK_SIZE * 9 * 320 * 2))


@pytest.mark.parametrize("name", MIXERS | GROUPED)
@pytest.mark.parametrize("tp", [1, 2, 8, 16])
def test_ranks_hold_every_row_once_or_copies(name, tp):
    """Of all parts of grouped families, and of states' parts of those with other mixers."""
    model = published(name)
    is_whole = ("gate_a", "decay_a")
    of_groups = re.compile("query|key|norm")  # which may be fewer than ranks
    is_cut = ("query", "query_b", "output", "gate", "up", "down", "sinks")
    for kind in {model.kind_of_layer(layer) for layer in range(model.num_hidden_layers)}:
        for part, shape in layer_shapes(model, kind).items():
            of_state = part.startswith("state.")
            if part.endswith("output_bias") or (name in MIXERS and not of_state):
                continue  # a bias is added once
            rows = [Slices(tp, rank).of_tensor(model, layer_name(0, part)) for rank in range(tp)]
            size = shape[cut_dim(part)]
            assert set().union(*rows) == set(range(size)), part
            copies = sum(map(len, rows)) / size
            assert copies == int(copies), part
            if of_state:
                may_be = part.endswith(is_whole) or of_groups.search(part)
            else:
                may_be = not part.endswith(is_cut) or "shared_gate" in part
            assert copies == 1 or may_be, part


def test_flops_of_queries_from_a_latent_by_hand():
    """Step-3's, of which transformers has no class: products as in the code beside its weights."""
    model, num = published("step3"), 64
    ops = attention(model, None, num)
    products = 7168 * (2048 + 256 + 256) + 2048 * 64 * 256 + 64 * 256 * 7168
    assert flops(ops, OpKind.GEMM) == 2 * num * products
    pairs = num * (num + 1) // 2
    assert flops(ops, OpKind.PREFILL_ATTENTION) == 2 * pairs * 64 * (256 + 256)
    on_one_of_8 = attention(model, None, num, tp=8)  # the latent is computed on every rank
    products = 7168 * (2048 + 256 + 256) + 2048 * 8 * 256 + 8 * 256 * 7168
    assert flops(on_one_of_8, OpKind.GEMM) == 2 * num * products


def test_a_decode_reads_its_window_alone():
    model = published("mimo-v2-flash")
    of_window, of_all = (
        only(attention(model, each, 1, 10_000), OpKind.DECODE_ATTENTION) for each in (129, None)
    )
    assert of_window.kv_bytes[0] == 129 * 8 * (192 + 128) * 2
    assert of_all.kv_bytes[0] == 10_001 * 4 * (192 + 128) * 2
    assert of_window.flops[0] == 2 * 129 * 64 * (192 + 128)
    assert of_all.flops[0] == 2 * 10_001 * 64 * (192 + 128)
