"""ctypes structures of `step.h` and `layers.cpp`: weights, batches and addresses for C++ calls."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.ops.packed import FEW_ROWS, CompiledExperts, NarrowLinear
from expertlane.engine.ops.products import Linear

MOST_TOKENS = 512  # with more, operations one by one cost no more, and their memory is given back
SUFFIX = {torch.bfloat16: "", torch.float32: "_float"}
_POINTER, _WHOLE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def address_of(tensor: Tensor | None) -> int | None:
    """The address of a tensor's memory."""
    return None if tensor is None else tensor.data_ptr()


class Part:
    """A part of a step that our C++ computes in one call.

    Args:
        name: the C++ function's; that for float32 ends in `_float`.
        dtype: dtype of hidden states.
    """

    def __init__(self, name: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self._function = getattr(library, name + SUFFIX[dtype])
        self._most_tokens = FEW_ROWS if dtype is torch.float32 else MOST_TOKENS

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        return 0 < x.shape[0] <= self._most_tokens and x.is_contiguous()


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type."""
    return [(name, kind) for name in names.split()]


class Struct(ctypes.Structure):
    """A structure of our C++; its maker keeps alive the memory that it points to."""

    @property
    def address(self) -> int:
        """The address of this structure."""
        return ctypes.addressof(self)


class Matrix(Struct):
    """A linear's weight, in the layout of its kernel, with its scales, if any, and its bias."""

    _fields_ = (
        *_all(_POINTER, "weight bias scales"),
        *_all(_WHOLE, "outputs inputs group first is_float8"),
    )

    @staticmethod
    def of(linear: Linear) -> "Matrix":
        """The structure of a linear that one of our C++ kernels multiplies."""
        weight, bias = linear.weight.data_ptr(), address_of(linear.bias)
        sizes = linear.out_features, linear.in_features
        if not isinstance(linear, NarrowLinear):
            return Matrix(weight, bias, None, *sizes)
        narrow = linear.group, linear.first, linear.is_float8
        return Matrix(weight, bias, linear.scales.data_ptr(), *sizes, *narrow)


class AttentionLayer(Struct):
    """Weights and sizes of a layer's attention."""

    _fields_ = (
        *_all(Matrix, "query_key_value output"),
        *_all(_POINTER, "norm head_norms sinks"),
        *_all(_WHOLE, "heads kv_heads head_dim rotary_dim interleave window"),
        *_all(_FLOAT, "eps scale"),
    )


class Tokens(Struct):
    """A batch's rotary angles, slots, block tables and lengths of sequences."""

    _fields_ = (
        *_all(_POINTER, "cos sin slots tables first_token scheduled lengths"),
        *_all(_WHOLE, "width seqs"),
    )
    kept: Sequence[Any] = ()


class Pages(Struct):
    """Addresses of a layer's KV cache, and its block size."""

    _fields_ = (*_all(_POINTER, "keys values key_scales value_scales"), ("block_size", _WHOLE))


class RouterLayer(Struct):
    """Weights and settings of a layer's router, and of the norm before it."""

    _fields_ = (
        *_all(_POINTER, "norm weight bias correction"),
        *_all(_WHOLE, "hidden experts top_k is_softmax renormalise groups top_groups adds_two"),
        *_all(_FLOAT, "eps scale"),
    )


class HeadLayer(Struct):
    """Weights of the output head, and of the final norm."""

    _fields_ = (("matrix", Matrix), ("norm", _POINTER), ("eps", _FLOAT))


class ExpertsLayer(Struct):
    """Weights and sizes of a layer's experts."""

    _fields_ = (
        *_all(_POINTER, "gate up down"),
        *_all(_WHOLE, "count inner is_narrow is_float8 hidden_group inner_group inner_first"),
    )

    @staticmethod
    def of(experts: CompiledExperts) -> "ExpertsLayer":
        """The structure of experts that our C++ kernels compute."""
        pointers = (None if each is None else ctypes.addressof(each) for each in experts.matrices)
        up, down = experts.held[0].up, experts.held[0].down
        narrow: tuple[int, ...] = ()
        if isinstance(up, NarrowLinear) and isinstance(down, NarrowLinear):
            narrow = True, up.is_float8, up.group, down.group, down.first
        return ExpertsLayer(*pointers, len(experts.held), up.out_features, *narrow)


class Mlp(Struct):
    """Weights of an MLP of all tokens, with the norm before it and the scale after it, if any."""

    _fields_ = (*_all(_POINTER, "experts norm scale"), ("hidden", _WHOLE), ("eps", _FLOAT))


class Layer(Struct):
    """A layer that is computed with others in one call."""

    _fields_ = (
        *_all(_POINTER, "attention router experts mlp"),
        ("pages", Pages),
        ("index", _WHOLE),
        ("counts", _POINTER),
    )


class Progress(Struct):
    """Addresses of a rank's line of the progress board, and of its meter's times."""

    _fields_ = (*_all(_POINTER, "layer stage counter time_ns meter"), ("stages", _WHOLE * 5))
