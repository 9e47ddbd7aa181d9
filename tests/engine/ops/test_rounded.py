"""Products with inputs in float8, on torch and on our C++, against float64 and rounding by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from engine.ops.instruction_sets import ALL_SETS, backend_or_skip
from engine.ops.test_narrow import BOUND, assert_near, drawn, rows_of
from expertlane.engine.ops.float8 import RoundedLinear, from_float8, rounded_inputs, to_float8
from expertlane.engine.ops.narrow import (
    Float8Inputs,
    NarrowWeight,
    reordered,
    shared_rows,
    side_by_side,
)
from expertlane.engine.ops.products import Activation, Expert, LoopedExperts
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import SpecError

TORCH = TorchBackend()


@pytest.fixture(params=["torch", *ALL_SETS], scope="module")
def backend(request) -> TorchBackend:
    """What computes."""
    return TORCH if request.param == "torch" else backend_or_skip(request.param)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """Each token's every 128 by themselves."""
    parts = [from_float8(*to_float8(part), x.dtype) for part in x.split(128, dim=1)]
    return torch.cat(parts, dim=1)


@given(
    num_rows=st.integers(0, 3),
    num_inputs=st.sampled_from([1, 127, 128, 129, 256, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(derandomize=True, deadline=None)
def test_each_token_and_128_inputs_are_rounded_by_themselves(num_rows, num_inputs, dtype):
    x = rows_of(num_rows, num_inputs, dtype) * torch.logspace(-3, 3, num_inputs).to(dtype)
    found = rounded_inputs(x)
    assert found.dtype is dtype
    assert torch.equal(found, by_hand(x))
    assert torch.equal(rounded_inputs(found), found)
    for row in range(num_rows):
        assert torch.equal(rounded_inputs(x[row : row + 1])[0], found[row])


@pytest.mark.numerical
@given(
    num_rows=st.sampled_from([0, 1, 5]),
    sizes=st.sampled_from([(8, 96), (40, 128), (130, 300)]),
    group=st.sampled_from([32, 128, 300]),
    has_bias=st.booleans(),
    is_widened=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=12, derandomize=True, deadline=None)
def test_products(backend, num_rows, sizes, group, has_bias, is_widened, dtype):
    n, k = sizes
    weight = drawn(n, k, torch.float8_e4m3fn, group)
    held = weight.widened(dtype) if is_widened else NarrowWeight(**{**vars(weight), "dtype": dtype})
    bias = torch.linspace(-1, 1, n).to(dtype) if has_bias else None
    linear = backend.linear(Float8Inputs(held), bias)
    assert isinstance(linear, RoundedLinear)
    assert (linear.num_weights, linear.num_bytes) == (n * k, linear.inner.num_bytes)
    x = rows_of(num_rows, k, dtype)
    on_torch = not backend.keeps_narrow
    wide = weight.widened(dtype if is_widened or on_torch else torch.float32)
    expected = by_hand(x).double() @ wide.double().T
    added = by_hand(x).abs().double() @ wide.abs().double().T
    if bias is not None:
        expected = expected + bias.double()
    assert_near(linear(x), expected, steps=4, added=added)
    if num_rows:
        exact = x.double() @ wide.double().T + (0 if bias is None else bias.double())
        assert (linear(x).double() - exact).abs().max() > BOUND[dtype] * added.max()
    assert torch.equal(linear.with_tensors(linear.tensors())(x), linear(x))


@pytest.mark.numerical
def test_experts_round_what_comes_in_and_what_is_between(backend):
    inner, hidden = 160, 192

    def expert(seed: int) -> tuple[Expert, list[torch.Tensor]]:
        sizes = (inner, hidden), (inner, hidden), (hidden, inner)
        weights = [drawn(*each, torch.float8_e4m3fn, 128, 0, seed) for each in sizes]
        gate, up, down = (backend.linear(Float8Inputs(each)) for each in weights)
        return Expert(gate=gate, up=up, down=down), [each.widened() for each in weights]

    both = [expert(seed) for seed in range(3)]
    experts = backend.experts([each for each, _ in both], Activation("silu"))
    assert type(experts) is LoopedExperts
    x = rows_of(5, hidden, torch.float32)
    ids = torch.tensor([[0, 2], [2, -1], [0, 2], [-1, -1], [2, 0]])
    pairs = backend.group_pairs(ids.int(), 0, 1, 3)
    found, place = experts(x, pairs), 0
    for row, of_row in enumerate(ids.tolist()):
        for each in (each for each in of_row if each >= 0):
            gate, up, down = both[each][1]
            one = by_hand(x[row : row + 1])
            between = by_hand(torch.nn.functional.silu(one @ gate.T) * (one @ up.T))
            assert_near(found[place : place + 1], (between @ down.T).double(), steps=64)
            place += 1


def test_matrices_side_by_side_take_such_inputs_together():
    first, second = (drawn(n, 128, torch.float8_e4m3fn, 128) for n in (256, 192))
    parts = [NarrowWeight(**{**vars(each), "rows": 64}) for each in (first, second)]
    joined = side_by_side([Float8Inputs(each) for each in parts])
    assert isinstance(joined, Float8Inputs)
    assert joined.weight.rows == 64
    assert torch.equal(joined.weight.widened(), torch.cat([each.widened() for each in parts]))
    wide = side_by_side([Float8Inputs(parts[0]), Float8Inputs(parts[1].widened())])
    assert torch.equal(wide.weight, joined.weight.widened())
    with pytest.raises(SpecError, match=telling("1 2 matrices")):
        side_by_side([Float8Inputs(parts[0]), parts[1]])
    turned = reordered(joined, lambda rows: rows.flip(0))
    assert torch.equal(turned.weight.widened(), joined.weight.widened().flip(0))
    assert turned.weight.rows == 1


def test_rows_with_equal_scales_of_matrices_one_after_the_other():
    assert shared_rows(128, [2048, 2048]) == 128
    assert shared_rows(128, [576]) == 128
    assert shared_rows(128, [192, 128]) == 64
    assert shared_rows(1, [256, 256]) == 1
