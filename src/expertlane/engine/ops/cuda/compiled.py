"""Torch's operations on rows, each group of which torch.compile makes one kernel or two on a GPU.

Norms, rotations, activations and sums are torch's own (`TorchBackend`); roundings between them are
kept. torch.compile has not run on a GPU here (docs/validation.md).
"""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from expertlane.engine.ops import float8
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.products import Activation
from expertlane.engine.ops.torch_backend import TorchBackend

P = ParamSpec("P")
R = TypeVar("R")
_MOST_KINDS = 64  # of shapes and types; torch's own bound of 8 is for one model's one kind of rows


class Compiled(Generic[P, R]):
    """A function of tensors that torch compiles at its first call; without a GPU it is called.

    Numbers of rows and widths are variables of what is compiled, so that a step of another size
    does not compile anew.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function

    @cached_property
    def kernel(self) -> Callable[P, R]:
        """The function as torch compiles it, on any device."""
        # Of torch's own imports, and of float32 products, which these functions have not.
        warnings.filterwarnings("ignore", "`torch.jit.script_method`|TensorFloat32")
        torch._dynamo.config.recompile_limit = _MOST_KINDS
        options: dict[str, Any] = {"emulate_precision_casts": True}
        return torch.compile(self._function, dynamic=True, options=options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        run = self.kernel if torch.cuda.is_available() else self._function
        return run(*args, **kwargs)


def _activated(x: Tensor, activation: Activation, *, is_gated: bool) -> Tensor:
    """Activations [num_rows, inner], computed in float32 and rounded once.

    Args:
        x: gate and up projections [num_rows, 2 · inner]; without a gate, up's [num_rows, inner].
    """
    gate, up = x.float().chunk(2, dim=1) if is_gated else (None, x.float())
    return activation(gate, up).to(x.dtype)


def _normed_and_rotated(
    query_key: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Tensor | None,
    eps: float,
    *,
    interleave: bool,
) -> Tensor:
    """Queries and keys [num_tokens, heads, head_dim], normed head by head, then rotated.

    Args:
        positions: [num_tokens].
        cos, sin: of all positions; those of `AttentionWeights`.
        norms: [heads, head_dim] float32; None where heads have no norm.
    """
    if norms is not None:
        query_key = _TORCH.rms_norm_heads_(query_key, norms, eps)
    angles = (each.index_select(0, positions) for each in (cos, sin))
    return _TORCH.rotate_(query_key, *angles, interleave=interleave)


_TORCH = TorchBackend()
rms_norm = Compiled(_TORCH.rms_norm)
add_rms_norm = Compiled(_TORCH.add_rms_norm)
rotate = Compiled(_TORCH.rotate_)
gather_sum = Compiled(_TORCH.gather_sum)
activate = Compiled(_activated)
norm_and_rotate = Compiled(_normed_and_rotated)
_to_float8 = Compiled(float8.to_float8)
inputs_to_float8 = Compiled(float8.inputs_to_float8)


def write(cache: KVCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store new tokens' keys and values in the cache, as `KVCache.write` does."""
    cache.store(slots, key, value, _to_float8)
