"""The structures of `step.h` and `layers.cpp`."""

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
    """Where it lies in memory."""
    return None if tensor is None else tensor.data_ptr()


def most_tokens(dtype: torch.dtype) -> int:
    """With more, parts leave tokens to the operations one by one."""
    return FEW_ROWS if dtype is torch.float32 else MOST_TOKENS


class Struct(ctypes.Structure):
    """One of `step.cpp`; what it points to is kept alive by who makes it."""

    @property
    def address(self) -> int:
        """Where it lies in memory."""
        return ctypes.addressof(self)


class Matrix(Struct):
    """A product's weight, as its kernel takes it, and bias."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "bias", "scales")),
        *((name, WHOLE) for name in ("outputs", "inputs", "group", "first", "is_float8")),
    )

    @staticmethod
    def of(linear: Linear) -> "Matrix":
        """Of a linear layer of our kernels'."""
        weight, bias = linear.weight.data_ptr(), address_of(linear.bias)
        sizes = linear.out_features, linear.in_features
        if not isinstance(linear, NarrowLinear):
            return Matrix(weight, bias, None, *sizes)
        narrow = linear.group, linear.first, linear.is_float8
        return Matrix(weight, bias, linear.scales.data_ptr(), *sizes, *narrow)


class AttentionLayer(Struct):
    """What a layer's attention computes with."""

    _fields_ = (
        *((name, Matrix) for name in ("query_key_value", "output")),
        *((name, POINTER) for name in ("norm", "head_norms", "sinks")),
        *((name, WHOLE) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, WHOLE) for name in ("interleave", "window")),
        *((name, FLOAT) for name in ("eps", "scale")),
    )


class Tokens(Struct):
    """Where a batch's tokens stand."""

    _fields_ = (
        *((name, POINTER) for name in ("cos", "sin", "slots", "tables")),
        *((name, POINTER) for name in ("first_token", "scheduled", "lengths")),
        *((name, WHOLE) for name in ("width", "seqs")),
    )
    kept: Sequence[Any] = ()


class Pages(Struct):
    """Where a layer's cache lies."""

    _fields_ = (
        *((name, POINTER) for name in ("keys", "values", "key_scales", "value_scales")),
        ("block_size", WHOLE),
    )


class RouterLayer(Struct):
    """What a layer's router computes with."""

    _fields_ = (
        *((name, POINTER) for name in ("norm", "weight", "bias", "correction")),
        *((name, WHOLE) for name in ("hidden", "experts", "top_k", "is_softmax")),
        *((name, WHOLE) for name in ("renormalise", "groups", "top_groups", "adds_two")),
        *((name, FLOAT) for name in ("eps", "scale")),
    )


class HeadLayer(Struct):
    """What the output head computes with."""

    _fields_ = (("matrix", Matrix), ("norm", POINTER), ("eps", FLOAT))


class ExpertsLayer(Struct):
    """What a layer's experts compute with."""

    _fields_ = (
        *((name, POINTER) for name in ("gate", "up", "down")),
        *((name, WHOLE) for name in ("count", "inner", "is_narrow", "is_float8")),
        *((name, WHOLE) for name in ("hidden_group", "inner_group", "inner_first")),
    )

    @staticmethod
    def of(held: Sequence[Expert], matrices: Sequence[Any]) -> "ExpertsLayer":
        """Of experts of our kernels'.

        Args:
            matrices: where their gates (None without), ups and downs lie.
        """
        pointers = (None if each is None else ctypes.addressof(each) for each in matrices)
        up, down = held[0].up, held[0].down
        narrow: tuple[int, ...] = ()
        if isinstance(up, NarrowLinear) and isinstance(down, NarrowLinear):
            narrow = True, up.is_float8, up.group, down.group, down.first
        return ExpertsLayer(*pointers, len(held), up.out_features, *narrow)


class Mlp(Struct):
    """What an MLP of all tokens computes with."""

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
    """A rank's line of the progress board, and where its meter keeps times."""

    _fields_ = (
        *((name, POINTER) for name in ("layer", "stage", "counter", "time_ns", "meter")),
        ("stages", WHOLE * 5),
    )
