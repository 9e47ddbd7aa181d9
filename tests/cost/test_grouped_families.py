"""Heads, gates and latents of families that are planned alone: bytes by hand, FLOPs of classes."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from expertlane.balance.holding import Slices, placements_of
from expertlane.cost.memory import BLOCK_SIZE, PlacedModel, kept_bytes
from expertlane.cost.step.attention import mixer_steps
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.operation import NumberTypes, Operation, OpKind
from expertlane.cost.step.step_list import GPU_LIBRARIES, StepList
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing
from expertlane.spec.tensors import layer_name, layer_shapes

PUBLISHED = Path(__file__).parent.parent / "spec" / "published_grouped.json"
CONFIGS = json.loads(PUBLISHED.read_text())
TYPES = NumberTypes()


def _model(name):
    return from_hf(CONFIGS[name], name, weights=False)


def _operations(model, window, num_new, num_cached=0, tp=1):
    layout = Layout(tp=tp)
    out = StepList(StageMesh.of(layout, 0, 0, 8), TYPES, "all_gather", GPU_LIBRARIES)
    part = PartSizes.even(1, tp, 1, num_new, num_cached)
    mixer_steps(out, model, Mixing("attention", window), part)
    return [step for step in out.steps if isinstance(step, Operation)]


def _flops(operations, *kinds):
    return int(sum(each.flops[0] for each in operations if each.kind in kinds))


def test_bytes_of_a_position_by_hand():
    types = NumberTypes.asked("bfloat16")
    for name, of_position in {
        "phi-3.5-moe": 32 * 2 * 8 * 128 * 2,
        "hunyuan-a13b": 32 * 2 * 8 * 128 * 2,
        "hy3-preview": 80 * 2 * 8 * 128 * 2,
        "kimi-k2.5": 61 * (512 + 64) * 2,
        "step3": 61 * 2 * 256 * 2,  # one head of keys, one of values
    }.items():
        model = _model(name)
        assert kept_bytes(model, types, 1, range(model.num_hidden_layers)) == (of_position, 0)


def test_windows_are_kept_alone_where_their_heads_are_their_own():
    types = NumberTypes.asked("bfloat16")
    mimo = _model("mimo-v2-flash")  # nine layers see all; windows are of 129, in blocks of 16
    of_window = 39 * (9 + 1) * 16 * 8 * (192 + 128) * 2
    assert kept_bytes(mimo, types, 1, range(48)) == (9 * 4 * (192 + 128) * 2, of_window)
    of_rank = 39 * (9 + 1) * 16 * 1 * (192 + 128) * 2  # four heads of the others are held twice
    assert kept_bytes(mimo, types, 8, range(48)) == (9 * 1 * (192 + 128) * 2, of_rank)
    step = _model("step-3.5-flash")
    of_window = 33 * (512 + 16) * 2 * 8 * 128 * 2
    assert kept_bytes(step, types, 1, range(45)) == (12 * 2 * 8 * 128 * 2, of_window)
    # A sequence of a million tokens takes as many blocks for its windows as one of a thousand.
    layout = Layout(tp=8)
    placed = PlacedModel(mimo, layout, types, placements_of(mimo, layout, Options()))
    blocks = placed.state_blocks(Limits(mimo.vocab_size, 1024, 10**6))
    assert blocks == -(-of_rank // (BLOCK_SIZE * 9 * 320 * 2))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 8, 16])
def test_ranks_hold_every_row_once_or_copies(name, tp):
    model = _model(name)
    for kind in {model.kind_of_layer(layer) for layer in range(model.num_hidden_layers)}:
        for part, shape in layer_shapes(model, kind).items():
            if part.endswith("output_bias"):  # added once
                continue
            rows = [Slices(tp, rank).of_tensor(model, layer_name(0, part)) for rank in range(tp)]
            size = shape[1 if part.endswith(("output", "down")) else 0]
            assert set().union(*rows) == set(range(size)), part
            copies = sum(map(len, rows)) / size
            assert copies == int(copies), part
            is_cut = part.endswith(("query", "query_b", "output", "gate", "up", "down", "sinks"))
            assert copies == 1 or not is_cut or "shared_gate" in part, part


_CLASSES = {
    "phi-3.5-moe": ("phimoe", "PhimoeAttention"),
    "hunyuan-a13b": ("hunyuan_v1_moe", "HunYuanMoEV1Attention"),
    "hy3-preview": ("hy_v3", "HYV3Attention"),
    "mimo-v2-flash": ("mimo_v2_flash", "MiMoV2FlashAttention"),
    "step-3.5-flash": ("step3p7", "Step3p7Attention"),
    "kimi-k2.5": ("deepseek_v3", "DeepseekV3Attention"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", _CLASSES)
@pytest.mark.parametrize("layer", [0, 1])
def test_flops_are_those_of_transformers(name, layer):
    """In prompts shorter than any window. They score positions to come too, num² of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from spec.reference import their_config

    package, class_name = _CLASSES[name]
    module = import_module(f"transformers.models.{package}.modeling_{package}")
    config, model, num = their_config(CONFIGS[name]), _model(name), 64
    config._attn_implementation = "eager"
    if name == "step-3.5-flash":
        config = config.per_layer_config[layer]
        config._attn_implementation = "eager"
    shape = {"device": "meta"}
    with torch.device("meta"):
        attention = getattr(module, class_name)(config, layer)
    turned = torch.zeros(1, num, model.rotary_dim, **shape)
    if name == "step-3.5-flash" and layer == 1:
        turned = torch.zeros(1, num, 128, **shape)  # all of a head; half of one without a window
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attention.eval()(
            hidden_states=torch.zeros(1, num, model.hidden_size, **shape),
            position_embeddings=(turned, turned),
            attention_mask=None,
        )
    operations = _operations(model, model.window_of_layer(layer), num)
    cores = (OpKind.PREFILL_ATTENTION, OpKind.LATENT_PREFILL)
    causal = _flops(operations, *cores) * num * num / (num * (num + 1) / 2)
    ours = _flops(operations, OpKind.GEMM) + causal
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_queries_from_a_latent_by_hand():
    """Step-3's, of which transformers has no class: products as in the code beside its weights."""
    model, num = _model("step3"), 64
    operations = _operations(model, None, num)
    products = 7168 * (2048 + 256 + 256) + 2048 * 64 * 256 + 64 * 256 * 7168
    assert _flops(operations, OpKind.GEMM) == 2 * num * products
    pairs = num * (num + 1) // 2
    assert _flops(operations, OpKind.PREFILL_ATTENTION) == 2 * pairs * 64 * (256 + 256)
    on_one_of_8 = _operations(model, None, num, tp=8)  # the latent is computed on every rank
    products = 7168 * (2048 + 256 + 256) + 2048 * 8 * 256 + 8 * 256 * 7168
    assert _flops(on_one_of_8, OpKind.GEMM) == 2 * num * products


def test_a_decode_reads_its_window_alone():
    model = _model("mimo-v2-flash")
    own, every = (_operations(model, each, 1, 10_000) for each in (129, None))
    (of_window,) = (each for each in own if each.kind is OpKind.DECODE_ATTENTION)
    (of_all,) = (each for each in every if each.kind is OpKind.DECODE_ATTENTION)
    assert of_window.kv_bytes[0] == 129 * 8 * (192 + 128) * 2
    assert of_all.kv_bytes[0] == 10_001 * 4 * (192 + 128) * 2
    assert of_window.flops[0] == 2 * 129 * 64 * (192 + 128)
    assert of_all.flops[0] == 2 * 10_001 * 64 * (192 + 128)
