"""Rows of bytes, written out by hand."""

import pytest
import torch

from expertlane.moe.payload import bytes_of, columns_of, pack, pack_all, unpack

X = torch.tensor([[1.0, 10], [2, 20], [3, 30]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_can_be_unpacked(dtype):
    x, ids = X.to(dtype), torch.tensor([[4], [5], [6], [7]], dtype=torch.int32)
    weights, tokens = torch.rand(3, 2), torch.tensor([2, 0, 0, 1])
    packed = pack([ids], [weights, x], tokens)
    columns = columns_of([ids, weights, x])
    assert packed.dtype is torch.uint8
    assert packed.shape == (4, bytes_of(columns)) == (4, 4 + 2 * 4 + 2 * x.itemsize)
    parts = unpack(packed, columns)
    assert torch.equal(parts[0], ids)
    assert torch.equal(parts[1], weights[tokens])
    assert parts[2].tolist() == [[3, 30], [1, 10], [1, 10], [2, 20]]


def test_rows_may_be_tokens():
    ids = torch.tensor([[4], [5], [6]], dtype=torch.int32)
    parts = unpack(pack_all([ids, X]), columns_of([ids, X]))
    assert torch.equal(parts[0], ids)
    assert torch.equal(parts[1], X)


def test_no_row():
    ids = torch.empty(0, 1, dtype=torch.int32)
    for packed in (pack([ids], [X], torch.empty(0, dtype=torch.int64)), pack_all([ids, X[:0]])):
        assert packed.shape == (0, 12)
        assert [part.shape for part in unpack(packed, columns_of([ids, X]))] == [(0, 1), (0, 2)]
