"""Mixers beside attention: bytes by hand, FLOPs beside a count of transformers' classes."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from cli.screen import refusing
from cost.families import (
    CONFIGS,
    TYPES,
    flops,
    mixer,
    only,
    operations,
    placed,
    published,
    their_flops,
)
from cost.projected import builder_of
from expertlane.balance.holding import Slices
from expertlane.cost.memory import held_kv_bytes, held_state_bytes, kept_bytes
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes, pairs_and_positions
from expertlane.cost.step.operation import OpKind, Transfer, TransferKind
from expertlane.errors import CapacityError
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing, StateMixer
from expertlane.spec.tensors import cut_dim, layer_name, layer_shapes
from expertlane.spec.workload import SharedPrefixes
from planner.requests import COMPRESSED

DECODE = OpKind.LATENT_DECODE
# Of a rank of one: layers with a cache and bytes of a position, with states and bytes of a state,
# which is held in float32, and inputs of its convolution, which are not.
KEPT = {
    "qwen3-next-80b-a3b": (12, 2 * 2 * 256 * 2, 36, 32 * 128 * 128 * 4 + 3 * 8192 * 2),
    "nemotron-3-nano-30b-a3b": (6, 2 * 2 * 128 * 2, 23, 64 * 128 * 64 * 4 + 3 * 6144 * 2),
    "jamba-v0.1": (4, 2 * 8 * 128 * 2, 28, 8192 * 16 * 4 + 3 * 8192 * 2),
    "ling-3.0-flash": (7, 576 * 2, 35, 32 * 128 * 128 * 4 + 3 * (3 * 32 * 128) * 2),
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_of_a_sequence_by_hand(name):
    model, (num_cached, of_position, num_states, of_state) = published(name), KEPT[name]
    assert held_kv_bytes(model, TYPES, 1) == of_position
    assert held_state_bytes(model, TYPES, 1) == of_state
    kept = num_cached * of_position, num_states * of_state
    assert kept_bytes(model, TYPES, 1, range(model.num_hidden_layers)) == kept


def test_bytes_of_a_rank_s_state_by_hand():
    assert held_kv_bytes(published("ling-3.0-flash"), TYPES, 8) == 576 * 2
    for name, tp, of_state in (
        ("qwen3-next-80b-a3b", 8, 2_146_304 // 8),
        ("jamba-v0.1", 8, KEPT["jamba-v0.1"][-1] // 8),
        ("ring-mini-linear-2.0", 1, 16 * 128 * 128 * 4),  # no convolutions
        ("deepseek-v3.2", 8, 0),
        # One group of queries and keys, which ranks copy.
        ("granite-4.0-h-small", 8, 16 * 128 * 64 * 4 + 3 * (1024 + 2 * 128) * 2),
    ):
        assert held_state_bytes(published(name), TYPES, tp) == of_state, name


def test_bytes_of_compressed_attention_by_hand():
    flash, window = published("deepseek-v4-flash"), 9 * 16  # 128 positions begin inside a block
    # A vector of 512 bfloat16 for 4 positions, and an index key in float8; or for 128 positions.
    of_position = 21 * (512 * 2 + 128 + 4) / 4 + 20 * 512 * 2 / 128
    # In float32, vectors and gates: of 4 positions, twice and what the entry before leaves, as wide
    # as a head and as an index key; of 128 positions once.
    of_states = 21 * 4 * 2 * 4 * 3 * (512 + 128) + 20 * 4 * 2 * 128 * 512
    of_windows = 43 * window * 512 * 2
    for tp in (1, 8):
        assert kept_bytes(flash, TYPES, tp, range(43)) == (of_position, of_windows + of_states)
    assert kept_bytes(flash, TYPES, 1, range(2)) == (0, 2 * window * 512 * 2)
    float8 = replace(TYPES, kv="float8")
    assert kept_bytes(flash, float8, 1, range(3, 4)).position == 513 / 128
    pro = published("deepseek-v4-pro")
    assert kept_bytes(pro, TYPES, 1, range(61)).position == 30 * 289 + 31 * 8


def test_blocks_of_positions_that_share_entries():
    model, layout = published("deepseek-v4-flash"), Layout(tp=8)
    held = placed(model, layout)
    limits = Limits(model.vocab_size, 65_536, 10**6, max_num_seqs=64)
    kept = kept_bytes(model, TYPES, 8, range(43))
    assert held.state_blocks(limits) == -(-kept.sequence // (16 * 6229))
    full = replace(limits, num_blocks=4096)
    assert held.rank_memory(full, 0, 3).kv_bytes == 65_536 * 6229 + 3 * kept.sequence
    few = model.with_overrides(
        num_hidden_layers=2,
        sliding_window=(128,) * 2,
        hash_layers=(),
        compressed=replace(model.compressed, layers=(None, "all")),
        indexer=None,
    )
    held = placed(few, layout)
    assert held.rank_memory(replace(limits, num_blocks=1), 0).kv_bytes == 16 * 8


def test_what_no_layout_of_compressed_attention_cuts():
    model = published("deepseek-v4-flash")
    Layout(tp=8).check_model(model)
    with refusing("tp=16 8 groups valid tp 1 2 4 8"):
        Layout(tp=16).check_model(model)
    with refusing("dcp compressed attention"):
        Layout(tp=8, dcp=2).check_model(model)
    for part, shape in layer_shapes(model, model.kind_of_layer(2)).items():
        rows = [Slices(8, rank).of_tensor(model, layer_name(2, part)) for rank in range(8)]
        is_cut = part in ("query_b", "sinks", "output_a", "output_b") or "shared." in part
        size = shape[cut_dim(part)]
        assert [len(each) for each in rows] == [size // 8 if is_cut else size] * 8, part
        assert set().union(*rows) == set(range(size)), part


def test_ranks_add_up_what_mamba_1_selects():
    """A time step, a key and a query of each token, from channels that are cut."""
    model = published("jamba-v0.1")
    alone = operations(model, "state", 3, 1, 1000)
    state = only(alone, OpKind.MAMBA1_DECODE)
    assert state.flops[0] == 3 * 8192 * 4 * 16
    assert state.dtype == "float32"
    out = mixer(model, "state", 3, 1, 1000, tp=2)
    transfers = (each for each in out if isinstance(each, Transfer))
    selected, _ = (each for each in transfers if each.kind is TransferKind.ALL_REDUCE)
    assert selected.sent_bytes.sum() == 2 * 3 * (256 + 2 * 16) * 2  # there and back
    assert 2 * flops([each for each in out if not isinstance(each, Transfer)]) == flops(alone)


def test_no_prefix_is_shared_where_weights_alone_do_not_fit():
    capacity = placed(published("deepseek-v3.2")).capacity(1e9, 64, 2048, SharedPrefixes(1, 2, 16))
    assert capacity.max_seqs == capacity.num_blocks == 0


def test_a_cache_is_shared_by_pages_and_states():
    model = published("qwen3-next-80b-a3b")
    held = placed(model, Layout(tp=8))
    limits = Limits(model.vocab_size, 4096, 10**6, max_num_seqs=64)
    block = 12 * 16 * held_kv_bytes(model, TYPES, 8)
    of_state = held.state_blocks(limits)
    assert of_state == -(-36 * held_state_bytes(model, TYPES, 8) // block)
    one = held.rank_memory(replace(limits, num_blocks=1), 0)
    used = one.weight_bytes + one.activation_bytes
    fitted = held.fit_cache(limits, used + 4e9)
    assert fitted.state_blocks == of_state
    assert fitted.num_blocks == int(4e9 // block)
    with pytest.raises(CapacityError):
        held.fit_cache(limits, used + 1e6)
    of_seq = 256 * block + 36 * held_state_bytes(model, TYPES, 8)
    assert held.capacity((used + 100.5 * of_seq) / 0.9, 4096, 2048).max_seqs == 100
    shared = SharedPrefixes(4, 32, 16)
    assert held.capacity((used + 100.5 * of_seq) / 0.9, 4096, 2048, shared).max_seqs > 100


def test_a_stage_of_states_alone_holds_those_of_all_sequences():
    model = published("qwen3-next-80b-a3b").with_overrides(
        num_hidden_layers=4, state_layers=(0, 1, 2)
    )
    held = placed(model, Layout(pp=2))
    of_state = held.state_blocks(Limits(model.vocab_size, 1024, 10**4))
    block_bytes = 16 * held_kv_bytes(model, TYPES, 1)
    assert of_state == -(-held_state_bytes(model, TYPES, 1) // block_bytes)
    limits = held.fit_cache(Limits(model.vocab_size, 1024, 10**4), 100e9)
    first, last = (held.rank_memory(limits, rank) for rank in (0, 1))
    most = min(limits.num_blocks // (of_state + 1), limits.max_num_seqs)
    assert first.kv_bytes == 2 * most * held_state_bytes(model, TYPES, 1)
    assert last.kv_bytes == limits.num_blocks * block_bytes


def test_one_token_reads_and_writes_each_state_once():
    model = published("qwen3-next-80b-a3b")
    ops = operations(model, "state", 3, 1, 1000)
    state = only(ops, OpKind.GATED_DELTA_DECODE)
    assert state.kv_bytes[0] == 2 * 3 * 32 * 128 * 128 * 4
    assert state.flops[0] == 3 * 32 * 6 * 128 * 128
    assert flops(operations(model, "state", 3, 1, 100_000)) == flops(ops)


def test_chunks_take_more_than_single_tokens():
    state = StateMixer("gated_delta", 4, 2, 32, 64)
    assert state.token_flops(4, in_chunks=False) == 4 * 2 * 3 * 32 * 64
    assert state.token_flops(4, in_chunks=True) == 4 * 2 * (64 * (64 + 64 + 48) + 3 * 32 * 64)
    mamba = StateMixer("mamba2", 4, 1, 32, 64, chunk_size=128)
    assert mamba.token_flops(4, in_chunks=True) == 4 * 2 * (128 * (8 + 64) + 2 * 32 * 64)


def test_groups_that_are_normed_together_are_not_cut():
    ring = published("ring-mini-linear-2.0")
    Layout(tp=4).check_model(ring)
    with refusing("tp=8 4 groups of a norm Lightning Attention valid tp 1 2 4"):
        Layout(tp=8).check_model(ring)


def test_a_gate_of_each_head_is_a_product():
    model = published("ling-3.0-flash")
    gated, plain = (
        operations(each, "attention", 4, 1, 100)
        for each in (model, model.with_overrides(attention_gate=None))
    )
    assert flops(gated) - flops(plain) == 4 * 2 * 32 * 2560


_CLASSES = {  # model; module of transformers, its classes of a mixer and of a configuration
    "gated_delta": "qwen3-next-80b-a3b qwen3_next Qwen3NextGatedDeltaNet Qwen3NextConfig",
    "kimi_delta": "kimi-linear-48b-a3b kimi_linear KimiLinearDeltaAttention KimiLinearConfig",
    "full_rank": "ling-3.0-flash bailing_hybrid BailingHybridDeltaAttention BailingHybridConfig",
    "mamba1": "jamba-v0.1 jamba JambaMambaMixer JambaConfig",
    "mamba2": "nemotron-3-nano-30b-a3b nemotron_h NemotronHMamba2Mixer NemotronHConfig",
    # Of another family: its own has no class.
    "lightning": "ring-mini-linear-2.0 minimax MiniMaxLightningAttention MiniMaxConfig",
}


@pytest.mark.full
@pytest.mark.parametrize("kind", _CLASSES)
def test_flops_are_those_of_transformers(kind):
    """In prompts, at small sizes. Differences by name: see the comments."""
    import torch

    name, package, mixer_class, config_class = _CLASSES[kind].split()
    module = import_module(f"transformers.models.{package}.modeling_{package}")
    model, num = published(name), 256
    state, hidden = model.state, model.hidden_size
    left_out = ("architectures", "model_type", "rope_scaling")
    given = {key: each for key, each in CONFIGS[name].items() if key not in left_out}
    if kind == "lightning":
        given = {"hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128}
        given["num_hidden_layers"] = 20
    config = getattr(module, config_class)(**given)
    more = ((), None) if kind == "lightning" else ()
    theirs = their_flops(
        lambda: getattr(module, mixer_class)(config, model.state_layers[0]),
        lambda each: each(torch.randn(1, num, hidden), *more),
    )
    # Convolutions, which we count as bytes alone.
    convolutions = 2 * num * state.conv_kernel * state.conv_channels(1)
    ours = flops(operations(model, "state", 1, num)) + convolutions
    if kind == "mamba1":  # they add to states and decay them value by value, which is not counted
        ours -= 2 * num * state.num_heads * state.key_dim
    elif kind == "mamba2":  # they compute queries by keys anew for each head of a group
        ours += 2 * num * state.chunk_size * state.key_dim * (state.num_heads - state.num_key_heads)
    elif kind != "lightning":  # triangular systems, which the counter does not see
        ours -= num * state.num_heads * state.chunk_size * (state.key_dim + state.value_dim)
    assert ours == pytest.approx(theirs, rel=0.02)


def _compressed(entries):
    return Mixing("attention", 128, entries=entries)


def test_a_token_sees_a_window_and_full_entries():
    """By hand, at every length around the ends of windows, of entries and of what is chosen."""
    for rate, most in ((4, None), (4, 5), (128, None), (1, 128)):
        lengths = np.arange(300)
        seen = [min(n // rate, n if most is None else most) for n in range(1, 301)]
        pairs, positions = pairs_and_positions(np.ones_like(lengths), lengths, most, rate=rate)
        assert pairs.tolist() == positions.tolist() == seen
        whole, _ = pairs_and_positions(lengths[1:], np.zeros_like(lengths[1:]), most, rate=rate)
        assert whole.tolist() == np.cumsum(seen)[:299].tolist()


def test_a_decode_of_compressed_attention_by_hand():
    model, num_cached = published("deepseek-v4-flash"), 10_000
    for entries, seen in ((None, 0), ("chosen", 512), ("all", 10_001 // 128)):
        ops = operations(model, _compressed(entries), 3, 1, num_cached)
        core = only(ops, DECODE)
        assert core.flops[0] == 3 * 4 * 64 * 512 * (128 + seen)
        assert core.kv_bytes[0] == 3 * (128 + seen) * 512 * 2
        scored = [each for each in ops if each.kind is OpKind.INDEX_DECODE]
        assert len(scored) == (entries == "chosen")
        for each in scored:
            assert each.flops[0] == 3 * 2 * 64 * 128 * (10_001 // 4)
            assert each.kv_bytes[0] == 3 * (10_001 // 4) * 132
    # Few entries are all seen, none is there before the first is full.
    core = only(operations(model, _compressed("chosen"), 1, 1, 2), DECODE)
    assert core.flops[0] == 4 * 64 * 512 * 3


def test_prompts_of_compressed_attention_by_hand():
    """Over a float8 cache by a kernel of its own; both count the same."""
    model = published("deepseek-v4-flash")
    for kv, kind in (("bfloat16", OpKind.SPARSE), ("float8", OpKind.COMPRESSED)):
        types = replace(TYPES, kv=kv)
        core = only(operations(model, _compressed("all"), 2, 256, types=types), kind)
        # A window of 128 in 256 tokens; an entry from the 128th on, two for the last.
        pairs = 128 * 129 // 2 + 128 * 128 + 128 + 2
        assert core.flops[0] == 2 * 4 * 64 * 512 * pairs
        bytes_of_vector = {"bfloat16": 1024, "float8": 513}[kv]
        assert core.kv_bytes[0] == 2 * (256 + 2) * bytes_of_vector


def test_drafts_of_compressed_attention():
    """Each sees as many entries as a single token; of the window all read what any sees."""
    model = published("deepseek-v4-flash")
    core = only(operations(model, _compressed("chosen"), 2, 1, 8000, num_drafts=1), DECODE)
    assert core.flops[0] == 2 * 2 * 4 * 64 * 512 * (129 + 512)
    assert core.kv_bytes[0] == 2 * (129 + 512) * 512 * 2


def test_heads_alone_are_cut_in_compressed_attention():
    """What makes queries' latents, entries and index queries is on every rank."""
    model = published("deepseek-v4-flash")
    one, four = (operations(model, _compressed("chosen"), 2, 1, 5000, tp) for tp in (1, 4))
    hidden, tokens = model.hidden_size, 2
    copied = 1024 + 512 + 2 * 2 * (512 + 128) + 64
    copied = 2 * tokens * (copied * hidden + 64 * 128 * 1024)
    copied += flops(one, OpKind.INDEX_DECODE)
    mixing = 2 * tokens * 24 * 4 * hidden  # of streams, which all ranks hold in this form
    core = flops(four, DECODE)
    assert 4 * core == flops(one, DECODE)
    cut = flops(one) - copied - mixing
    assert flops(four) == copied + cut // 4 + mixing


def test_streams_stay_with_the_owners_of_tokens():
    """Sent between ranks of a stage is one stream's width; between stages all of them."""
    flash = published("deepseek-v4-flash")
    plain = flash.with_overrides(num_streams=1)
    sent = []
    for model in (flash, plain):
        steps = mixer(model, _compressed("all"), 8, 1, 9, tp=8)
        moved = (each for each in steps if isinstance(each, Transfer))
        sent.append(sum(int(each.sent_bytes.sum()) for each in moved))
    assert sent[0] == sent[1] > 0
    handed = []
    for model in (COMPRESSED, COMPRESSED.with_overrides(num_streams=1)):
        part = PartSizes.even(1, 2, 6)
        built = builder_of("pp=2,tp=2", model).build_sized(
            [("all_gather", [part])], PowerLawRouting.of(model, 0)
        )
        handed.append(built.stages[0][0].hand_over.sent_bytes.tolist())
    assert handed == [[3 * 4 * 2048 * 2] * 2, [3 * 2048 * 2] * 2]
