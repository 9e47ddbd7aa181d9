"""Mixers beside attention: bytes by hand, FLOPs beside a count of transformers' classes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.screen import refusing
from cost.projected import builder_of
from expertlane.balance.holding import Slices, placements_of
from expertlane.cost.memory import PlacedModel, held_kv_bytes, held_state_bytes, kept_bytes
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.attention import mixer_steps
from expertlane.cost.step.batch_sizes import PartSizes, pairs_and_positions
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.operation import (
    NumberTypes,
    Operation,
    OpKind,
    Transfer,
    TransferKind,
)
from expertlane.cost.step.step_list import GPU_LIBRARIES, StepList
from expertlane.errors import CapacityError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing, StateMixer
from expertlane.spec.tensors import cut_dim, layer_name, layer_shapes
from expertlane.spec.workload import SharedPrefixes
from planner.requests import COMPRESSED

PUBLISHED = Path(__file__).parent.parent / "spec" / "published_mixers.json"
CONFIGS = json.loads(PUBLISHED.read_text())
TYPES = NumberTypes()
DECODE = OpKind.LATENT_DECODE


def _model(name):
    return from_hf(CONFIGS[name], name, weights=False)


def _operations(model, mixing, num_seqs, num_new, num_cached=0, tp=1):
    steps = _steps(model, mixing, num_seqs, num_new, num_cached, tp)
    return [step for step in steps if isinstance(step, Operation)]


def _steps(model, mixing, num_seqs, num_new, num_cached=0, tp=1):
    layout = Layout(tp=tp)
    out = StepList(StageMesh.of(layout, 0, 0, 8), TYPES, "all_gather", GPU_LIBRARIES)
    mixing = Mixing(mixing) if isinstance(mixing, str) else mixing
    mixer_steps(out, model, mixing, PartSizes.even(1, tp, num_seqs, num_new, num_cached))
    return out.steps


def _flops(operations, *kinds):
    chosen = [each for each in operations if not kinds or each.kind in kinds]
    return int(sum(each.flops[0] for each in chosen))


def test_bytes_of_a_sequence_by_hand():
    qwen = _model("qwen3-next-80b-a3b")
    of_position, of_state = held_kv_bytes(qwen, TYPES, 1), held_state_bytes(qwen, TYPES, 1)
    assert kept_bytes(qwen, TYPES, 1, range(48)) == (12 * of_position, 36 * of_state)
    # 2 heads of 256 keys and values; 32 states of 128 x 128 in float32, and 3 inputs of
    # 2 x 16 x 128 + 32 x 128 channels.
    assert held_kv_bytes(qwen, TYPES, 1) == 2 * 2 * 256 * 2
    assert held_state_bytes(qwen, TYPES, 1) == 32 * 128 * 128 * 4 + 3 * 8192 * 2 == 2_146_304
    assert held_state_bytes(qwen, TYPES, 8) == 2_146_304 // 8
    nemotron = _model("nemotron-3-nano-30b-a3b")
    of_position, of_state = held_kv_bytes(nemotron, TYPES, 1), held_state_bytes(nemotron, TYPES, 1)
    assert kept_bytes(nemotron, TYPES, 1, range(52)) == (6 * of_position, 23 * of_state)
    assert held_kv_bytes(nemotron, TYPES, 1) == 2 * 2 * 128 * 2
    # 64 states of 128 x 64, 3 inputs of 4096 + 2 x 8 x 128 channels.
    assert held_state_bytes(nemotron, TYPES, 1) == 64 * 128 * 64 * 4 + 3 * 6144 * 2
    jamba = _model("jamba-v0.1")
    kept = 4 * held_kv_bytes(jamba, TYPES, 1), 28 * held_state_bytes(jamba, TYPES, 1)
    assert kept_bytes(jamba, TYPES, 1, range(32)) == kept
    assert held_kv_bytes(jamba, TYPES, 1) == 2 * 8 * 128 * 2
    # 8192 channels, each with a state of 16 values in float32 and 3 inputs.
    assert held_state_bytes(jamba, TYPES, 1) == 8192 * 16 * 4 + 3 * 8192 * 2
    assert held_state_bytes(jamba, TYPES, 8) == held_state_bytes(jamba, TYPES, 1) // 8
    ling = _model("ling-3.0-flash")
    kept = 7 * held_kv_bytes(ling, TYPES, 1), 35 * held_state_bytes(ling, TYPES, 1)
    assert kept_bytes(ling, TYPES, 1, range(42)) == kept
    assert held_kv_bytes(ling, TYPES, 8) == 576 * 2
    assert held_state_bytes(ling, TYPES, 1) == 32 * 128 * 128 * 4 + 3 * (3 * 32 * 128) * 2
    ring = _model("ring-mini-linear-2.0")
    assert held_state_bytes(ring, TYPES, 1) == 16 * 128 * 128 * 4  # no convolutions
    assert held_state_bytes(_model("deepseek-v3.2"), TYPES, 8) == 0


def test_bytes_of_compressed_attention_by_hand():
    flash, window = _model("deepseek-v4-flash"), 9 * 16  # 128 positions begin inside a block
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
    pro = _model("deepseek-v4-pro")
    assert kept_bytes(pro, TYPES, 1, range(61)).position == 30 * 289 + 31 * 8


def test_blocks_of_positions_that_share_entries():
    model, layout = _model("deepseek-v4-flash"), Layout(tp=8)
    held = PlacedModel(model, layout, TYPES, placements_of(model, layout, Options()))
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
    held = PlacedModel(few, layout, TYPES, placements_of(few, layout, Options()))
    assert held.rank_memory(replace(limits, num_blocks=1), 0).kv_bytes == 16 * 8


def test_what_no_layout_of_compressed_attention_cuts():
    model = _model("deepseek-v4-flash")
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


def test_groups_fewer_than_ranks_are_copied():
    granite = _model("granite-4.0-h-small")  # one group of queries and keys
    assert held_state_bytes(granite, TYPES, 8) == 16 * 128 * 64 * 4 + 3 * (1024 + 2 * 128) * 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 8, 16])
def test_ranks_hold_every_row_once_or_copies(name, tp):
    model = _model(name)
    for kind in {model.kind_of_layer(layer) for layer in range(model.num_hidden_layers)}:
        for part, shape in layer_shapes(model, kind).items():
            if not part.startswith("state.") or part.endswith("output_bias"):
                continue
            rows = [Slices(tp, rank).of_tensor(model, layer_name(0, part)) for rank in range(tp)]
            size = shape[cut_dim(part)]
            assert set().union(*rows) == set(range(size)), part
            copies = sum(map(len, rows)) / size
            is_whole = part.endswith(("gate_a", "decay_a"))
            assert copies == int(copies), part
            assert copies == 1 or is_whole or "query" in part or "key" in part or "norm" in part


def test_ranks_add_up_what_mamba_1_selects():
    """A time step, a key and a query of each token, from channels that are cut."""
    model = _model("jamba-v0.1")
    alone = _operations(model, "state", 3, 1, 1000)
    (state,) = (each for each in alone if each.kind is OpKind.MAMBA1_DECODE)
    assert state.flops[0] == 3 * 8192 * 4 * 16
    assert state.dtype == "float32"
    out = _steps(model, "state", 3, 1, 1000, tp=2)
    transfers = (each for each in out if isinstance(each, Transfer))
    selected, _ = (each for each in transfers if each.kind is TransferKind.ALL_REDUCE)
    assert selected.sent_bytes.sum() == 2 * 3 * (256 + 2 * 16) * 2  # there and back
    cut = [each for each in out if isinstance(each, Operation)]
    assert 2 * _flops(cut) == _flops(alone)


def test_no_prefix_is_shared_where_weights_alone_do_not_fit():
    model, layout = _model("deepseek-v3.2"), Layout()
    held = PlacedModel(model, layout, TYPES, placements_of(model, layout, Options()))
    capacity = held.capacity(1e9, 64, 2048, SharedPrefixes(1, 2, 16))
    assert capacity.max_seqs == capacity.num_blocks == 0


def test_a_cache_is_shared_by_pages_and_states():
    model = _model("qwen3-next-80b-a3b")
    layout = Layout(tp=8)
    held = PlacedModel(model, layout, TYPES, placements_of(model, layout, Options()))
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
    model = _model("qwen3-next-80b-a3b").with_overrides(num_hidden_layers=4, state_layers=(0, 1, 2))
    layout = Layout(pp=2)
    held = PlacedModel(model, layout, TYPES, placements_of(model, layout, Options()))
    of_state = held.state_blocks(Limits(model.vocab_size, 1024, 10**4))
    block_bytes = 16 * held_kv_bytes(model, TYPES, 1)
    assert of_state == -(-held_state_bytes(model, TYPES, 1) // block_bytes)
    limits = held.fit_cache(Limits(model.vocab_size, 1024, 10**4), 100e9)
    first, last = (held.rank_memory(limits, rank) for rank in (0, 1))
    most = min(limits.num_blocks // (of_state + 1), limits.max_num_seqs)
    assert first.kv_bytes == 2 * most * held_state_bytes(model, TYPES, 1)
    assert last.kv_bytes == limits.num_blocks * block_bytes


def test_one_token_reads_and_writes_each_state_once():
    model = _model("qwen3-next-80b-a3b")
    operations = _operations(model, "state", 3, 1, 1000)
    (state,) = (each for each in operations if each.kind is OpKind.GATED_DELTA_DECODE)
    assert state.kv_bytes[0] == 2 * 3 * 32 * 128 * 128 * 4
    assert state.flops[0] == 3 * 32 * 6 * 128 * 128
    longer = _operations(model, "state", 3, 1, 100_000)
    assert _flops(longer) == _flops(operations)


def test_chunks_take_more_than_single_tokens():
    state = StateMixer("gated_delta", 4, 2, 32, 64)
    assert state.token_flops(4, in_chunks=False) == 4 * 2 * 3 * 32 * 64
    assert state.token_flops(4, in_chunks=True) == 4 * 2 * (64 * (64 + 64 + 48) + 3 * 32 * 64)
    mamba = StateMixer("mamba2", 4, 1, 32, 64, chunk_size=128)
    assert mamba.token_flops(4, in_chunks=True) == 4 * 2 * (128 * (8 + 64) + 2 * 32 * 64)


def test_groups_that_are_normed_together_are_not_cut():
    ring = _model("ring-mini-linear-2.0")
    Layout(tp=4).check_model(ring)
    with refusing("tp=8 4 groups of a norm Lightning Attention valid tp 1 2 4"):
        Layout(tp=8).check_model(ring)


def test_a_gate_of_each_head_is_a_product():
    model = _model("ling-3.0-flash")
    gated, plain = (
        _operations(each, "attention", 4, 1, 100)
        for each in (model, model.with_overrides(attention_gate=None))
    )
    assert _flops(gated) - _flops(plain) == 4 * 2 * 32 * 2560


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["gated_delta", "kimi_delta", "full_rank", "mamba1", "mamba2", "lightning"]
)
def test_flops_are_those_of_transformers(kind):
    """In prompts, at small sizes. Differences by name: see the comments."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.bailing_hybrid import modeling_bailing_hybrid as bailing
    from transformers.models.jamba import modeling_jamba as jamba
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.minimax import modeling_minimax as minimax
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    name, module, config = {
        "gated_delta": ("qwen3-next-80b-a3b", qwen.Qwen3NextGatedDeltaNet, qwen.Qwen3NextConfig),
        "kimi_delta": ("kimi-linear-48b-a3b", kimi.KimiLinearDeltaAttention, kimi.KimiLinearConfig),
        "full_rank": (
            "ling-3.0-flash",
            bailing.BailingHybridDeltaAttention,
            bailing.BailingHybridConfig,
        ),
        "lightning": (  # of another family: its own has no class
            "ring-mini-linear-2.0",
            minimax.MiniMaxLightningAttention,
            lambda **_: minimax.MiniMaxConfig(
                hidden_size=2048, num_attention_heads=16, head_dim=128, num_hidden_layers=20
            ),
        ),
        "mamba1": ("jamba-v0.1", jamba.JambaMambaMixer, jamba.JambaConfig),
        "mamba2": (
            "nemotron-3-nano-30b-a3b",
            nemotron.NemotronHMamba2Mixer,
            nemotron.NemotronHConfig,
        ),
    }[kind]
    model, num = _model(name), 256
    state, hidden = model.state, model.hidden_size
    given = {
        key: each
        for key, each in CONFIGS[name].items()
        if key not in ("architectures", "model_type", "rope_scaling")
    }
    with torch.device("meta"):
        mixer, inputs = module(config(**given), model.state_layers[0]), torch.randn(1, num, hidden)
    given = (inputs, (), None) if kind == "lightning" else (inputs,)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer.eval()(*given)
    theirs = counter.get_total_flops()
    operations = _operations(model, "state", 1, num)
    # Convolutions, which we count as bytes alone.
    convolutions = 2 * num * state.conv_kernel * state.conv_channels(1)
    ours = _flops(operations) + convolutions
    if kind == "lightning":
        assert ours == pytest.approx(theirs, rel=0.02)
        return
    if kind == "mamba1":  # they add to states and decay them value by value, which is not counted
        ours -= 2 * num * state.num_heads * state.key_dim
        assert ours == pytest.approx(theirs, rel=0.02)
        return
    if kind == "mamba2":  # they compute products of queries and keys anew for each head of a group
        heads = state.num_heads - state.num_key_heads
        ours += 2 * num * state.chunk_size * state.key_dim * heads
        assert ours == pytest.approx(theirs, rel=0.02)
        return
    # Triangular systems, which the counter does not see.
    systems = num * state.num_heads * state.chunk_size * (state.key_dim + state.value_dim)
    assert ours - systems == pytest.approx(theirs, rel=0.02)


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
    model, num_cached = _model("deepseek-v4-flash"), 10_000
    for entries, seen in ((None, 0), ("chosen", 512), ("all", 10_001 // 128)):
        ops = _operations(model, _compressed(entries), 3, 1, num_cached)
        (core,) = (each for each in ops if each.kind is DECODE)
        assert core.flops[0] == 3 * 4 * 64 * 512 * (128 + seen)
        assert core.kv_bytes[0] == 3 * (128 + seen) * 512 * 2
        scored = [each for each in ops if each.kind is OpKind.INDEX_DECODE]
        assert len(scored) == (entries == "chosen")
        for each in scored:
            assert each.flops[0] == 3 * 2 * 64 * 128 * (10_001 // 4)
            assert each.kv_bytes[0] == 3 * (10_001 // 4) * 132
    # Few entries are all seen, none is there before the first is full.
    (core,) = (
        each
        for each in _operations(model, _compressed("chosen"), 1, 1, 2)
        if each.kind is OpKind.LATENT_DECODE
    )
    assert core.flops[0] == 4 * 64 * 512 * 3


def test_prompts_of_compressed_attention_by_hand():
    """Over a float8 cache by a kernel of its own; both count the same."""
    model = _model("deepseek-v4-flash")
    for kv, kind in (("bfloat16", OpKind.SPARSE), ("float8", OpKind.COMPRESSED)):
        out = StepList(
            *(StageMesh.of(Layout(), 0, 0, 8), replace(TYPES, kv=kv), "all_gather", GPU_LIBRARIES)
        )
        mixer_steps(out, model, _compressed("all"), PartSizes.even(1, 1, 2, 256, 0))
        (core,) = (each for each in out.steps if isinstance(each, Operation) and each.kind is kind)
        # A window of 128 in 256 tokens; an entry from the 128th on, two for the last.
        pairs = 128 * 129 // 2 + 128 * 128 + 128 + 2
        assert core.flops[0] == 2 * 4 * 64 * 512 * pairs
        bytes_of_vector = {"bfloat16": 1024, "float8": 513}[kv]
        assert core.kv_bytes[0] == 2 * (256 + 2) * bytes_of_vector


def test_drafts_of_compressed_attention():
    """Each sees as many entries as a single token; of the window all read what any sees."""
    model = _model("deepseek-v4-flash")
    out = StepList(StageMesh.of(Layout(), 0, 0, 8), TYPES, "all_gather", GPU_LIBRARIES)
    mixer_steps(out, model, _compressed("chosen"), PartSizes.even(1, 1, 2, 1, 8000, 1))
    (core,) = (each for each in out.steps if isinstance(each, Operation) and each.kind is DECODE)
    assert core.flops[0] == 2 * 2 * 4 * 64 * 512 * (129 + 512)
    assert core.kv_bytes[0] == 2 * (129 + 512) * 512 * 2


def test_heads_alone_are_cut_in_compressed_attention():
    """What makes queries' latents, entries and index queries is on every rank."""
    model = _model("deepseek-v4-flash")
    one, four = (_operations(model, _compressed("chosen"), 2, 1, 5000, tp) for tp in (1, 4))
    hidden, tokens = model.hidden_size, 2
    copied = 1024 + 512 + 2 * 2 * (512 + 128) + 64
    copied = 2 * tokens * (copied * hidden + 64 * 128 * 1024)
    copied += _flops(one, OpKind.INDEX_DECODE)
    mixing = 2 * tokens * 24 * 4 * hidden  # of streams, which all ranks hold in this form
    core = _flops(four, OpKind.LATENT_DECODE)
    assert 4 * core == _flops(one, OpKind.LATENT_DECODE)
    cut = _flops(one) - copied - mixing
    assert _flops(four) == copied + cut // 4 + mixing


def test_streams_stay_with_the_owners_of_tokens():
    """Sent between ranks of a stage is one stream's width; between stages all of them."""
    flash = _model("deepseek-v4-flash")
    plain = flash.with_overrides(num_streams=1)
    sent = []
    for model in (flash, plain):
        steps = _steps(model, _compressed("all"), 8, 1, 9, tp=8)
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


@pytest.mark.full
@pytest.mark.parametrize("entries", [None, "chosen", "all"])
def test_flops_of_compressed_attention_are_those_of_transformers(entries):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek

    model, num, topk = _model("deepseek-v4-flash"), 1024, 64
    model = model.with_overrides(indexer=replace(model.indexer, topk=topk))
    given = {key: each for key, each in CONFIGS["deepseek-v4-flash"].items() if key != "model_type"}
    config = deepseek.DeepseekV4Config(**given | {"index_topk": topk})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        attention = deepseek.DeepseekV4Attention(config, model.compressed.layers.index(entries))
        inputs, angles = torch.randn(1, num, 4096), torch.randn(1, num, 32)
        mask, at = torch.zeros(1, 1, num, num), torch.zeros(1, num, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attention.eval()(inputs, dict.fromkeys(("main", "compress"), (angles, angles)), at, mask)
    operations = _operations(model, _compressed(entries), 1, num)
    num_entries = {None: 0, "chosen": num // 4, "all": num // 128}[entries]
    (core,) = (each for each in operations if each.kind is OpKind.SPARSE)
    # They multiply what a token does not see too: all positions, all entries.
    ours = _flops(operations) - _mixing(num) - int(core.flops[0])
    ours += 4 * 64 * 512 * num * (num + num_entries)
    if entries == "chosen":
        (scored,) = (each for each in operations if each.kind is OpKind.INDEX)
        ours += 2 * 64 * 128 * num * num_entries - int(scored.flops[0])
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)


def _mixing(num):
    """FLOPs of streams' weights."""
    return 2 * num * 24 * 4 * 4096


@pytest.mark.full
def test_flops_of_streams_are_those_of_transformers():
    """Their mixing of four streams, a product of 4 x 4 for every value, is bytes alone here."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek

    model, num = _model("deepseek-v4-flash"), 16
    with torch.device("meta"):
        streams = deepseek.DeepseekV4HyperConnection(deepseek.DeepseekV4Config())
        inputs = torch.randn(1, num, 4, 4096)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        streams(inputs)
    (weights, *_) = _operations(model, _compressed(None), 1, num)
    assert weights.flops[0] == counter.get_total_flops() == _mixing(num)
