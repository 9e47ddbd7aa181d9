"""Rounding of keys and values to float8, by definition: the nearest of all values there are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.engine.ops.float8 import FLOAT8, from_float8, to_float8
from expertlane.engine.ops.kv_cache import KVCache

CPU = torch.device("cpu")
MAGNITUDES = [  # of e4m3, by its definition
    *(mantissa * 2.0**-9 for mantissa in range(8)),
    *((8 + mantissa) * 2.0 ** (exponent - 3) for exponent in range(-6, 8) for mantissa in range(8)),
    *((8 + mantissa) * 2.0**5 for mantissa in range(7)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_values_of_e4m3():
    assert len(MAGNITUDES) == 127
    codes = torch.arange(127, dtype=torch.uint8).view(FLOAT8)
    assert codes.double().tolist() == MAGNITUDES


def rounded(row: list[float]) -> tuple[list[float], float]:
    """The nearest values, ties to an even mantissa; and the scale."""
    most = max(map(abs, row))
    scale = 2.0**-126
    while most > 448 * scale:
        scale *= 2
    found = []
    for value in row:
        magnitude = abs(value) / scale
        code = min(range(127), key=lambda code: (abs(MAGNITUDES[code] - magnitude), code % 2))
        found.append(float(np.copysign(MAGNITUDES[code] * scale, value)))
    return found, scale


@settings(derandomize=True, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), max_size=3),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_rounding(rows, exponent, dtype):
    exact = (torch.tensor(rows).view(-1, 4) * 2.0**exponent).to(dtype)
    values, scales = to_float8(exact)
    assert (values.shape, scales.shape) == (exact.shape, (len(rows), 1))
    found = from_float8(values, scales, dtype)
    assert found.dtype is dtype
    for row, of_row, biased in zip(exact.tolist(), found.tolist(), scales.tolist(), strict=True):
        expected, scale = rounded(row)
        assert of_row == expected
        assert 2.0 ** (biased[0] - 127) == scale
        for before, after in zip(row, of_row, strict=True):
            assert abs(after - before) <= max(2.0**-4 * abs(before), 2.0**-10 * scale)


@pytest.mark.parametrize("largest", [448.0, 448.0000305, 447.99997, 224.0, 1e-30, 0.0, 3e38])
def test_the_scale_of_a_row(largest):
    found, scale = rounded([largest, largest / 3])
    values, scales = to_float8(torch.tensor([[largest, largest / 3]]))
    assert 2.0 ** (scales.item() - 127) == scale
    assert from_float8(values, scales, torch.float32).tolist() == [found]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_so(odd, dtype):
    """So that checks for silent errors still find it."""
    values, scales = to_float8(torch.tensor([[1.0, odd, 0.0]], dtype=dtype))
    assert scales.item() == 255
    assert not from_float8(values, scales, dtype).isfinite().any()


@pytest.mark.parametrize("dims", [(8, 8), (8, 4), (12, 0)])
def test_a_cache_of_one_byte(dims):
    """What is written is read back rounded, and a scale of a byte for each row is all it adds."""
    key_dim, value_dim = dims
    cache = KVCache(3, 4, 2, key_dim, value_dim, torch.float32, CPU, is_float8=True)
    num_rows = 2 if value_dim else 1
    assert cache.position_bytes == 2 * (key_dim + value_dim + num_rows)
    assert cache.num_bytes == 3 * 4 * cache.position_bytes
    slots = torch.tensor([9, 0, 5])
    keys, values = torch.randn(3, 2, key_dim), torch.randn(3, 2, value_dim)
    of_keys, of_values = cache.write(slots, keys, values)
    assert torch.equal(of_keys, from_float8(*to_float8(keys), torch.float32))
    assert of_values.shape == values.shape
    assert torch.equal(cache.keys_at(slots), of_keys)
    read_keys, read_values = cache.read(torch.tensor([[2, 0, 1]]), 12)
    assert torch.equal(read_keys[0, :, [1, 4, 9]].transpose(0, 1), of_keys)
    assert torch.equal(read_values[0, :, [1, 4, 9]].transpose(0, 1), of_values)
    cache.clear(torch.tensor([2]))
    assert not cache.keys_at(slots)[0].any()
    assert torch.equal(cache.keys_at(slots)[1:], of_keys[1:])
    assert [len(each) for each in cache.write(slots[:0], keys[:0], values[:0])] == [0, 0]
