"""Weights of one byte: rounding by hand, and kernels of each instruction set against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.instruction_sets import ALL_SETS, backend_or_skip
from expertlane.engine.ops.cpu import CpuBackend
from expertlane.engine.ops.narrow import NarrowWeight, reordered, side_by_side
from expertlane.engine.ops.packed import NarrowExperts, NarrowLinear
from expertlane.engine.ops.products import Activation, Expert, LoopedExperts, PairGroups
from expertlane.engine.ops.torch_backend import TorchBackend

BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}  # of the largest value
TYPES = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture(params=ALL_SETS, scope="module")
def backend(request) -> CpuBackend:
    """Our kernels for one instruction set."""
    return backend_or_skip(request.param)


def drawn(n: int, k: int, values: torch.dtype, group: int, first: int = 0, seed: int = 0):
    """A weight with every code there is but those that are no number."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
    if values is not torch.int8:
        codes[codes & 127 == 127] = 0
    num_groups = -(-(first + k) // group)
    scales = (torch.rand(n, num_groups, generator=generator) + 0.5) / math.sqrt(max(1, k))
    return NarrowWeight(codes.view(values), scales, group, first, torch.float32)


def rows_of(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Rows that lie apart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k + 3, generator=generator)[:, :k].to(dtype)


def assert_near(
    found: torch.Tensor,
    expected: torch.Tensor,
    steps: float = 1.0,
    added: torch.Tensor | None = None,
) -> None:
    """`added`: sizes of what was added up, since much of it may cancel; else of `expected`."""
    assert found.shape == expected.shape
    if found.numel():
        size = (expected if added is None else added).abs().max().clamp(min=1e-30)
        error = (found.double() - expected).abs().max() / size
        assert error <= steps * BOUND[found.dtype]


@pytest.mark.parametrize("values", TYPES)
def test_outputs_in_another_order(values):
    weight = drawn(5, 7, values, group=3, first=1)
    turned = reordered(weight, lambda rows: rows.flip(0))
    assert isinstance(turned, NarrowWeight)
    assert torch.equal(turned.widened(), weight.widened().flip(0))
    assert torch.equal(reordered(weight.widened(), lambda rows: rows.flip(0)), turned.widened())


def test_rounding_by_hand():
    weight = torch.zeros(3, 130)
    weight[0, :3] = torch.tensor([1.27, -0.634, 0.005])
    weight[0, 128:] = torch.tensor([-254.0, 3.0])
    weight[2, 129] = -1e-3
    narrow = NarrowWeight.rounded(weight, torch.bfloat16)
    assert narrow.values[0, :4].tolist() == [127, -63, 0, 0]
    assert narrow.values[0, 128:].tolist() == [-127, 2]  # 1.5 to the even neighbour
    assert narrow.values[2, 128:].tolist() == [0, -127]
    assert narrow.scales[:, 0].tolist() == [pytest.approx(0.01), 0, 0]
    assert narrow.scales[0, 1] == 2
    assert torch.equal(narrow.widened()[0, 128:], torch.tensor([-254.0, 4.0]).bfloat16())
    assert narrow.nbytes == 3 * 130 + 3 * 2 * 4


@given(k=st.integers(1, 300), data=st.data())
@settings(max_examples=25, deadline=None)
def test_rounding_is_within_half_a_step_and_columns_are_those_of_the_whole(k, data):
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
    narrow = NarrowWeight.rounded(weight, torch.float32)
    step = narrow.scales.repeat_interleave(128, 1)[:, :k]
    assert ((narrow.widened() - weight).abs() <= 0.501 * step).all()
    begin = data.draw(st.integers(0, k))
    end = data.draw(st.integers(begin, k))
    part = narrow.columns(range(begin, end))
    assert torch.equal(part.widened(), narrow.widened()[:, begin:end])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("values", TYPES)
def test_every_code_is_widened_exactly(backend, values, dtype):
    codes = torch.arange(256).to(torch.uint8)
    if values is not torch.int8:
        codes[codes & 127 == 127] = 0
    one_row = NarrowWeight(codes.view(values)[None], torch.ones(1, 1), 256, 0, torch.float32)
    out = backend.linear(one_row)(torch.eye(256, dtype=dtype))
    assert torch.equal(out.float().flatten(), codes.view(values).float())


@given(
    m=st.sampled_from([0, 1, 2, 3, 5, 8, 12, 13, 30, 70]),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    group=st.sampled_from([1, 3, 16, 128, 1000]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_products_of_any_sizes(backend, m, n, k, group, data):
    first = data.draw(st.integers(0, group - 1))
    values, dtype = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from([*BOUND]))
    weight = drawn(n, k, values, group, first)
    bias = torch.linspace(-1, 1, n) if data.draw(st.booleans()) else None
    x = rows_of(m, k, dtype)
    added = torch.zeros(n).double() if bias is None else bias.double()
    widened = weight.widened().double().T
    product = backend.linear(weight, bias)
    assert isinstance(product, NarrowLinear)
    sizes = x.double().abs() @ widened.abs() + added.abs()
    assert_near(product(x), x.double() @ widened + added, added=sizes)


def expert(backend, hidden, inner, is_gated, values, cut=0, seed=0):
    up = backend.linear(drawn(inner, hidden, values, 128, seed=3 * seed))
    down = backend.linear(drawn(hidden, inner, values, 128, cut, seed=3 * seed + 1))
    gate = backend.linear(drawn(inner, hidden, values, 128, seed=3 * seed + 2))
    return Expert(up=up, down=down, gate=gate if is_gated else None)


def pairs_of(counts, num_rows):
    generator, num = torch.Generator().manual_seed(1), sum(counts)
    taken = torch.randint(num_rows, (num,), generator=generator)
    order = torch.randperm(num, generator=generator)
    return PairGroups(torch.tensor(counts), taken, order, torch.empty(0))


@pytest.mark.parametrize("counts", [[1, 0, 1], [0, 0, 0], [3, 30, 2], [0, 0, 1]], ids=str)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("values", TYPES)
@pytest.mark.parametrize(("hidden", "inner", "cut"), [(33, 17, 0), (160, 144, 100)])
def test_experts_in_one_call(backend, hidden, inner, cut, values, dtype, is_gated, counts):
    """Against their own products, one after the other in float64."""
    held = [expert(backend, hidden, inner, is_gated, values, cut, each) for each in range(3)]
    activation = Activation("silu" if is_gated else "gelu")
    experts = backend.experts(held, activation)
    assert isinstance(experts, NarrowExperts)
    rows, pairs = rows_of(7, hidden, dtype), pairs_of(counts, 7)

    def wide(number, seed):
        shape = (hidden, inner, 128, cut) if seed == 1 else (inner, hidden, 128, 0)
        n, k, group, first = shape
        return drawn(n, k, values, group, first, seed=3 * number + seed).widened().double()

    expected, of_pair = torch.zeros(sum(counts), hidden, dtype=torch.float64), 0
    for number, count in enumerate(counts):
        for _ in range(count):
            x = rows[pairs.rows[of_pair]].double()
            up = wide(number, 0) @ x
            gate = wide(number, 2) @ x if is_gated else None
            inside = activation(gate, up)
            expected[pairs.order[of_pair]] = wide(number, 1) @ inside
            of_pair += 1
    assert_near(experts(rows, pairs), expected, steps=3)
    used = sum(1 for count in counts if count)
    num_weights = (3 if is_gated else 2) * hidden * inner
    assert experts.compute_cost(counts) == (2 * sum(counts) * num_weights, used * num_weights)


def test_experts_that_differ_go_one_after_the_other(backend):
    held = [expert(backend, 32, 16, True, values) for values in TYPES]
    experts = backend.experts(held, Activation("silu"))
    assert isinstance(experts, LoopedExperts)
    rows, pairs = rows_of(4, 32, torch.float32), pairs_of([2, 3], 4)
    assert experts(rows, pairs).isfinite().all()
    clamped = backend.experts(held[:1], Activation("silu", swiglu_limit=1.0))
    assert isinstance(clamped, LoopedExperts)


@pytest.mark.parametrize("values", TYPES)
def test_an_expert_that_was_sent_computes_the_same(backend, values):
    here, there = (expert(backend, 48, 20, True, values, seed=each) for each in (0, 1))
    sent = [tensor.clone() for tensor in here.tensors()]
    arrived = there.with_tensors(sent)
    rows, pairs = rows_of(3, 48, torch.float32), pairs_of([3], 3)
    outs = [backend.experts([each], Activation("silu"))(rows, pairs) for each in (here, arrived)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], backend.experts([there], Activation("silu"))(rows, pairs))


def test_no_outputs_or_no_inputs(backend):
    for n, k in ((0, 5), (5, 0)):
        weight = NarrowWeight.rounded(torch.ones(n, k), torch.float32)
        assert torch.equal(backend.linear(weight)(torch.ones(2, k)), torch.zeros(2, n))


def test_torch_multiplies_the_widened_weight():
    weight = drawn(6, 130, torch.int8, 128)
    x = rows_of(2, 130, torch.float32)
    assert torch.equal(TorchBackend().linear(weight)(x), TorchBackend().linear(weight.widened())(x))


def test_matrices_side_by_side():
    first, second = drawn(3, 130, torch.int8, 128), drawn(5, 130, torch.int8, 128, seed=1)
    both = side_by_side([first, second])
    assert isinstance(both, NarrowWeight)
    expected = torch.cat([first.widened(), second.widened()])
    assert torch.equal(both.widened(), expected)
    for other in (drawn(5, 130, torch.int8, 64, seed=1), second.widened()):
        mixed = side_by_side([first, other])
        assert isinstance(mixed, torch.Tensor)
        assert torch.equal(mixed[:3], expected[:3])
