"""Planted errors: that each is there, and how large beside bfloat16's noise."""

import pytest

from endpoint.planted import KINDS, effect, plant
from endpoint.test_reference import drawn
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import language_model_of, read_config

CASES = [(kind, family) for kind, (families, _) in KINDS.items() for family in families]
# Errors that may drown in rounding: the answer is then that nothing can be told. Two experts of
# OLMoE, whose weights aren't normalised, are a small part of a layer's output.
_SMALL = ("expert scaled by 1.1", "norm's epsilon wrong")
_SMALL_THERE = ("experts swapped", "olmoe")


@pytest.mark.smoke(12)
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_planted_errors_are_there(tmp_path, kind: str, family: str) -> None:
    pair = plant(kind, family, tmp_path, seed=3)
    found = effect(pair.original, pair.changed, drawn([24] * 8, seed=5), "bfloat16")
    print(f"{kind}, {family}: {found.change:.4f}, noise {found.noise:.4f}")
    assert found.change > 1e-5
    if kind not in _SMALL and (kind, family) != _SMALL_THERE:
        assert found.change > found.noise
    # Our server can load both.
    for folder in (pair.original, pair.changed):
        from_hf(language_model_of(read_config(folder)), "planted")


def test_swapped_experts_are_named(tmp_path) -> None:
    pair = plant("experts swapped", "mixtral", tmp_path)
    assert len(pair.planted.layers) == 1
    assert len(set(pair.planted.experts)) == 2
