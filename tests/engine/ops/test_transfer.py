"""What is packed for one transfer comes out as it went in."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.engine.ops.device import joined, packed, parted, to_device, to_host, unpacked

SHAPES = st.one_of(
    st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 3), st.integers(0, 4)), st.just(())
)
COLUMNS = st.lists(
    st.tuples(SHAPES, st.sampled_from(["int64", "int32", "float64", "float32", "bool"])),
    max_size=6,
)


def arrays_of(columns):
    rng = np.random.default_rng(0)
    return [np.asarray(rng.integers(0, 2, shape)).astype(dtype) for shape, dtype in columns]


@settings(derandomize=True, deadline=None)
@given(COLUMNS)
def test_arrays(columns):
    arrays = arrays_of(columns)
    for found in (unpacked(packed(arrays), arrays), to_device(arrays, torch.device("cpu"))):
        for tensor, array in zip(found, arrays, strict=True):
            assert np.array_equal(tensor.numpy(), array)
            assert tensor.numpy().dtype == array.dtype


@settings(derandomize=True, deadline=None)
@given(COLUMNS.filter(bool))
def test_tensors(columns):
    tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays_of(columns)]
    for found in (parted(joined(tensors), tensors), to_host(tensors, lambda event: None)):
        for tensor, expected in zip(found, tensors, strict=True):
            assert torch.equal(tensor, expected)
            assert tensor.dtype is expected.dtype


def test_each_array_begins_where_triton_has_its_kernel_already():
    """Which takes pointers that are multiples of 16 for a kind of their own."""
    arrays = [np.zeros(num, dtype) for num, dtype in ((1, "bool"), (3, "int64"), (5, "int32"))]
    room = packed(arrays)
    for each in unpacked(room, arrays):
        assert (each.data_ptr() - room.data_ptr()) % 16 == 0
