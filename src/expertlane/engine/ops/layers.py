"""Consecutive layers in one call of `layers.cpp`, where no communication lies between them."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertlane.engine.ops.kv_cache import KVCache, PagedBatch
from expertlane.engine.ops.library import function_of
from expertlane.engine.ops.mlp import MlpPart
from expertlane.engine.ops.moe_step import LocalExperts
from expertlane.engine.ops.step import AttentionPart
from expertlane.engine.ops.structs import SUFFIX, Layer, Progress, address_of


class LayerParts(NamedTuple):
    """The C++ calls of a layer.

    Attributes:
        experts: None in a dense layer.
        mlp: the MLP of a dense layer, with its norm; else the shared expert, if there is one.
    """

    attention: AttentionPart
    experts: LocalExperts | None
    mlp: MlpPart | None


class LayersPart:
    """A stage's layers, whose attention and MLPs are all on this rank.

    Args:
        caches: the KV cache of each layer.
        first_layer: the number of the first layer.
        progress: addresses where the rank's layer, stage, counter and time (ns) are kept up to
            date.
        stages: numbers that stand for attention, router, dispatch, experts and combine there.
        meter: the address where a `Meter` keeps times, and its counts of pairs by layer, then
            expert; None where nothing is measured.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        caches: Sequence[KVCache],
        first_layer: int,
        progress: Sequence[int],
        stages: Sequence[int],
        meter: tuple[int, Sequence[Tensor | None]] | None = None,
    ) -> None:
        self._made_of, self._caches = list(layers), list(caches)
        self._counts: Sequence[Tensor | None]
        address, self._counts = (None, [None] * len(layers)) if meter is None else meter
        self._progress = Progress(*progress, address, (ctypes.c_int64 * len(stages))(*stages))
        self._layers = (Layer * len(layers))(
            *(
                Layer(
                    attention.layer,
                    *((None, None) if experts is None else experts.layers),
                    None if mlp is None else mlp.layer,
                    attention.pages(cache),
                    first_layer + number,
                    address_of(counts),
                )
                for number, ((attention, experts, mlp), cache, counts) in enumerate(
                    zip(layers, caches, self._counts, strict=True)
                )
            )
        )
        attention = layers[0].attention
        name = f"layers_part{SUFFIX[attention.dtype]}"
        self._function = function_of(attention.library, name, "pnpppnp")

    def is_made_of(self, layers: Sequence[LayerParts | None]) -> bool:
        """Whether this call was made of exactly these layers, so that it can be reused."""
        return all(
            other is not None and all(a is b for a, b in zip(own, other, strict=True))
            for own, other in zip(self._made_of, layers, strict=True)
        )

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        return self._made_of[0].attention.takes(x)

    def __call__(self, x: Tensor, batch: PagedBatch) -> Tensor:
        """Hidden states [num_tokens, hidden_size] after the last layer, of x before the first."""
        placed, out = self._made_of[0].attention.placed(batch), torch.empty_like(x)
        self._function(
            *(ctypes.addressof(self._layers), len(self._layers), placed.address),
            *(self._progress.address, x.data_ptr(), x.shape[0], out.data_ptr()),
        )
        return out
