"""Kernels of rows (norms, rotation, cache writes, activations) against torch's operations.

Without a GPU they run in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, DTYPES, assert_near, drawn, needs_kernels, random
from expertlane.engine.ops.cuda.activation import activate
from expertlane.engine.ops.cuda.norm import add_rms_norm, rms_norm
from expertlane.engine.ops.cuda.rotate import rotate, rotate_and_write, write
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.products import Activation
from expertlane.engine.ops.torch_backend import TorchBackend

pytestmark = needs_kernels

OPS = TorchBackend()
NUM_TOKENS = st.sampled_from([0, 1, 2, 5])


@settings(drawn, max_examples=8)
@given(num_rows=NUM_TOKENS, size=st.integers(1, 200), dtype=DTYPES, has_added=st.booleans())
def test_norms(num_rows, size, dtype, has_added):
    x, added = random(dtype, num_rows, size + 3)[:, 3:], random(dtype, num_rows, size)
    weight = torch.linspace(0.5, 2, size, device=DEVICE)
    if not has_added:
        assert_near(rms_norm(x, weight, 1e-5), OPS.rms_norm(x, weight, 1e-5))
        return
    total, normed = add_rms_norm(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    assert_near(normed, OPS.rms_norm(x + added, weight, 1e-5))


@settings(drawn, max_examples=12)
@given(
    num_rows=NUM_TOKENS,
    inner=st.sampled_from([1, 24, 64, 1100]),
    dtype=DTYPES,
    is_gated=st.booleans(),
    activation=st.sampled_from(
        [Activation("silu"), Activation("gelu"), Activation("silu", swiglu_limit=0.7)]
    ),
)
def test_activations(num_rows, inner, dtype, is_gated, activation):
    is_gated = is_gated or activation.swiglu_limit is not None
    gate, up = 2 * random(torch.float32, 2, num_rows, inner).to(dtype)
    x = torch.cat([gate, up], dim=1) if is_gated else up
    expected = activation(gate.float() if is_gated else None, up.float())
    assert_near(activate(x, activation, is_gated=is_gated), expected.to(dtype))


class Turned:
    """Queries, keys and values side by side; angles, norms and slots."""

    def __init__(self, num_tokens, heads, dim, rotary_dim, dtype):
        num_heads, num_kv_heads = heads
        self.x = random(dtype, num_tokens, num_heads + 2 * num_kv_heads, dim)
        angles = torch.linspace(-3, 3, 40 * rotary_dim // 2, device=DEVICE).view(40, -1)
        self.cos = angles.cos().repeat(1, 2)[:, None]
        self.sin = torch.cat([-angles.sin(), angles.sin()], 1)[:, None]
        generator = torch.Generator().manual_seed(2)
        self.positions = torch.randint(0, 40, (num_tokens,), generator=generator).to(DEVICE)
        self.slots = torch.randperm(24, generator=generator)[:num_tokens].to(DEVICE)
        self.norms = 1 + 0.2 * random(torch.float32, num_heads + num_kv_heads, dim)

    @property
    def angles(self):
        return self.cos[self.positions], self.sin[self.positions]


def caches(heads, key_dim, value_dim, dtype, *, is_float8=False):
    sizes = 6, 4, heads, key_dim, value_dim, dtype, DEVICE
    return [KVCache(*sizes, is_float8=is_float8) for _ in range(2)]


@pytest.mark.full
@settings(drawn, max_examples=12)
@given(
    num_tokens=NUM_TOKENS,
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1), (3, 3)]),
    dim=st.sampled_from([(8, 8), (24, 8), (16, 6), (80, 80)]),
    dtype=DTYPES,
    interleave=st.booleans(),
    has_norms=st.booleans(),
    is_float8=st.booleans(),
)
def test_rotation_and_write(num_tokens, heads, dim, dtype, interleave, has_norms, is_float8):
    (num_heads, num_kv_heads), (head_dim, rotary_dim) = heads, dim
    given = Turned(num_tokens, heads, head_dim, rotary_dim, dtype)
    query_key, value = given.x.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if has_norms:
        query_key = OPS.rms_norm_heads_(query_key.clone(), given.norms, 1e-5)
    expected = OPS.rotate_(query_key.clone(), *given.angles, interleave=interleave)
    ours, theirs = caches(num_kv_heads, head_dim, head_dim, dtype)
    theirs.write(given.slots, expected[:, num_heads:], value)
    arguments = (
        *(given.x, num_heads, (given.positions, given.cos, given.sin)),
        *(given.norms if has_norms else None, 1e-5, given.slots),
    )
    query = rotate_and_write(*arguments, ours, interleave=interleave)
    assert_near(query, expected[:, :num_heads], steps=4)
    assert_near(ours.keys, theirs.keys, steps=4)
    assert torch.equal(ours.values, theirs.values)
    if is_float8:  # what was written, rounded
        _, narrow = caches(num_kv_heads, head_dim, head_dim, dtype, is_float8=True)
        expected, _ = caches(num_kv_heads, head_dim, head_dim, dtype, is_float8=True)
        expected.write(given.slots, ours.keys_at(given.slots), value)
        assert torch.equal(rotate_and_write(*arguments, narrow, interleave=interleave), query)
        for mine, other in zip(narrow.parts, expected.parts, strict=True):
            assert torch.equal(mine, other)
    turned = rotate(given.x, *given.angles, interleave=interleave)
    assert_near(turned, OPS.rotate_(given.x.clone(), *given.angles, interleave=interleave))


@settings(drawn, max_examples=8)
@given(
    num_tokens=NUM_TOKENS,
    heads=st.integers(1, 3),
    dims=st.sampled_from([(8, 8), (36, 0), (48, 32)]),
    dtype=DTYPES,
    is_float8=st.booleans(),
)
def test_write(num_tokens, heads, dims, dtype, is_float8):
    key_dim, value_dim = dims
    ours, theirs = caches(heads, key_dim, value_dim, dtype, is_float8=is_float8)
    wide = random(dtype, num_tokens, heads + 1, key_dim + value_dim)[:, 1:]
    key, value = wide.split([key_dim, value_dim], dim=2)
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:num_tokens].to(DEVICE)
    write(ours, slots, key, value)
    theirs.write(slots, key, value)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    if is_float8:
        assert torch.equal(ours.key_scales, theirs.key_scales)
        assert torch.equal(ours.value_scales, theirs.value_scales)
