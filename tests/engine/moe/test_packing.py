"""Rows of bytes, written out by hand."""

import pytest
import torch

from expertlane.engine.moe.dispatch import bytes_of, columns_of, unpack
from expertlane.engine.ops.backend import backend_of_cpu
from expertlane.engine.ops.torch_backend import TorchBackend

X = torch.tensor([[1.0, 10], [2, 20], [3, 30]])


@pytest.fixture(params=["ours", "torch"])
def ops(request):
    return TorchBackend() if request.param == "torch" else backend_of_cpu()[0]


def packed_by(ops, parts, num_rows):
    packed = torch.empty(
        num_rows, bytes_of(columns_of([part for part, _ in parts])), dtype=torch.uint8
    )
    ops.pack(parts, packed)
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_can_be_unpacked(ops, dtype):
    x, ids = X.to(dtype), torch.tensor([[4], [5], [6], [7]], dtype=torch.int32)
    weights, tokens = torch.rand(3, 2), torch.tensor([2, 0, 0, 1])
    packed = packed_by(ops, [(ids, None), (weights, tokens), (x, tokens)], 4)
    columns = columns_of([ids, weights, x])
    assert packed.shape == (4, bytes_of(columns)) == (4, 4 + 2 * 4 + 2 * x.itemsize)
    parts = unpack(packed, columns)
    assert torch.equal(parts[0], ids)
    assert torch.equal(parts[1], weights[tokens])
    assert parts[2].tolist() == [[3, 30], [1, 10], [1, 10], [2, 20]]
    # What was packed is packed anew, its rows apart.
    again = packed_by(ops, [(parts[0], None), (parts[2], torch.tensor([3, 3, 0, 1]))], 4)
    ids_again, x_again = unpack(again, columns_of([ids, x]))
    assert torch.equal(ids_again, ids)
    assert x_again.tolist() == [[2, 20], [2, 20], [3, 30], [1, 10]]


def test_rows_may_be_tokens(ops):
    ids = torch.tensor([[4], [5], [6]], dtype=torch.int32)
    parts = unpack(packed_by(ops, [(ids, None), (X, None)], 3), columns_of([ids, X]))
    assert torch.equal(parts[0], ids)
    assert torch.equal(parts[1], X)


def test_no_row(ops):
    ids, none = torch.empty(0, 1, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for parts in ([(ids, None), (X, none)], [(ids, None), (X[:0], None)]):
        packed = packed_by(ops, parts, 0)
        assert packed.shape == (0, 12)
        assert [part.shape for part in unpack(packed, columns_of([ids, X]))] == [(0, 1), (0, 2)]
