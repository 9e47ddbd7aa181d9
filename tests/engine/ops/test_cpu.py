"""Our CPU kernels against float32 arithmetic written out, for each set."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.engine.ops.packed import PackedLinear
from expertlane.engine.ops.products import Activation, Expert, PairGroups
from expertlane.engine.ops.torch_backend import TorchBackend

TORCH, CPU = TorchBackend(), torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """Kernels divide their work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


BF16_STEP = 2.0**-8  # of a value: half of it is the rounding of a result


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def assert_near(ours: torch.Tensor, expected: torch.Tensor, steps: float = 2.0) -> None:
    """Within `steps` roundings of the largest value."""
    assert ours.dtype is torch.bfloat16
    assert ours.shape == expected.shape
    if expected.numel():
        error = (ours.float() - expected.float()).abs().max()
        assert error <= steps * BF16_STEP * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_ours_do_not_cover_is_torch_s(kernels, dtype: torch.dtype):
    """float64, and widths that our kernels refuse."""
    width = 16 if dtype is torch.float64 else 5
    x, weight = random(3, width).to(dtype), random(7, width, seed=1).to(dtype)
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
def test_experts_that_ours_do_not_cover(
    kernels, inner: int, has_bias: bool, activation: Activation
):
    def linear(n: int, k: int, seed: int):
        return kernels.linear(random(n, k, seed=seed), random(n, seed=9) if has_bias else None)

    held = [
        Expert(linear(inner, 32, i), linear(32, inner, i), linear(inner, 32, 7)) for i in (1, 2)
    ]
    x, at = random(3, 32), torch.tensor([0, 1, 2])
    pairs = PairGroups(torch.tensor([2, 1]), at, at, at[:, None])
    ours = kernels.experts(held, activation)(x, pairs)
    for rows, expert in ((slice(0, 2), held[0]), (slice(2, 3), held[1])):
        expected = expert.down(activation(expert.gate(x[rows]), expert.up(x[rows])))
        assert_near(ours[rows], expected, steps=1)


def test_a_packed_matrix_by_hand():
    weight = torch.arange(17 * 4).view(17, 4).bfloat16()
    packed = PackedLinear.pack(weight)
    assert packed.shape == (2, 2, 16, 2)
    assert packed[0, 1, 3].tolist() == weight[3, 2:4].tolist()
    assert packed[1, 0, 0].tolist() == weight[16, :2].tolist()
    assert packed[1, :, 1:].abs().max() == 0
    assert packed[0, 0, :, 1].tolist() == weight[:16, 1].tolist()


@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8, 9, 16, 23])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (16, 8), (31, 6), (33, 64), (64, 130)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(kernels, m: int, n: int, k: int, has_bias: bool):
    x, weight = random(m, k), random(n, k, seed=1)
    bias = random(n, seed=2) if has_bias else None
    ours = kernels.linear(weight, bias)(x)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert_near(ours, expected)


def test_linear_takes_rows_that_are_apart(kernels):
    wide, weight = random(5, 24), random(9, 8, seed=1)
    x, linear = wide[:, 8:16], kernels.linear(weight)
    assert torch.equal(linear(x), linear(x.contiguous()))
    across = random(8, 5).t()  # columns that lie side by side
    assert_near(linear(across), across.float() @ weight.float().t())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=5),
    st.sampled_from([2, 16, 48, 50]),
    st.sampled_from([32, 64]),
    st.booleans(),
)
def test_experts(kernels, counts: list[int], hidden: int, inner: int, is_gated: bool):
    """Pairs take their rows from, and give their results to, any places."""
    generator = torch.Generator().manual_seed(sum(counts))
    rows = random(7, hidden + 6)[:, 6:]
    row_of_pair = torch.randint(7, (sum(counts),), generator=generator)
    result_of_pair = torch.randperm(sum(counts), generator=generator)

    def stack(n: int, k: int, seed: int) -> torch.Tensor:
        return random(len(counts), n, k, seed=seed, scale=1 / math.sqrt(k))

    gate, up, down = stack(inner, hidden, 1), stack(inner, hidden, 2), stack(hidden, inner, 3)
    gates, ups, downs = ([kernels.linear(w) for w in each] for each in (gate, up, down))
    held = [
        Expert(up=up, down=down, gate=gate if is_gated else None)
        for gate, up, down in zip(gates, ups, downs, strict=True)
    ]
    apply = kernels.experts(held, Activation("silu" if is_gated else "gelu"))
    pairs = PairGroups(torch.tensor(counts), row_of_pair, result_of_pair, torch.empty(0))
    ours = apply(rows, pairs)
    ends = torch.tensor(counts).cumsum(0).tolist()
    expected, start = [], 0
    for expert, end in enumerate(ends):
        x = rows[row_of_pair[start:end]].float()
        u = x @ up[expert].float().t()
        h = F.silu(x @ gate[expert].float().t()) * u if is_gated else F.gelu(u)
        expected.append(h.bfloat16().float() @ down[expert].float().t())
        start = end
    assert_near(ours[result_of_pair], torch.cat(expected), steps=3)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(4, 4), (10, 6), (64, 64)])
def test_rotate(kernels, interleave: bool, head_dim: int, dim: int):
    wide = random(3, 5, head_dim)
    angles = torch.randn(3, dim // 2, generator=torch.Generator().manual_seed(1))
    cos = torch.cat([angles.cos()] * 2, dim=1)[:, None].contiguous()
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)[:, None].contiguous()
    before = wide.clone()
    kernels.rotate_(wide[:, :4], cos, sin, interleave=interleave)
    assert torch.equal(wide[:, 4], before[:, 4])
    assert torch.equal(wide[..., : head_dim - dim], before[..., : head_dim - dim])
    turning = before[:, :4, head_dim - dim :].float()
    if interleave:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    expected = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    assert_near(wide[:, :4, head_dim - dim :].contiguous(), expected, steps=1)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_rms_norm(kernels, num_rows: int):
    wide = random(num_rows, 80)
    x, weight = wide[:, :48], torch.linspace(0.5, 2, 48)
    ours = kernels.rms_norm(x, weight, 1e-5)
    assert_near(ours, F.rms_norm(x.float(), (48,), weight, 1e-5), steps=1)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_rms_norm_of_heads_in_place(kernels, num_tokens: int):
    wide = random(num_tokens, 5, 32)
    before, weight = wide.clone(), torch.linspace(0.5, 2, 3 * 32).view(3, 32)
    kernels.rms_norm_heads_(wide[:, :3], weight, 1e-5)
    assert torch.equal(wide[:, 3:], before[:, 3:])
    expected = F.rms_norm(before[:, :3].float(), (32,), None, 1e-5) * weight
    assert_near(wide[:, :3].contiguous(), expected, steps=1)


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (5, 3), (40, 2)])
def test_weighted_sum(summing, num_tokens: int, top_k: int):
    rows = random(num_tokens * top_k, 32)
    places = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(1))
    places = places.view(num_tokens, top_k)
    weights = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(2))
    of_pair = rows[places].float()
    ours = summing.gather_sum(rows, places, weights)
    assert_near(ours, (of_pair * weights[..., None]).sum(1), steps=1)
    assert_near(summing.gather_sum(rows, places), of_pair.sum(1), steps=1)


@pytest.mark.parametrize(("num_rows", "size"), [(0, 4), (1, 5), (3, 16), (7, 33)])
def test_sum_of_parts(summing, num_rows: int, size: int):
    rows = random(3 * num_rows, size)
    ours = summing.sum_parts(RowParts.of(rows), 3)
    assert_near(ours, rows.view(3, num_rows, size).float().sum(0), steps=1)
