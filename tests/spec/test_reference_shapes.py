"""Tensors of published models, by name and shape, are those of transformers' classes."""

import json
from pathlib import Path

import pytest

from expertlane.spec.from_hf import from_hf
from expertlane.spec.model import (
    ModelConfig,
    expert_shapes,
    layer_shapes,
    num_params,
)
from spec.reference import (
    joined_shape,
    num_values,
    ours_of,
    reference,
    their_shapes,
    without_ones,
)

HERE = Path(__file__)
MIXERS = json.loads(HERE.with_name("published_mixers.json").read_text())
PLAIN = json.loads(HERE.with_name("published.json").read_text())
_OWN_LAYOUT = {"gpt-oss-20b"}  # transposed and interleaved: tests of checkpoints
_WITHOUT_CLASS = {"ring-mini-linear-2.0"}  # by hand, below


def _ours(model: ModelConfig) -> set[tuple[int | None, str]]:
    names = {(None, "embedding"), (None, "final_norm")}
    if not model.tie_word_embeddings:
        names.add((None, "head"))
    for layer in range(model.num_hidden_layers):
        kind = model.kind_of_layer(layer)
        names |= {(layer, part) for part in layer_shapes(model, kind)}
        if kind.mlp == "experts":
            names |= {(layer, f"experts.{part}") for part in expert_shapes(model)}
    return names


@pytest.mark.full
@pytest.mark.parametrize("name", (PLAIN | MIXERS).keys() - _OWN_LAYOUT - _WITHOUT_CLASS)
def test_tensors_are_those_of_transformers(name):
    config = (PLAIN | MIXERS)[name]
    model = from_hf(config, name, weights=False)
    theirs = their_shapes(reference(config), is_tied=model.tie_word_embeddings)
    left = _ours(model)
    for stored, shape in theirs.items():
        layer, parts = ours_of(stored, model)
        assert without_ones(joined_shape(model, layer, parts)) == without_ones(shape), stored
        assert left >= {(layer, part) for part in parts}, stored
        left -= {(layer, part) for part in parts}
    assert not left
    assert num_values(theirs) == num_params(model)


def test_tensors_of_lightning_attention_are_those_of_the_published_code():
    """By hand: transformers has no class of Ring-linear."""
    model = from_hf(MIXERS["ring-mini-linear-2.0"], weights=False)
    linear, full = (layer_shapes(model, model.kind_of_layer(layer)) for layer in (3, 4))
    heads = 16 * 128
    queries_keys_values = sum(linear[f"state.{part}"][0] for part in ("query", "key", "value"))
    assert queries_keys_values == 3 * heads  # query_key_value, without shared heads
    assert linear["state.gate"] == (heads, 2048)  # g_proj
    assert linear["state.state_norm"] == (heads,)  # g_norm
    assert linear["state.query_norm"] == linear["state.key_norm"] == (128,)
    assert linear["state.output"] == (2048, heads)  # dense
    assert len([part for part in linear if part.startswith("state.")]) == 8
    assert [full[part][0] for part in ("query", "key", "value")] == [heads, 4 * 128, 4 * 128]
    assert full["query_norm"] == full["key_norm"] == (128,)
    assert model.state_layers == tuple(layer for layer in range(20) if layer % 5 != 4)


def test_ling_2_5_has_latent_attention_beside_it():
    ring = MIXERS["ring-mini-linear-2.0"]
    latent = {"kv_lora_rank": 512, "q_lora_rank": 1536, "v_head_dim": 128}
    latent |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    changed = {"architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid"}
    model = from_hf(ring | latent | changed, "ling", weights=False)
    of_ring = from_hf(ring, "ring", weights=False)
    assert model.state == of_ring.state
    assert model.state_layers == of_ring.state_layers
    full = layer_shapes(model, model.kind_of_layer(4))
    assert full["kv_a"] == (576, 2048)
    assert full["query_a"] == (1536, 2048)
    assert not {"key", "value", "query_norm"} & set(full)
