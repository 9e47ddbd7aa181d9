"""Products with weights of one byte and of four bits, kept so, against widened ones.

Without a GPU the Triton kernels run in the interpreter.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, PRODUCT_DTYPES, assert_near, drawn, needs_kernels, random
from expertlane.engine.ops.cuda import grouped as module
from expertlane.engine.ops.cuda.parts import CudaExperts, CudaMlp, CudaNarrowLinear
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.engine.ops.products import Activation, Expert, Linear, LoopedExperts
from expertlane.engine.ops.step import MlpWeights
from expertlane.engine.ops.torch_backend import TorchBackend

pytestmark = needs_kernels

OPS = TorchBackend()
KINDS = st.sampled_from(["int8", "float8", "mxfp4"])


def narrow(kind, num_rows, num_columns, dtype, seed=0, *, group=32, first=0):
    """A weight of a kind, of values near those of layers."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "mxfp4":
        blocks = torch.randint(256, (num_rows, num_columns // 2), generator=generator)
        exponents = torch.randint(118, 124, (num_rows, num_columns // 32), generator=generator)
        return Mxfp4Weight(blocks.byte(), exponents.byte(), dtype).to(DEVICE)
    values = torch.randn(num_rows, num_columns, generator=generator)
    if kind == "int8":
        values = (values * 40).clamp(-127, 127).to(torch.int8)
    else:
        values = (values * 40).to(torch.float8_e4m3fn)
    num_groups = -(-(first + num_columns) // group)
    scales = torch.rand(num_rows, num_groups, generator=generator) / (40 * math.sqrt(num_columns))
    return NarrowWeight(values, scales, group, first, dtype).to(DEVICE)


def exact(weight, bias=None):
    """The same product in float32."""
    return Linear(weight.widened(torch.float32), None if bias is None else bias.float())


@pytest.mark.full
@settings(drawn, max_examples=16)
@given(
    kind=KINDS,
    num_rows=st.sampled_from([0, 1, 5, 40, 70]),
    sizes=st.sampled_from([(8, 32), (40, 96), (130, 160)]),
    place=st.sampled_from([(32, 0), (64, 0), (64, 24), (96, 95), (4096, 0)]),
    has_bias=st.booleans(),
    dtype=PRODUCT_DTYPES,
    num_splits=st.sampled_from([1, 3]),
)
def test_products(kind, num_rows, sizes, place, has_bias, dtype, num_splits):
    """With one group, with several, and with a first one that began earlier."""
    (n, k), (group, first) = sizes, place
    weight = narrow(kind, n, k, dtype, group=group, first=first)
    bias = random(dtype, n) if has_bias else None
    assert CudaNarrowLinear.suits(weight)
    ours, x = CudaNarrowLinear(weight, bias), random(dtype, num_rows, k + 2)[:, 2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_num_splits", lambda *_: num_splits)
        found = ours(x)
    assert_near(found, exact(weight, bias)(x.float()).to(dtype), steps=4)
    again = ours.with_tensors(ours.tensors())
    assert torch.equal(again(x), ours(x))


@pytest.mark.smoke(1)
@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4"])
@pytest.mark.parametrize("num_rows", [64, 130], ids=["tiles of 64", "tiles of 128"])
def test_products_of_many_rows(kind, num_rows):
    weight = narrow(kind, 136, 256, torch.float16, group=128)
    x = random(torch.float16, num_rows, 256)
    assert_near(CudaNarrowLinear(weight, None)(x), exact(weight)(x.float()).half(), steps=4)


@pytest.mark.parametrize("exponent", [0, 1, 127, 252])
def test_every_value_of_four_bits(exponent):
    """All sixteen, times powers of two from the smallest to one of the largest, are exact."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    scales = torch.full((1, 1), exponent, dtype=torch.uint8)
    weight = Mxfp4Weight(codes | codes << 4, scales, torch.float32).to(DEVICE)
    found = CudaNarrowLinear(weight, None)(torch.eye(32, device=DEVICE))
    assert torch.equal(found[:, 0], weight.widened()[0])


def make_experts(kind, num, hidden, inner, dtype, *, has_bias, first):
    def linear(n, k, seed, begin=0):
        bias = random(dtype, n, seed=seed) if has_bias else None
        weight = narrow(kind, n, k, dtype, seed, group=64, first=begin)
        return CudaNarrowLinear(weight, bias), exact(weight, bias)

    both = [
        (
            linear(inner, hidden, 3 * each),
            linear(hidden, inner, 3 * each + 1, first),
            linear(inner, hidden, 3 * each + 2),
        )
        for each in range(num)
    ]
    return [
        [Expert(up=up[which], down=down[which], gate=gate[which]) for up, down, gate in both]
        for which in range(2)
    ]


@pytest.mark.full
@settings(drawn, max_examples=9)
@given(
    kind=KINDS,
    ids=st.lists(st.integers(-1, 4), max_size=40),
    sizes=st.sampled_from([(32, 32), (96, 160)]),
    first=st.sampled_from([0, 40]),
    has_bias=st.booleans(),
    dtype=PRODUCT_DTYPES,
    num_splits=st.sampled_from([1, 2]),
)
def test_experts(kind, ids, sizes, first, has_bias, dtype, num_splits):
    """Side by side, gathered and scattered; some without tokens, and room for more pairs."""
    activation = Activation("silu", swiglu_limit=1.0 if has_bias else None)
    held, wide = make_experts(kind, 5, *sizes, dtype, has_bias=has_bias, first=first)
    assert CudaExperts.suits(held)
    given_ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE).view(-1, 1)
    pairs = OPS.group_pairs(given_ids, 0, 1, 5, len(ids))
    there = pairs.numbers[pairs.numbers >= 0]
    rows = random(dtype, len(ids), sizes[0] + 2)[:, 2:]
    expected = LoopedExperts(wide, activation)(rows.float(), pairs).to(dtype)
    rows[(given_ids < 0)[:, 0]] = torch.nan
    before = [tensor.clone() for each in held for tensor in each.tensors()]
    ours = CudaExperts(held, activation, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_num_splits", lambda *_: num_splits)
        found = ours(rows, pairs)
    assert_near(found[there], expected[there], steps=8)
    after = [tensor for each in ours.held for tensor in each.tensors()]
    for old, new in zip(before, after, strict=True):
        assert old.dtype is new.dtype
        assert torch.equal(old.view(torch.uint8), new.contiguous().view(torch.uint8))


def test_experts_of_two_kinds_do_not_suit():
    int8, float8 = (
        make_experts(kind, 1, 32, 32, torch.float32, has_bias=False, first=0)[0]
        for kind in ("int8", "float8")
    )
    assert not CudaExperts.suits([*int8, *float8])
    assert not CudaExperts.suits([Expert(up=int8[0].up, down=int8[0].down, gate=float8[0].gate)])


@pytest.mark.smoke(2)
@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_mlps(kind, num_tokens):
    (own,), (wide,) = make_experts(kind, 1, 64, 96, torch.float32, has_bias=False, first=0)
    norm, scale = torch.linspace(0.5, 2, 64, device=DEVICE), random(torch.float32, 1, 64)
    assert CudaMlp.suits(own)
    x = random(torch.float32, num_tokens, 64)
    expected, found = (
        CudaMlp(MlpWeights(mlp, Activation("silu"), norm, 1e-5, scale))(x) for mlp in (wide, own)
    )
    assert_near(found, expected, steps=8)


def test_groups_that_no_step_can_have():
    assert not CudaNarrowLinear.suits(narrow("int8", 8, 96, torch.float32, group=48))
    assert CudaNarrowLinear.suits(narrow("int8", 8, 40, torch.float32, group=48))
