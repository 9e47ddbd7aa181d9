"""Experts by grouped products against one expert after the other."""

import math
from contextlib import contextmanager

import pytest
import torch

from expertlane.engine.ops import products as module
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import waits_raise
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    GroupedExperts,
    Linear,
    LoopedExperts,
    PairGroups,
)
from expertlane.engine.ops.torch_backend import TorchBackend

HIDDEN, INNER = 32, 16
PLAIN = Activation("silu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_experts(num: int, *, inner=INNER, is_gated=True, has_bias=False, dtype=torch.float32):
    def linear(n: int, k: int, seed: int) -> Linear:
        weight = (random(n, k, seed=seed) / math.sqrt(k)).to(dtype)
        return Linear(weight, random(n, seed=seed).to(dtype) if has_bias else None)

    return [
        Expert(
            up=linear(inner, HIDDEN, 3 * each),
            down=linear(HIDDEN, inner, 3 * each + 1),
            gate=linear(inner, HIDDEN, 3 * each + 2) if is_gated else None,
        )
        for each in range(num)
    ]


def pairs_of(counts: list[int]):
    """Rows, and which of them each pair takes and gives, in any order."""
    num, generator = sum(counts), torch.Generator().manual_seed(1)
    rows = random(max(1, num), HIDDEN + 4)[:, 4:]
    taken = torch.randint(len(rows), (num,), generator=generator)
    order = torch.randperm(num, generator=generator)
    return rows, PairGroups(torch.tensor(counts), taken, order, torch.empty(0))


needs_grouping = pytest.mark.skipif(
    not GroupedExperts.suits(make_experts(1)), reason="torch groups no products here"
)


@needs_grouping
@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 9], [1, 1, 1], [0, 0, 0], [40, 7, 1]])
@pytest.mark.parametrize(
    ("is_gated", "has_bias", "activation"),
    [
        (True, False, PLAIN),
        (False, False, Activation("gelu")),
        (True, True, Activation("silu", swiglu_limit=1.0)),
    ],
)
def test_grouped_products_are_the_loop_s(counts, is_gated, has_bias, activation):
    held = make_experts(3, is_gated=is_gated, has_bias=has_bias)
    given = pairs_of(counts)
    expected = LoopedExperts(held, activation)(*given)
    found = GroupedExperts(held, activation)(*given)
    assert found.shape == (sum(counts), HIDDEN)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_none"), [(0, 0), (1, 0), (1, 1), (7, 3), (90, 60)])
def test_experts_leave_room_for_pairs_that_there_are_not(dtype, has_bias, num_rows, num_none):
    """What is not a number in rows without a pair is read by nobody, in any experts we have."""
    held = make_experts(3, inner=32, has_bias=has_bias, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 3, (num_rows, 2), generator=generator).int()
    ids[:num_none] = -1
    rows = random(num_rows, HIDDEN).to(dtype)
    rows[:num_none] = torch.nan
    exact = TorchBackend().group_pairs(ids, 0, 1, 3)
    expected = LoopedExperts(held, PLAIN)(rows, exact)
    there = exact.numbers >= 0
    bound = 4 * dtype.itemsize**-4  # some roundings
    weights = torch.rand(num_rows, 2, generator=generator)
    for ops in (TorchBackend(), backend_for(torch.device("cpu"))):
        experts = ops.experts(make_experts(3, inner=32, has_bias=has_bias, dtype=dtype), PLAIN)
        for num_pairs in {len(exact.rows), len(exact.rows) + num_none, ids.numel()}:
            pairs = ops.group_pairs(ids, 0, 1, 3, num_pairs)
            out = torch.full((num_pairs, HIDDEN), torch.nan, dtype=dtype)
            results = experts(rows, pairs, out)
            of_pairs = results[pairs.numbers[there]]
            torch.testing.assert_close(of_pairs, expected[exact.numbers[there]], rtol=0, atol=bound)
            assert torch.equal(pairs.given(results).isfinite(), torch.ones_like(of_pairs).bool())
            sums = ops.gather_sum(results, pairs.numbers, weights)
            assert sums.isfinite().all()
            assert not sums[:num_none].any()


@needs_grouping
def test_a_cpu_groups_neither_few_pairs_nor_many(monkeypatch):
    def group(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("it groups")

    held = make_experts(32)
    grouped, looped = GroupedExperts(held, PLAIN), LoopedExperts(held, PLAIN)
    monkeypatch.setattr(module, "grouped_mm", group)
    for counts in ([0] * 30 + [3, 1], [200] * 32):
        given = pairs_of(counts)
        assert torch.equal(grouped(*given), looped(*given))
    with pytest.raises(AssertionError, match="it groups"):
        grouped(*pairs_of([2] * 32))


@needs_grouping
def test_experts_keep_their_weights_as_parts_of_all():
    """What is sent to another rank is what was there; what comes from one is taken up."""
    held = make_experts(3)
    before = [tensor.clone() for expert in held for tensor in expert.tensors()]
    GroupedExperts(held, PLAIN)
    after = [tensor for expert in held for tensor in expert.tensors()]
    assert all(map(torch.equal, before, after))
    assert held[0].up.weight.untyped_storage().data_ptr() == (
        held[2].up.weight.untyped_storage().data_ptr()
    )
    arrived = held[0].with_tensors([tensor.clone() for tensor in held[2].tensors()])
    given = pairs_of([2, 3])
    moved = TorchBackend().experts([held[1], arrived], PLAIN)(*given)
    torch.testing.assert_close(moved, LoopedExperts(held[1:], PLAIN)(*given))


@pytest.mark.parametrize("inner", [INNER, 3])
def test_what_cannot_be_grouped_is_looped(monkeypatch, inner):
    if inner == INNER:  # a torch without it
        monkeypatch.setattr(module, "grouped_mm", None)
    module._groups_products.cache_clear()
    held = make_experts(2, inner=inner)
    assert type(TorchBackend().experts(held, PLAIN)) is LoopedExperts
    module._groups_products.cache_clear()


def test_a_torch_that_refuses_is_not_asked(monkeypatch):
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("grouped gemm is only supported on CUDA")

    monkeypatch.setattr(module, "grouped_mm", refuse)
    module._groups_products.cache_clear()
    assert not GroupedExperts.suits(make_experts(2))
    module._groups_products.cache_clear()


def test_products_for_which_the_host_waits_are_not_torchs(monkeypatch):
    """On GPUs torch reads the ends on the host, and loops, where it has no kernel for the type."""
    modes: list[int | str] = ["default"]
    of_device = []

    @contextmanager
    def raising(device):
        of_device.append(device)
        with waits_raise(torch.device("cuda")):
            yield

    def loops(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.tensor([[0.0], [32], [32]])

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(module, "grouped_mm", loops)
    for context, suits in ((waits_raise, True), (raising, False)):  # on a CPU there is no wait
        monkeypatch.setattr(module, "waits_raise", context)
        module._groups_products.cache_clear()
        assert GroupedExperts.suits(make_experts(2)) is suits
    module._groups_products.cache_clear()
    assert modes == ["default", "error", "default"]
    assert of_device == [torch.device("cpu")]
