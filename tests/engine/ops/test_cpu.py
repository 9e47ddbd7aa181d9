"""Operations on a CPU against arithmetic written out: torch's, and our kernels for each set."""

import math
from array import array
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.engine.ops.cpu import VectorBackend
from expertlane.engine.ops.packed import FewRowsLinear, PackedLinear
from expertlane.engine.ops.products import Activation, Expert, PairGroups
from expertlane.engine.ops.torch_backend import TorchBackend

TORCH = TorchBackend()
BF16, F32 = torch.bfloat16, torch.float32
# Of a value: half a step of bfloat16 is the rounding of a result.
STEP = {BF16: 2.0**-8, F32: 2e-6}
both = pytest.mark.parametrize("dtype", STEP, ids=["bfloat16", "float32"])


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """Kernels divide their work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype, steps: float = 1.0) -> None:
    """Within `steps` roundings of the largest value in bfloat16, one in float32."""
    assert ours.dtype is dtype
    assert ours.shape == expected.shape
    if expected.numel():
        error = (ours.double() - expected.double()).abs().max()
        assert error <= (steps if dtype is BF16 else 1) * STEP[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_what_ours_do_not_cover_is_torch_s(kernels, dtype):
    """float64, and widths that our kernels refuse."""
    width = 16 if dtype is torch.float64 else 5
    x, weight = random(dtype, 3, width), random(dtype, 7, width, seed=1)
    assert type(kernels.linear(weight)) is type(TORCH.linear(weight))
    assert torch.equal(kernels.linear(weight)(x), TORCH.linear(weight)(x))
    scale = torch.linspace(1, 2, width)
    assert torch.equal(kernels.rms_norm(x, scale, 1e-5), TORCH.rms_norm(x, scale, 1e-5))
    heads = x[:, None]
    assert torch.equal(
        kernels.rms_norm_heads_(heads.clone(), scale[None], 1e-5),
        TORCH.rms_norm_heads_(heads, scale[None], 1e-5),
    )
    places = torch.tensor([[0, 2], [-1, 1]])
    assert torch.equal(kernels.gather_sum(x, places), TORCH.gather_sum(x, places))


@pytest.mark.parametrize(
    ("inner", "has_bias", "activation"),
    [
        (32, True, Activation("silu")),
        (16, False, Activation("silu")),
        (32, False, Activation("silu", swiglu_limit=1.0)),
        (32, False, Activation("gelu")),
    ],
)
def test_experts_that_ours_do_not_cover(kernels, inner, has_bias, activation):
    def linear(n: int, k: int, seed: int):
        bias = random(BF16, n, seed=9) if has_bias else None
        return kernels.linear(random(BF16, n, k, seed=seed), bias)

    held = [
        Expert(linear(inner, 32, i), linear(32, inner, i), linear(inner, 32, 7)) for i in (1, 2)
    ]
    x, at = random(BF16, 3, 32), torch.tensor([0, 1, 2])
    pairs = PairGroups(torch.tensor([2, 1]), at, at, at[:, None])
    ours = kernels.experts(held, activation)(x, pairs)
    for rows, expert in ((slice(0, 2), held[0]), (slice(2, 3), held[1])):
        expected = expert.down(activation(expert.gate(x[rows]), expert.up(x[rows])))
        assert_near(ours[rows], expected, BF16)


def test_a_packed_matrix_by_hand():
    weight = torch.arange(17 * 4).view(17, 4).bfloat16()
    packed = PackedLinear.pack(weight)
    assert packed.shape == (2, 2, 16, 2)
    assert packed[0, 1, 3].tolist() == weight[3, 2:4].tolist()
    assert packed[1, 0, 0].tolist() == weight[16, :2].tolist()
    assert packed[1, :, 1:].abs().max() == 0
    assert packed[0, 0, :, 1].tolist() == weight[:16, 1].tolist()


@both
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 2), (3, 16), (16, 8), (31, 6), (33, 64), (37, 100), (64, 130), (64, 256)]
)
def test_linear(ops, dtype, n, k, has_bias):
    weight = random(dtype, n, k, seed=1)
    bias = random(dtype, n, seed=2) if has_bias else None
    linear = ops.linear(weight, bias)
    if isinstance(ops, VectorBackend):
        assert isinstance(linear, PackedLinear if dtype is BF16 else FewRowsLinear)
    for m in (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 32, 33):
        x = random(dtype, m, k + 4)[:, :k]  # rows apart
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_near(linear(x), expected, dtype, steps=2)
    other = linear.with_tensors([2 * each for each in linear.tensors()])
    assert_near(other(x), 2 * expected, dtype, steps=2)


@both
def test_linear_takes_rows_in_any_order_of_strides(ops, dtype):
    wide, weight = random(dtype, 5, 24), random(dtype, 9, 8, seed=1)
    x, linear = wide[:, 8:16], ops.linear(weight)
    assert torch.equal(linear(x), linear(x.contiguous()))
    across = random(dtype, 8, 5).t()  # columns that lie side by side
    assert_near(linear(across), across.double() @ weight.double().t(), dtype, steps=2)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([*STEP]),
    counts=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    hidden=st.sampled_from([2, 16, 48, 50]),
    inner=st.sampled_from([10, 32, 64]),
    is_gated=st.booleans(),
)
@example(dtype=F32, counts=[0, 0, 0], hidden=16, inner=32, is_gated=True)
@example(dtype=F32, counts=[32, 2, 5], hidden=20, inner=10, is_gated=True)
@example(dtype=F32, counts=[33, 1, 0], hidden=16, inner=32, is_gated=False)
def test_experts(ops, dtype, counts, hidden, inner, is_gated):
    """Pairs take their rows from, and give their results to, any places."""
    num = sum(counts)
    generator = torch.Generator().manual_seed(num)
    rows = random(dtype, 7, hidden + 6)[:, 6:]
    row_of_pair = torch.randint(7, (num,), generator=generator)
    result_of_pair = torch.randperm(num, generator=generator)

    def stack(n: int, k: int, seed: int) -> Tensor:
        return random(dtype, len(counts), n, k, seed=seed, scale=1 / math.sqrt(k))

    gate, up, down = stack(inner, hidden, 1), stack(inner, hidden, 2), stack(hidden, inner, 3)
    gates, ups, downs = ([ops.linear(w) for w in each] for each in (gate, up, down))
    held = [
        Expert(up=up, down=down, gate=gate if is_gated else None)
        for gate, up, down in zip(gates, ups, downs, strict=True)
    ]
    apply = ops.experts(held, Activation("silu" if is_gated else "gelu"))
    pairs = PairGroups(torch.tensor(counts), row_of_pair, result_of_pair, torch.empty(0))
    out = torch.full((num, hidden), torch.nan, dtype=dtype)
    assert apply(rows, pairs, out) is out
    expected = [torch.zeros(0, hidden)]
    for expert, (start, end) in enumerate(pairwise(accumulate(counts, initial=0))):
        x = rows[row_of_pair[start:end]].float()
        u = x @ up[expert].float().t()
        h = F.silu(x @ gate[expert].float().t()) * u if is_gated else F.gelu(u)
        expected.append(h.to(dtype).float() @ down[expert].float().t())
    assert_near(out[result_of_pair], torch.cat(expected), dtype, steps=3)


@both
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(4, 4), (10, 6), (16, 8), (64, 64)])
def test_rotate(ops, dtype, interleave, head_dim, dim):
    wide = random(dtype, 3, 5, head_dim)
    angles = random(F32, 3, dim // 2, seed=1)
    cos = torch.cat([angles.cos()] * 2, dim=1)[:, None].contiguous()
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)[:, None].contiguous()
    before = wide.clone()
    found = ops.rotate_(wide[:, :4], cos, sin, interleave=interleave)
    assert torch.equal(wide[:, 4], before[:, 4])
    assert torch.equal(found[..., : head_dim - dim], before[:, :4, : head_dim - dim])
    turning = before[:, :4, head_dim - dim :].float()
    if interleave:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    expected = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    assert_near(found[..., head_dim - dim :], expected, dtype)


@both
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_rms_norms(ops, dtype, num_rows):
    x, weight = random(dtype, num_rows, 80)[:, :48], torch.linspace(0.5, 2, 48)
    ours = ops.rms_norm(x, weight, 1e-5)
    assert_near(ours, F.rms_norm(x.float(), (48,), weight, 1e-5), dtype)
    wide = random(dtype, num_rows, 5, 32)  # of heads, in place
    before, weight = wide.clone(), torch.linspace(0.5, 2, 3 * 32).view(3, 32)
    found = ops.rms_norm_heads_(wide[:, :3], weight, 1e-5)
    assert torch.equal(wide[:, 3:], before[:, 3:])
    expected = F.rms_norm(before[:, :3].float(), (32,), None, 1e-5) * weight
    assert_near(found, expected, dtype)


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (5, 3), (40, 2)])
def test_weighted_sum(summing, num_tokens, top_k):
    rows = random(BF16, num_tokens * top_k, 32)
    places = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(1))
    places = places.view(num_tokens, top_k)
    weights = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(2))
    of_pair = rows[places].float()
    ours = summing.gather_sum(rows, places, weights)
    assert_near(ours, (of_pair * weights[..., None]).sum(1), BF16)
    assert_near(summing.gather_sum(rows, places), of_pair.sum(1), BF16)


@pytest.mark.parametrize(("num_rows", "size"), [(0, 4), (1, 5), (3, 16), (7, 33)])
def test_sum_of_parts(summing, num_rows, size):
    rows = random(BF16, 3 * num_rows, size)
    ours = summing.sum_parts(RowParts.of(rows), 3)
    assert_near(ours, rows.view(3, num_rows, size).float().sum(0), BF16)


@both
@pytest.mark.parametrize("width", [1, 63, 64, 200])
def test_sums_of_parts_that_lie_apart(summing, dtype, width):
    """Parts as other ranks wrote them, some empty; their order is that of the sum."""
    num_rows = [2, 0, 3, 1]
    parts = [random(dtype, num, width, seed=i) for i, num in enumerate(num_rows)]
    whole = torch.cat(parts)
    pointers = array("q", [part.data_ptr() for part in parts])
    apart = RowParts(pointers, num_rows, width, dtype)
    assert torch.equal(apart.tensor(), whole)
    places, weights = torch.tensor([[0, 5], [-1, 3], [-1, -1], [4, 2]]), random(F32, 4, 2).abs()
    chosen = whole[places.clamp(min=0)].float() * (places >= 0)[..., None]
    expected = (weights[..., None] * chosen).sum(1)
    found = summing.gather_sum(apart, places, weights)
    assert torch.equal(found, summing.gather_sum(whole, places, weights))
    assert_near(found, expected, dtype)
    equal = RowParts.of(whole, 3)
    summed = summing.sum_parts(equal, 3)
    assert torch.equal(summed, sum(each.float() for each in whole.view(3, 2, width)).to(dtype))
    assert torch.equal(summed, TORCH.sum_parts(equal, 3))
