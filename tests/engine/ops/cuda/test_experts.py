"""Grouped products of the Triton kernels, alone and as experts, against torch's operations.

Without a GPU they run in Triton's interpreter.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import (
    DEVICE,
    PRODUCT_DTYPES,
    assert_near,
    drawn,
    needs_kernels,
    random,
)
from expertlane.engine.ops.cuda import grouped
from expertlane.engine.ops.cuda.backend import CudaBackend
from expertlane.engine.ops.cuda.matrices import Matrices
from expertlane.engine.ops.cuda.parts import CudaExperts
from expertlane.engine.ops.products import Activation, Expert, Linear, LoopedExperts
from expertlane.engine.ops.torch_backend import TorchBackend

pytestmark = needs_kernels

OPS = TorchBackend()


def make_experts(num, hidden, inner, dtype, *, is_gated, has_bias):
    def linear(n: int, k: int, seed: int) -> Linear:
        weight = random(torch.float32, n, k, seed=seed) / math.sqrt(k)
        bias = random(dtype, n, seed=seed) if has_bias else None
        return Linear(weight.to(dtype), bias)

    return [
        Expert(
            up=linear(inner, hidden, 3 * each),
            down=linear(hidden, inner, 3 * each + 1),
            gate=linear(inner, hidden, 3 * each + 2) if is_gated else None,
        )
        for each in range(num)
    ]


@pytest.mark.full
@settings(drawn, max_examples=12)
@given(
    ids=st.lists(st.integers(-1, 4), max_size=40),
    sizes=st.sampled_from([(32, 16), (48, 40), (130, 8)]),
    kind=st.sampled_from(
        [
            (True, False, Activation("silu")),
            (False, False, Activation("gelu")),
            (True, True, Activation("silu", swiglu_limit=1.0)),
        ]
    ),
    dtype=PRODUCT_DTYPES,
)
def test_experts(ids, sizes, kind, dtype):
    (hidden, inner), (is_gated, has_bias, activation) = sizes, kind
    held = make_experts(5, hidden, inner, dtype, is_gated=is_gated, has_bias=has_bias)
    exact = LoopedExperts(
        [each.with_tensors([x.float() for x in each.tensors()]) for each in held], activation
    )
    given_ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE).view(-1, 1)
    pairs = OPS.group_pairs(given_ids, 0, 1, 5)
    rows = random(dtype, len(ids), hidden + 2)[:, 2:]
    expected = exact(rows.float(), pairs).to(dtype)
    before = [tensor.clone() for each in held for tensor in each.tensors()]
    ours = CudaExperts(held, activation, None)
    assert_near(ours(rows, pairs), expected, steps=6)
    out = torch.empty_like(expected)
    assert ours(rows, pairs, out) is out
    after = [tensor for each in ours.held for tensor in each.tensors()]
    assert all(map(torch.equal, before, after))
    by_torch = CudaBackend().experts(held, activation)
    assert_near(by_torch(rows, pairs), expected, steps=6)
    # With room for more, the rows of which poison nothing.
    rows[(given_ids < 0)[:, 0]] = torch.nan
    padded = OPS.group_pairs(given_ids, 0, 1, 5, len(ids))
    there = padded.numbers >= 0
    for experts in (ours, by_torch):
        results = experts(rows, padded)
        assert results.shape == rows.shape
        assert_near(results[padded.numbers[there]], expected[pairs.numbers[there]], steps=6)


def test_experts_of_two_kinds_do_not_suit():
    plain = make_experts(2, 32, 16, torch.float32, is_gated=True, has_bias=False)
    biased = make_experts(1, 32, 16, torch.float32, is_gated=True, has_bias=True)
    assert CudaExperts.suits(plain)
    assert CudaExperts.suits(biased)
    assert not CudaExperts.suits([*plain, *biased])


@pytest.mark.smoke(1)
@pytest.mark.parametrize("counts", [[700, 5], [0, 641], [64, 300], [1, 0]])
def test_the_order_of_programs_of_many_rows_leaves_out_no_tile(counts, monkeypatch):
    """More tiles of rows than the eight that go together, the last ones fewer; two of columns."""
    tile = grouped.Tile(64, 32, 32, 4, 2)
    monkeypatch.setattr(grouped.Tile, "of", classmethod(lambda *_: tile))
    monkeypatch.setattr(grouped, "_num_splits", lambda *_: 1)
    x, weight = random(torch.float16, sum(counts), 16), random(torch.float16, 2, 40, 16, seed=1)
    matrices, of_each = Matrices(weight, None, None), torch.tensor(counts, device=DEVICE)
    found = grouped.grouped_product(x, matrices, of_each, sum(counts))
    parts = zip(x.float().split(counts), weight.float(), strict=True)
    assert_near(found, torch.cat([part @ each.T for part, each in parts]).half(), 4)


@pytest.mark.full
def test_one_matrix_of_many_rows_has_wide_tiles():
    x, weight = random(torch.float16, 257, 64), random(torch.float16, 1, 264, 64, seed=1)
    matrices = Matrices(weight, None, None)
    assert grouped.Tile.of(257, matrices, 2)[:2] == (128, 256)
    found = grouped.grouped_product(x, matrices, None, 257)
    assert_near(found, (x.float() @ weight[0].float().T).half(), 4)
