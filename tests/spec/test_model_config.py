import math

import pytest

from cli.screen import tells
from expertlane.errors import SpecError
from expertlane.spec.mixers import LatentAttention, Mixing, RopeScaling
from expertlane.spec.model import PRESETS, LayerKind, Routing
from expertlane.spec.tensors import expert_shapes, layer_shapes, num_params

TINY = PRESETS["paper-tiny"]


def num_expert_params(model):
    return sum(map(math.prod, expert_shapes(model).values()))


def num_attention_params(model):
    """Of one layer's attention, the norm before it aside."""
    shapes = layer_shapes(model, LayerKind(Mixing(), "dense"))
    parts = (
        part for part in shapes if "." not in part and part not in ("attention_norm", "moe_norm")
    )
    return sum(math.prod(shapes[part]) for part in parts)


def test_the_paper_s_model_by_hand():
    paper = PRESETS["paper"]
    assert (paper.num_hidden_layers, paper.num_experts, paper.hidden_size) == (4, 16, 8192)
    assert (paper.num_attention_heads, paper.head_dim, paper.attention_size) == (16, 512, 8192)
    assert paper.moe_intermediate_size == 4 * paper.hidden_size == 32_768
    assert num_expert_params(paper) == 536_870_912  # 2 × 8192 × 32768
    assert num_attention_params(paper) == 268_435_456  # 4 × 8192 × 8192
    # Per layer 268,435,456 + 16 × 536,870,912 + 16 × 8192 + 2 × 8192 = 8,858,517,504;
    # outside 2 × 32768 × 8192 + 8192 = 536,879,104.
    assert num_params(paper) == 4 * 8_858_517_504 + 536_879_104 == 35_970_949_120


@pytest.mark.parametrize("name", ["paper", "paper-small", "paper-tiny"])
def test_presets_keep_the_paper_s_layers_experts_and_heads(name):
    model = PRESETS[name]
    assert model.name == name
    assert (model.num_hidden_layers, model.num_experts, model.num_attention_heads) == (4, 16, 16)
    assert model.num_experts_per_tok == 2
    if name == "paper-small":  # all but the hidden states in the paper's proportions
        paper = PRESETS["paper"]
        for size in ("attention_size", "moe_intermediate_size", "vocab_size"):
            assert 8 * getattr(model, size) == getattr(paper, size)
    else:
        assert model.attention_size == model.hidden_size


def test_one_of_everything_is_a_model():
    model = TINY.with_overrides(
        num_hidden_layers=1,
        hidden_size=2,
        num_attention_heads=1,
        head_dim=2,
        num_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=1,
        vocab_size=1,
        max_position_embeddings=1,
    )
    # Attention 4 × 2 × 2, two norms, router 2, expert 2 × 2; embedding, head and final norm.
    assert num_params(model) == 16 + 4 + 2 + 4 + 6


def test_parameters_of_every_part_by_hand():
    model = TINY.with_overrides(
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        qkv_bias=True,
        output_bias=True,
        qk_norm="full",
        attention_sinks=True,
        gated_mlp=True,
        hidden_act="silu",
        expert_bias=True,
        num_experts=3,
        moe_intermediate_size=5,
        routing=Routing(router_bias=True, correction_bias=True),
        dense_layers=(0,),
        intermediate_size=7,
        shared_expert_intermediate_size=9,
        shared_expert_gate=True,
        tie_word_embeddings=True,
        vocab_size=11,
    )
    # Queries 8 × 24 + 24, keys and values 8 × 12 + 12 each; output 24 × 8 + 8; norms 24 + 12;
    # sinks 4.
    assert num_attention_params(model) == 216 + 2 * 108 + 200 + 36 + 4
    assert num_expert_params(model) == 3 * 8 * 5 + 5 + 5 + 8
    moe = 3 * (8 + 1 + 1 + 138) + 3 * 8 * 9 + 8
    dense = 3 * 8 * 7
    assert num_params(model) == 2 * (672 + 16) + moe + dense + 11 * 8 + 8
    heads = model.with_overrides(qk_norm="head")
    assert num_attention_params(heads) == 672 - 36 + 12


def test_latent_attention_by_hand():
    latent = LatentAttention(5, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=3, mscale=2.0)
    model = TINY.with_overrides(head_dim=8, hidden_size=10, num_attention_heads=4, latent=latent)
    assert (model.attention_size, model.attention_output_size, model.rotary_dim) == (32, 12, 2)
    assert model.softmax_scale == pytest.approx(4 / math.sqrt(8))
    # Queries 10 × 32; latent 10 × (5 + 2) and its norm 5; keys and values 5 × 4 × 9; 12 × 10.
    assert num_attention_params(model) == 320 + 70 + 5 + 180 + 120
    narrow = model.with_overrides(latent=LatentAttention(5, 6, 2, 3, q_lora_rank=4))
    assert num_attention_params(narrow) == 10 * 4 + 4 + 4 * 32 + 70 + 5 + 180 + 120


_LATENT = LatentAttention(5, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 divide 16"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 1"),
        ({"sliding_window": (4, None)}, "sliding_window 2"),
        ({"sliding_window": (4, None, 0, 1)}, "sliding_window 0"),
        ({"rope_scaling": RopeScaling("linear", math.nan, 8)}, "rope_scaling factor nan"),
        ({"latent": _LATENT, "head_dim": 6}, "head_dim 6 latent"),
        ({"latent": _LATENT, "qkv_bias": True}, "latent qkv_bias qk_norm"),
        ({"latent": LatentAttention(5, 1, 3, 3)}, "qk_rope_head_dim 3 rotary positions"),
        ({"latent": LatentAttention(5, 2, 2, 0)}, "latent v_head_dim 0"),
        ({"latent": LatentAttention(5, 2, 2, 3, 0)}, "latent q_lora_rank 0"),
        ({"routing": Routing(n_group=3)}, "n_group 3 divide 16 experts"),
        ({"routing": Routing(n_group=0)}, "routing n_group 0"),
        ({"routing": Routing(n_group=4, topk_group=5)}, "topk_group 5 1"),
        (
            {"routing": Routing(n_group=16), "num_experts_per_tok": 2},
            "num_experts_per_tok 2 topk_group 1 × experts",
        ),
        (
            {"routing": Routing(n_group=16, topk_group=2, group_score="top2_sum")},
            "n_group 16 experts 2",
        ),
        ({"dense_layers": (1, 0)}, "dense_layers 1 0 layer"),
        ({"dense_layers": (4,)}, "dense_layers 4 layer 0 3"),
        ({"dense_layers": (0,)}, "intermediate_size 0 dense layers"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size -1"),
        ({"swiglu_limit": 7.0}, "swiglu_limit 7 gated_mlp true"),
    ],
)
def test_features_that_do_not_fit(overrides, message):
    with pytest.raises(SpecError) as error:
        TINY.with_overrides(**overrides)
    assert tells(str(error.value), message)
    assert str(error.value).startswith("model paper-tiny: ")
