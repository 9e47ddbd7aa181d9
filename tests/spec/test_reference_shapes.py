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
@pytest.mark.parametrize("name", [name for name in PLAIN | MIXERS if name not in _OWN_LAYOUT])
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
