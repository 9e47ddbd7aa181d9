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
    outside_shapes,
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
GROUPED = json.loads(HERE.with_name("published_grouped.json").read_text())
PLAIN = json.loads(HERE.with_name("published.json").read_text())
ALL = PLAIN | MIXERS | GROUPED
_OTHERWISE = {  # compared elsewhere
    "gpt-oss-20b",  # transposed and interleaved: tests of checkpoints
    "step3",  # no class of transformers: `test_tensors_of_step_3`
}


def _ours(model: ModelConfig) -> set[tuple[int | None, str]]:
    names = {(None, name) for name in outside_shapes(model)}
    if model.tie_word_embeddings:
        names.remove((None, "head"))
    for layer in range(model.num_hidden_layers):
        kind = model.kind_of_layer(layer)
        names |= {(layer, part) for part in layer_shapes(model, kind)}
        if kind.mlp == "experts":
            names |= {(layer, f"experts.{part}") for part in expert_shapes(model)}
    return names


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
@pytest.mark.parametrize("name", [name for name in ALL if name not in _OTHERWISE])
def test_tensors_are_those_of_transformers(name):
    config = ALL[name]
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
