"""Number types: bytes of weights with their scales, and what checkpoints have in them."""

import numpy as np
import pytest

from cli.screen import telling
from expertlane.cost.step.operation import NumberTypes, weight_bytes
from expertlane.errors import SpecError

_PARTS = ("attention", "mlp", "experts")


@pytest.mark.parametrize(
    ("number_type", "num_bytes"),
    [
        ("bfloat16", 2 * 128 * 128),
        ("float8", 128 * 128 + 4),  # a float32 for all of them
        ("nvfp4", 128 * 128 // 2 + 128 * 128 // 16),
        ("mxfp4", 128 * 128 // 2 + 128 * 128 // 32),
        ("int4", 128 * 128 // 2 + 2 * 128 * 128 // 32),
    ],
)
def test_scales_are_counted(number_type, num_bytes):
    assert weight_bytes(128 * 128, number_type) == num_bytes
    rows = np.array([0, 1, 128 * 128, 128 * 128 + 1])
    counted = weight_bytes(rows, number_type)
    assert counted.dtype == np.int64
    assert counted[0] == 0
    assert counted[2] == num_bytes
    assert (np.diff(counted) > 0).all()


@pytest.mark.parametrize(
    ("weights", "narrow"),
    [
        ("float8", ("attention", "mlp", "experts")),
        ("nvfp4", ("mlp", "experts")),
        ("mxfp4", ("experts",)),
        ("int4", ("experts",)),
    ],
)
def test_what_is_not_quantised_stays_as_wide_as_activations(weights, narrow):
    types = NumberTypes.asked(weights)
    assert (types.activations, types.kept, types.kv) == ("bfloat16", "bfloat16", "bfloat16")
    assert {part for part in _PARTS if types.of_part(part) == weights} == set(narrow)
    assert {types.of_part(part) for part in _PARTS} <= {weights, "bfloat16"}


def test_one_type_for_everything():
    types = NumberTypes.asked("float16")
    assert {types.of_part(part) for part in _PARTS} == {"float16"} == {types.kept}


def test_types_of_weights_alone_are_no_types_of_a_cache():
    with pytest.raises(SpecError, match=telling("kv nvfp4 float32 float16 bfloat16")):
        NumberTypes("nvfp4", "bfloat16", "nvfp4")
    with pytest.raises(SpecError, match=telling("weights int2 nvfp4 mxfp4 int4")):
        NumberTypes("int2")
