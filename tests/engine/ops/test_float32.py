"""Our kernels for decoding in float32 against torch's, for each set."""

import numpy as np
import pytest
import torch

from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.engine.ops.packed import FewRowsLinear
from expertlane.engine.ops.products import Activation, Expert, PairGroups
from expertlane.engine.ops.torch_backend import TorchBackend

TORCH, CPU = TorchBackend(), torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours, expected):
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 16), (8, 5), (37, 100), (64, 256)])
def test_products_of_few_rows(kernels, n, k, has_bias):
    weight, bias = random(n, k), random(n, seed=1) if has_bias else None
    product = kernels.linear(weight, bias)
    assert isinstance(product, FewRowsLinear)
    for m in (0, 1, 2, 3, 4, 5, 32, 33):
        x = random(m, k + 3, seed=2)[:, :k]  # rows apart
        expected = x @ weight.t() + (0 if bias is None else bias)
        if m:
            assert_near(product(x), expected)
        else:
            assert product(x).shape == (0, n)
    other = product.with_tensors([2 * weight] if bias is None else [2 * weight, bias])
    assert_near(other(x), x @ (2 * weight).t() + (0 if bias is None else bias))


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 4], [32, 2, 5], [33, 1, 0]])
@pytest.mark.parametrize(("hidden", "inner"), [(16, 32), (20, 10)])
def test_experts_with_few_pairs(kernels, counts, is_gated, hidden, inner):
    def expert(ops, seed):
        up, down, gate = (random(*shape, seed=seed + i) / 4 for i, shape in enumerate(shapes))
        return Expert(ops.linear(up), ops.linear(down), ops.linear(gate) if is_gated else None)

    shapes = (inner, hidden), (hidden, inner), (inner, hidden)
    activation, num = Activation("silu" if is_gated else "gelu"), sum(counts)
    order = torch.from_numpy(np.random.default_rng(0).permutation(num))
    rows = order // 2
    pairs = PairGroups(torch.tensor(counts), rows, order, order)
    x = random(num // 2 + 1, hidden + 1)[:, :hidden]
    ours, theirs = (
        ops.experts([expert(ops, 10 * seed) for seed in range(3)], activation)
        for ops in (kernels, TORCH)
    )
    if not num:
        assert ours(x, pairs).shape == (0, hidden)
        return
    out = torch.full((num, hidden), torch.nan)
    assert ours(x, pairs, out) is out
    assert_near(out, theirs(x, pairs))


def test_norms_and_rotation(kernels):
    x, weight = random(5, 40)[:, :32], random(32, seed=1)
    assert_near(kernels.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    heads, head_weight = random(5, 3, 16), random(3, 16, seed=2)
    assert_near(
        kernels.rms_norm_heads_(heads.clone(), head_weight, 1e-5),
        TORCH.rms_norm_heads_(heads, head_weight, 1e-5),
    )
    angles = random(5, 4, seed=3)
    cos = torch.cat([angles.cos()] * 2, dim=1)[:, None].contiguous()
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)[:, None].contiguous()
    for interleave in (False, True):
        ours, theirs = (
            ops.rotate_(heads.clone(), cos, sin, interleave=interleave) for ops in (kernels, TORCH)
        )
        assert_near(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 64, 200])
def test_sums_of_parts_that_lie_apart(summing, dtype, width):
    """Parts as other ranks wrote them, some empty; their order is that of the sum."""
    num_rows = [2, 0, 3, 1]
    parts = [random(num, width, seed=i).to(dtype) for i, num in enumerate(num_rows)]
    whole = torch.cat(parts)
    apart = RowParts.of(parts[0])
    for part in parts[1:]:
        apart.pointers.append(part.data_ptr())
    apart = RowParts(apart.pointers, num_rows, width, dtype)
    assert torch.equal(apart.tensor(), whole)
    places, weights = torch.tensor([[0, 5], [-1, 3], [-1, -1], [4, 2]]), random(4, 2).abs()
    expected = torch.zeros(4, width)
    for token, place in enumerate(places.tolist()):
        for choice, row in enumerate(place):
            if row >= 0:
                expected[token] += weights[token, choice] * whole[row].float()
    found = summing.gather_sum(apart, places, weights)
    assert found.dtype is dtype
    assert torch.equal(found, summing.gather_sum(whole, places, weights))
    steps = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-22
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=steps * expected.abs().max())
    equal = RowParts.of(whole, 3)
    summed = summing.sum_parts(equal, 3)
    assert torch.equal(summed, sum(each.float() for each in whole.view(3, 2, width)).to(dtype))
    assert torch.equal(summed, TORCH.sum_parts(equal, 3))
