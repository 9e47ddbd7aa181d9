"""ctypes structures of `step.h` and `layers.cpp`: weights, batches and addresses for C++ calls."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.ops.narrow import NarrowLinear
from expertlane.engine.ops.packed import FEW_ROWS
from expertlane.engine.ops.products import Expert, Linear

MOST_TOKENS = 512  # with more, operations one by one cost no more, and their memory is given back
POINTER, WHOLE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SUFFIX = {torch.bfloat16: "", torch.float32: "_float"}


def address_of(tensor: Tensor | None) -> int | None:
    """The address of a tensor's memory."""
    return None if tensor is None else tensor.data_ptr()


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens of a C++ call; with more, layers call the operations one by one."""
    return FEW_ROWS if dtype is torch.float32 else MOST_TOKENS


class Struct(ctypes.Structure):
    """A structure of our C++; its maker keeps alive the memory that it points to."""

    @property
    def address(self) -> int:
        """The address of this structure."""
        return ctypes.addressof(self)


class Matrix(Struct):
    """A linear's weight, in the layout of its kernel, with its scales, if any, and its bias."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "bias", "scales")),
        *((name, WHOLE) for name in ("outputs", "inputs", "group", "first", "is_float8")),
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
        *((name, Matrix) for name in ("query_key_value", "output")),
        *((name, POINTER) for name in ("norm", "head_norms", "sinks")),
        *((name, WHOLE) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, WHOLE) for name in ("interleave", "window")),
        *((name, FLOAT) for name in ("eps", "scale")),
    )


class Tokens(Struct):
    """A batch's rotary angles, slots, block tables and lengths of sequences."""

    _fields_ = (
        *((name, POINTER) for name in ("cos", "sin", "slots", "tables")),
        *((name, POINTER) for name in ("first_token", "scheduled", "lengths")),
        *((name, WHOLE) for name in ("width", "seqs")),
    )
    kept: Sequence[Any] = ()


class Pages(Struct):
    """Addresses of a layer's KV cache, and its block size."""

    _fields_ = (
        *((name, POINTER) for name in ("keys", "values", "key_scales", "value_scales")),
        ("block_size", WHOLE),
    )


class RouterLayer(Struct):
    """Weights and settings of a layer's router, and of the norm before it."""

    _fields_ = (
        *((name, POINTER) for name in ("norm", "weight", "bias", "correction")),
        *((name, WHOLE) for name in ("hidden", "experts", "top_k", "is_softmax")),
        *((name, WHOLE) for name in ("renormalise", "groups", "top_groups", "adds_two")),
        *((name, FLOAT) for name in ("eps", "scale")),
    )


class HeadLayer(Struct):
    """Weights of the output head, and of the final norm."""

    _fields_ = (("matrix", Matrix), ("norm", POINTER), ("eps", FLOAT))


class ExpertsLayer(Struct):
    """Weights and sizes of a layer's experts."""

    _fields_ = (
        *((name, POINTER) for name in ("gate", "up", "down")),
        *((name, WHOLE) for name in ("count", "inner", "is_narrow", "is_float8")),
        *((name, WHOLE) for name in ("hidden_group", "inner_group", "inner_first")),
    )

    @staticmethod
    def of(held: Sequence[Expert], matrices: Sequence[Any]) -> "ExpertsLayer":
        """The structure of experts that our C++ kernels compute.

        Args:
            matrices: arrays of addresses of their gates (None without gates), ups and downs.
        """
        pointers = (None if each is None else ctypes.addressof(each) for each in matrices)
        up, down = held[0].up, held[0].down
        narrow: tuple[int, ...] = ()
        if isinstance(up, NarrowLinear) and isinstance(down, NarrowLinear):
            narrow = True, up.is_float8, up.group, down.group, down.first
        return ExpertsLayer(*pointers, len(held), up.out_features, *narrow)


class Mlp(Struct):
    """Weights of an MLP of all tokens, with the norm before it and the scale after it, if any."""

    _fields_ = (
        *((name, POINTER) for name in ("experts", "norm", "scale")),
        ("hidden", WHOLE),
        ("eps", FLOAT),
    )


class Layer(Struct):
    """A layer that is computed with others in one call."""

    _fields_ = (
        *((name, POINTER) for name in ("attention", "router", "experts", "mlp")),
        ("pages", Pages),
        ("index", WHOLE),
        ("counts", POINTER),
    )


class Progress(Struct):
    """Addresses of a rank's line of the progress board, and of its meter's times."""

    _fields_ = (
        *((name, POINTER) for name in ("layer", "stage", "counter", "time_ns", "meter")),
        ("stages", WHOLE * 5),
    )
