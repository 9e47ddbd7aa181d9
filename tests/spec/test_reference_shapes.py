"""Layers of published models have as many values as those of transformers' classes."""

from collections import Counter
from math import prod

import pytest

from expertlane.spec.from_hf import from_hf
from expertlane.spec.tensors import expert_shapes, layer_shapes, outside_shapes
from spec.reference import num_by_layer, reference
from spec.test_published import ALL, GROUPED, MIXERS

# transformers has no class of these: compared by hand, below.
_BY_HAND = {"step3", "ring-mini-linear-2.0"}


def test_tensors_of_step_3():
    """As vLLM's `step3_text` and the code published with the checkpoint have them."""
    model = from_hf(GROUPED["step3"], "step3", weights=False)
    dense, sparse = (layer_shapes(model, model.kind_of_layer(layer)) for layer in (3, 4))
    attention = {
        "attention_norm": (7168,),
        "query_a": (2048, 7168),  # q_proj
        "query_a_norm": (2048,),  # inter_norm
        "query_b": (64 * 256, 2048),  # wq
        "key": (256, 7168),
        "value": (256, 7168),
        "output": (7168, 64 * 256),
        "moe_norm": (7168,),
    }
    dense_mlp = {"dense.gate": (18432, 7168), "dense.up": (18432, 7168)}
    assert dense == attention | dense_mlp | {"dense.down": (7168, 18432)}
    shared = {"shared.gate": (5120, 7168), "shared.up": (5120, 7168), "shared.down": (7168, 5120)}
    assert sparse == attention | {"router": (48, 7168)} | shared
    assert expert_shapes(model)["down"] == (7168, 5120)
    assert [at for at in range(61) if model.is_dense(at)] == [0, 1, 2, 3, 60]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ALL if name not in _BY_HAND])
def test_layers_are_those_of_transformers(name):
    model = from_hf(ALL[name], name, weights=False)
    of_each = 2 if model.shortcut_experts else 1  # of our layers, one of theirs
    found = Counter({None: sum(map(prod, outside_shapes(model).values()))})
    if model.tie_word_embeddings:
        found[None] -= model.vocab_size * model.hidden_size
    of_experts = model.num_experts * sum(map(prod, expert_shapes(model).values()))
    for layer in range(model.num_hidden_layers):
        kind = model.kind_of_layer(layer)
        found[layer // of_each] += sum(map(prod, layer_shapes(model, kind).values()))
        found[layer // of_each] += of_experts if kind.mlp == "experts" else 0
    assert found == num_by_layer(reference(ALL[name]), is_tied=model.tie_word_embeddings)


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
