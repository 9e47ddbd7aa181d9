"""Decode context parallelism: each rank of a group reads its share of the cache, for more heads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import refusing
from cost.families import TYPES, operations, placed, published
from cost.projected import program_of
from cost.tiny_models import MODELS
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import parse_cluster
from expertlane.cost.memory import KVTransfers, held_kv_bytes, held_state_bytes, kept_bytes
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import OpKind, Transfer
from expertlane.cost.step.step_list import GPU_LIBRARIES
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage, Traffic

LATENT = MODELS["latent"]
MULTI_QUERY = MODELS["plain"].with_overrides(num_attention_heads=4, num_key_value_heads=1)


def layer_steps(model, layout, part):
    program = program_of(layout, part, model, kernels=GPU_LIBRARIES)
    sections = program.stages[0][0].parts[0]
    return next(each.steps for each in sections if each.layer == 0)


def of_kind(steps, *kinds):
    return [each for each in steps if each.kind in kinds and not isinstance(each, Transfer)]


DECODES = (OpKind.DECODE_ATTENTION, OpKind.LATENT_DECODE)
PREFILLS = (OpKind.PREFILL_ATTENTION, OpKind.LATENT_PREFILL)


@given(
    model=st.sampled_from((LATENT, MULTI_QUERY)),
    dcp=st.sampled_from((2, 4)),
    num_seqs=st.integers(1, 5),
    cached=st.integers(0, 99),
    num_drafts=st.integers(0, 2),
)
def test_a_decode_reads_a_share_for_the_heads_of_all(model, dcp, num_seqs, cached, num_drafts):
    part = PartSizes.even(1, 4, num_seqs, 1, cached, num_drafts)
    plain, parted = (layer_steps(model, Layout(tp=4, dcp=each), part) for each in (1, dcp))
    (whole,), (share,) = of_kind(plain, *DECODES), of_kind(parted, *DECODES)
    positions = num_seqs * (cached + 1 + num_drafts)
    assert whole.sizes["positions"].tolist() == [positions] * 4
    assert share.sizes["positions"].tolist() == [-(-positions // dcp)] * 4
    assert share.sizes["heads"] == dcp * whole.sizes["heads"]
    assert (share.kv_bytes * dcp >= whole.kv_bytes).all()
    more = len([each for each in parted if isinstance(each, Transfer)])
    assert more == len([each for each in plain if isinstance(each, Transfer)]) + 3


def test_what_is_gathered_and_added_up():
    part = PartSizes.even(1, 4, 3, 1, 20)
    latent, item, tokens = LATENT.latent, TYPES.activation_bytes, 3
    heads = LATENT.num_attention_heads // 4
    steps = layer_steps(LATENT, Layout(tp=4, dcp=2), part)
    shared = [e for e in steps if isinstance(e, Transfer) and e.groups.size[0] == 2]
    kinds = [Traffic.PAYLOAD, Traffic.METADATA]
    groups = [each.sent_bytes[kinds].sum(axis=2)[:, 0].tolist() for each in shared]
    query = heads * (latent.kv_lora_rank + latent.qk_rope_head_dim) * item
    assert groups == [
        [tokens * query, 0],
        [0, tokens * 2 * heads * 4],
        [tokens * heads * latent.kv_lora_rank * item, 0],
    ]
    assert {each.stage for each in shared} == {Stage.COLLECTIVES}


def test_a_prompt_gathers_what_came_before():
    first, later = (
        layer_steps(LATENT, Layout(tp=4, dcp=4), PartSizes.even(1, 4, 1, 8, cached))
        for cached in (0, 32)
    )
    plain = layer_steps(LATENT, Layout(tp=4), PartSizes.even(1, 4, 1, 8, 32))
    for steps in (first, later):
        (mine,), (whole,) = of_kind(steps, *PREFILLS), of_kind(plain, *PREFILLS)
        assert mine.sizes["heads"] == whole.sizes["heads"]
    moved = [
        sum(int(each.sent_bytes.sum()) for each in steps if isinstance(each, Transfer))
        for steps in (first, later, plain)
    ]
    width = LATENT.latent.kv_lora_rank + LATENT.latent.qk_rope_head_dim
    assert moved[0] == moved[2]
    # Of 32 positions each of 4 ranks holds 8, and sends them to 3 others.
    assert moved[1] - moved[2] == TYPES.cached_bytes(4 * 3 * 8 * width, 4 * 3 * 8)


@pytest.mark.parametrize("model", [LATENT, MULTI_QUERY], ids=["latent", "multi-query"])
def test_memory_and_transfer_are_shared(model):
    plain, parted = Layout(tp=4), Layout(tp=4, dcp=4)
    limits = Limits(model.vocab_size, 64, num_blocks=8, block_size=16)
    kv_bytes = [placed(model, layout).rank_memory(limits, 0).kv_bytes for layout in (plain, parted)]
    assert kv_bytes[0] == 4 * kv_bytes[1]
    links = LinkModel(parse_cluster("h100x8").profile)
    seconds = [
        KVTransfers(model, TYPES, Layout(tp=1), layout, links).seconds(10**6)
        for layout in (Layout(tp=4), parted)
    ]
    assert (np.asarray(seconds[1]) <= seconds[0]).all()


def test_states_are_neither_shared_nor_copied():
    model = published("qwen3-next-80b-a3b")  # two heads of keys
    plain, parted = (placed(model, Layout(tp=8, dcp=dcp)) for dcp in (1, 4))
    limits = Limits(model.vocab_size, 4096, num_blocks=256)
    of_state = 36 * held_state_bytes(model, TYPES, 8)
    paged, shared = (
        each.rank_memory(limits, 0, 2).kv_bytes - 2 * of_state for each in (plain, parted)
    )
    assert paged == 4 * shared > 0
    # A block takes a quarter of the bytes, so a state as many more blocks.
    assert parted.state_blocks(limits) == pytest.approx(4 * plain.state_blocks(limits), abs=4)
    with refusing("dcp=8 hold 4 times valid dcp 1 2 4"):
        Layout(tp=8, dcp=8).check_model(model)
    without, shared = (
        [
            (each.kind, int(each.kv_bytes[0]), int(each.flops[0]))
            for each in operations(model, "state", 3, 1, 1000, tp=8, dcp=dcp)
        ]
        for dcp in (1, 4)
    )
    assert without == shared


def test_windows_with_heads_of_their_own_are_shared_as_they_are_read():
    model = published("mimo-v2-flash")
    of_layer = slice(1, 5)  # windows alone, of 129 positions in blocks of 16
    whole, half = (kept_bytes(model, TYPES, 16, range(48)[of_layer], dcp=dcp) for dcp in (1, 2))
    assert whole.sequence == 4 * 160 * held_kv_bytes(model, TYPES, 16, has_window=True)
    assert whole == (0, 2 * half.sequence)
