"""Rows of bytes, and rows in the order of their experts, written out by hand."""

import pytest
import torch

from expertlane.moe.dispatch import gather_sum, group_by_expert, inverse, stable_order
from expertlane.moe.packing import columns_of, pack, unpack

X = torch.tensor([[1.0, 10], [2, 20], [3, 30]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_can_be_unpacked(dtype):
    x, ids = X.to(dtype), torch.tensor([[4], [5], [6], [7]], dtype=torch.int32)
    weights, tokens = torch.rand(4, 2), torch.tensor([2, 0, 0, 1])
    packed = pack([ids, weights], x, tokens)
    assert packed.dtype is torch.uint8
    assert packed.shape == (4, 4 + 2 * 4 + 2 * x.itemsize)
    parts = unpack(packed, columns_of([ids, weights, x]))
    assert torch.equal(parts[0], ids)
    assert torch.equal(parts[1], weights)
    assert parts[2].tolist() == [[3, 30], [1, 10], [1, 10], [2, 20]]


def test_without_an_index_rows_are_tokens():
    ids = torch.tensor([[4], [5], [6]], dtype=torch.int32)
    parts = unpack(pack([ids], X), columns_of([ids, X]))
    assert torch.equal(parts[1], X)


@pytest.mark.parametrize("tokens", [None, torch.empty(0, dtype=torch.int64)])
def test_no_row(tokens):
    ids = torch.empty(0, 1, dtype=torch.int32)
    packed = pack([ids], X if tokens is not None else X[:0], tokens)
    assert packed.shape == (0, 12)
    assert [part.shape for part in unpack(packed, columns_of([ids, X]))] == [(0, 1), (0, 2)]


def test_pairs_by_expert():
    slots = torch.tensor([[1, -1], [0, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 9], [0.25, 0.75], [9, 9]])
    arrived, pairs = group_by_expert(X, slots, weights, 3)
    # Expert 0 has row 1; expert 1 has rows 0 and 1; the third has none.
    assert arrived.rows.tolist() == [[2, 20], [1, 10], [2, 20]]
    assert arrived.num_tokens_per_expert == [1, 2, 0]
    assert pairs.place_of.tolist() == [1, 0, 2]
    assert pairs.places.tolist() == [[1, -1], [0, 2], [-1, -1]]
    assert pairs.weighted_sum(arrived.rows).tolist() == [[0.5, 5], [2, 20], [0, 0]]


def test_no_pair():
    slots = torch.full((2, 2), -1, dtype=torch.int32)
    arrived, pairs = group_by_expert(X[:2], slots, torch.ones(2, 2), 2)
    assert arrived.rows.shape == (0, 2)
    assert arrived.num_tokens_per_expert == [0, 0]
    assert pairs.weighted_sum(arrived.rows).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("num_values", [3, 300, 70_000])
def test_orders(num_values):
    values = torch.tensor([2, 0, num_values - 1, 0, 2])
    order = stable_order(values, num_values)
    by_hand = [1, 3, 0, 2, 4] if num_values == 3 else [1, 3, 0, 4, 2]
    assert order.tolist() == by_hand
    assert order[inverse(order)].tolist() == [0, 1, 2, 3, 4]


def test_sums_in_bfloat16_are_those_in_float32():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 32, generator=generator).bfloat16()
    places = torch.tensor([[0, 5, -1], [-1, -1, -1], [3, 3, 1]])
    weights = torch.rand(3, 3, generator=generator)
    ours = gather_sum(values, places, weights)
    assert ours.dtype is torch.bfloat16
    exact = gather_sum(values.float(), places, weights)
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=2**-8)
    assert ours[1].abs().max() == 0
