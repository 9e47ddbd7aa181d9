import math

import pytest

from expertlane.errors import SpecError
from expertlane.spec.model import PRESETS

TINY = PRESETS["paper-tiny"]


def test_the_paper_s_model_by_hand():
    paper = PRESETS["paper"]
    assert (paper.num_hidden_layers, paper.num_experts, paper.hidden_size) == (4, 16, 8192)
    assert (paper.num_attention_heads, paper.head_dim, paper.attention_size) == (16, 512, 8192)
    assert paper.moe_intermediate_size == 4 * paper.hidden_size == 32_768
    assert paper.num_expert_params == 536_870_912  # 2 × 8192 × 32768
    assert paper.num_attention_params == 268_435_456  # 4 × 8192 × 8192
    # Per layer 268,435,456 + 16 × 536,870,912 + 16 × 8192 + 2 × 8192 = 8,858,517,504;
    # outside 2 × 32768 × 8192 + 8192 = 536,879,104.
    assert paper.num_params == 4 * 8_858_517_504 + 536_879_104 == 35_970_949_120


@pytest.mark.parametrize("name", ["paper", "paper-small", "paper-tiny"])
def test_presets_keep_the_paper_s_layers_experts_and_heads(name):
    model = PRESETS[name]
    assert model.name == name
    assert (model.num_hidden_layers, model.num_experts, model.num_attention_heads) == (4, 16, 16)
    assert model.num_experts_per_tok == 2
    assert model.attention_size == model.hidden_size


def test_overrides_replace_and_leave_the_rest():
    model = TINY.with_overrides(num_experts_per_tok=1)
    assert model.num_experts_per_tok == 1
    assert model.with_overrides(num_experts_per_tok=2) == TINY


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
    assert model.num_params == 16 + 4 + 2 + 4 + 6


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", [0, -2, math.nan])
def test_sizes_must_be_positive(field, value):
    with pytest.raises(SpecError) as error:
        TINY.with_overrides(**{field: value})
    assert str(error.value) == f"model paper-tiny: {field} is {value}; it must be positive"


def test_more_experts_per_token_than_experts():
    with pytest.raises(SpecError) as error:
        TINY.with_overrides(num_experts_per_tok=17)
    assert str(error.value) == (
        "model paper-tiny: num_experts_per_tok is 17 but there are only 16 experts"
    )
    TINY.with_overrides(num_experts_per_tok=16)


def test_rotary_positions_need_an_even_head():
    with pytest.raises(SpecError) as error:
        TINY.with_overrides(head_dim=5)
    assert str(error.value) == (
        "model paper-tiny: head_dim is 5; rotary positions need an even one"
    )
