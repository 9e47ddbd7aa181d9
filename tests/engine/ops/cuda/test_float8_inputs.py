"""Products of float8 with float8 against products of rounded inputs with widened weights.

Without a GPU the Triton kernels run in the interpreter.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling

pytest.importorskip("triton")

from engine.ops.cuda.near import (
    DEVICE,
    PRODUCT_DTYPES,
    ROUNDING,
    assert_near,
    drawn,
    needs_kernels,
    random,
)
from expertlane.engine.ops.cuda import backend as choice
from expertlane.engine.ops.cuda import grouped as module
from expertlane.engine.ops.cuda.backend import CudaBackend, multiplies_float8
from expertlane.engine.ops.cuda.matrices import Matrices
from expertlane.engine.ops.cuda.parts import CudaExperts, CudaMlp, CudaNarrowLinear
from expertlane.engine.ops.float8 import RoundedLinear
from expertlane.engine.ops.narrow import Float8Inputs, NarrowWeight
from expertlane.engine.ops.products import Activation, Expert, Linear, LoopedExperts
from expertlane.engine.ops.step import MlpWeights
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import UserError

pytestmark = needs_kernels

OPS = CudaBackend()
# Inputs and outputs that share a scale: blocks as DeepSeek-V3 has them, one scale a row or for all,
# 32 inputs of a row.
SCALES = st.sampled_from([(128, 128), (256, 64), (4096, 1), (4096, 4096), (128, 1), (32, 1)])


def narrow(n, k, dtype, scales=(128, 128), seed=0):
    generator = torch.Generator().manual_seed(seed)
    group, rows = scales
    values = (torch.randn(n, k, generator=generator) * 40).to(torch.float8_e4m3fn)
    shape = math.ceil(n / rows), math.ceil(k / group)
    blocks = torch.rand(shape, generator=generator) / (40 * math.sqrt(k))
    of_rows = blocks.repeat_interleave(rows, 0)[:n].contiguous()
    return NarrowWeight(values, of_rows, group, 0, dtype, rows).to(DEVICE)


def both(weight, bias=None):
    """Ours, and the same product of inputs that are rounded before, in float32."""
    wide = Linear(weight.widened(torch.float32), None if bias is None else bias.float())
    ours = OPS.linear(Float8Inputs(weight), bias)
    assert isinstance(ours, CudaNarrowLinear)
    assert ours.takes_float8
    return ours, RoundedLinear(wide)


@pytest.mark.filterwarnings("ignore:invalid value")  # in the interpreter
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so(odd):
    x = torch.ones(2, 256, device=DEVICE)
    x[0, 130] = odd
    ours, _ = both(narrow(8, 256, torch.float32))
    found = ours(x)
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@pytest.mark.full
@settings(drawn, max_examples=8)
@given(
    num_rows=st.sampled_from([0, 1, 5, 40]),
    sizes=st.sampled_from([(8, 32), (130, 64), (40, 300)]),
    scales=SCALES,
    has_bias=st.booleans(),
    dtype=PRODUCT_DTYPES,
    num_splits=st.sampled_from([1, 3]),
)
def test_products(num_rows, sizes, scales, has_bias, dtype, num_splits):
    n, k = sizes
    bias = random(dtype, n) if has_bias else None
    (ours, reference), x = both(narrow(n, k, dtype, scales), bias), random(dtype, num_rows, k + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_num_splits", lambda *_: num_splits)
        found = ours(x[:, 2:])
        assert torch.equal(ours.with_tensors(ours.tensors())(x[:, 2:]), found)
    assert_near(found, reference(x[:, 2:].float()).to(dtype), steps=4)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("scales", [(128, 128), (128, 1), (4096, 1)], ids=str)
@pytest.mark.parametrize("num_rows", [40, 70], ids=["tiles of 64", "tiles of 128"])
def test_a_token_gets_the_same_whatever_the_tile(num_rows, scales):
    """But for the order of sums."""
    ours, reference = both(narrow(24, 136, torch.float32, scales))
    x = random(torch.float32, num_rows, 136)
    found = ours(x)
    assert_near(found, reference(x), steps=4)
    assert_near(ours(x[5:6]), found[5:6], steps=4)


@pytest.mark.full
@settings(drawn, max_examples=5)
@given(
    ids=st.lists(st.integers(-1, 2), max_size=9),
    sizes=st.sampled_from([(32, 32), (200, 160)]),
    scales=SCALES,
    has_bias=st.booleans(),
    dtype=PRODUCT_DTYPES,
)
def test_experts(ids, sizes, scales, has_bias, dtype):
    """Side by side, gathered and scattered; some without tokens, and room for more pairs.

    What is between the products may differ in its last bit, and then be rounded the other way: few
    rows do in float32. That moves a row by less than 3 %.
    """
    hidden, inner = sizes

    def linear(n, k, seed):
        bias = random(dtype, n, seed=seed) if has_bias else None
        return both(narrow(n, k, dtype, scales, seed), bias)

    made = [
        [linear(inner, hidden, 3 * e), linear(hidden, inner, 3 * e + 1), linear(inner, hidden, e)]
        for e in range(3)
    ]
    held, wide = (
        [Expert(up=up[which], down=down[which], gate=gate[which]) for up, down, gate in made]
        for which in range(2)
    )
    pairs_ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE).view(-1, 1)
    pairs = TorchBackend().group_pairs(pairs_ids, 0, 1, 3, len(ids))
    rows = random(dtype, len(ids), hidden + 2)[:, 2:]
    activation = Activation("silu")
    expected = LoopedExperts(wide, activation)(rows.float(), pairs).to(dtype)
    rows[(pairs_ids < 0)[:, 0]] = 1e4
    ours = OPS.experts(held, activation)
    assert isinstance(ours, CudaExperts)
    there = pairs.numbers[pairs.numbers >= 0]
    found, expected = ours(rows, pairs)[there].double(), expected[there].double()
    if len(there):
        errors = (found - expected).abs() / expected.abs().max()
        assert errors.max() <= 0.03
        assert dtype is torch.float16 or errors.median() <= 8 * ROUNDING[dtype]


def test_mlps_and_what_is_put_side_by_side():
    (gate, wide_gate), (up, wide_up), (down, wide_down) = (
        both(narrow(*sizes, torch.float32, (32, 32), seed))
        for seed, sizes in enumerate([(96, 64), (96, 64), (64, 96)])
    )
    own = Expert(up=up, down=down, gate=gate)
    assert CudaMlp.suits(own)
    x = random(torch.float32, 3, 64)
    mlp = CudaMlp(MlpWeights(own, Activation("silu")))
    expected = wide_down(Activation("silu")(wide_gate(x), wide_up(x)))
    assert_near(mlp(x), expected, steps=64)
    matrices = Matrices.of([[up, gate]])
    assert (matrices.rows, matrices.takes_float8) == (32, True)
    plain = CudaNarrowLinear(narrow(96, 64, torch.float32, (32, 32)), None)
    assert not CudaExperts.suits([Expert(up=plain, down=down, gate=gate)])


def test_scales_that_no_step_can_have_are_refused():
    weight = narrow(8, 96, torch.float32, (48, 1))
    with pytest.raises(UserError, match=telling("activations='model'")):
        OPS.linear(Float8Inputs(weight))


def test_they_are_used_where_they_are_right(monkeypatch):
    assert multiplies_float8(DEVICE)
    product = CudaNarrowLinear.__call__
    for wrong in (lambda self, x: 1.1 * product(self, x), lambda self, x: x.no_such_product):
        monkeypatch.setattr(choice.CudaNarrowLinear, "__call__", wrong)
        assert not multiplies_float8(DEVICE)
