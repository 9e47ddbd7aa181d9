"""Layers one after the other in one call of `layers.cpp`, where nothing travels between them."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from expertlane.ops.kv_cache import KVCache, PagedBatch
from expertlane.ops.moe_step import LocalExperts
from expertlane.ops.step import AttentionPart
from expertlane.ops.structs import SUFFIX, Layer, Progress, function_of


class LayersPart:
    """A stage's layers, whose attention and experts are all on this rank.

    Args:
        layers: attention and MoE block of each.
        caches: of each.
        first_layer: the number of the first.
        progress: where the rank's layer, stage, counter and time (ns) are to be kept up to date.
        stages: the numbers of attention, router, dispatch, experts and combine there.
    """

    def __init__(
        self,
        layers: Sequence[tuple[AttentionPart, LocalExperts]],
        caches: Sequence[KVCache],
        first_layer: int,
        progress: Sequence[int],
        stages: Sequence[int],
    ) -> None:
        self._made_of, self._caches = list(layers), list(caches)
        self._progress = Progress(*progress, (ctypes.c_int64 * len(stages))(*stages))
        self._layers = (Layer * len(layers))(
            *(
                Layer(attention.layer, *here.layers, attention.pages(cache), first_layer + number)
                for number, ((attention, here), cache) in enumerate(
                    zip(layers, caches, strict=True)
                )
            )
        )
        attention, here = layers[0]
        assert attention.dtype is here.dtype, "a model has one"
        self._function = function_of(attention.library, f"layers_part{SUFFIX[here.dtype]}", 7)

    def is_made_of(
        self, layers: Sequence[tuple[AttentionPart | None, LocalExperts | None]]
    ) -> bool:
        """Whether it still does what these do."""
        return all(
            own[0] is other[0] and own[1] is other[1]
            for own, other in zip(self._made_of, layers, strict=True)
        )

    def takes(self, x: Tensor) -> bool:
        """Whether it computes tokens [num_tokens, hidden_size]."""
        return self._made_of[0][0].takes(x)

    def __call__(self, x: Tensor, batch: PagedBatch) -> Tensor:
        """[num_tokens, hidden_size] after the last layer, of [num_tokens, hidden_size]."""
        placed, out = self._made_of[0][0].placed(batch), torch.empty_like(x)
        self._function(
            *(ctypes.addressof(self._layers), len(self._layers), placed.address),
            *(self._progress.address, x.data_ptr(), x.shape[0], out.data_ptr()),
        )
        return out
