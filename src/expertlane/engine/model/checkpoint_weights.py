"""A rank's weights, from a checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.int8_cache import Int8Cache
from expertlane.engine.model.weights import WeightSource
from expertlane.engine.ops.mxfp4 import Mxfp4Weight
from expertlane.engine.ops.narrow import NarrowWeight
from expertlane.spec.deployment import ActivationsType, WeightsType
from expertlane.spec.model import cut_dim, tensor_shape


class CheckpointWeights(WeightSource):
    """A rank's slices of a checkpoint.

    Args:
        cache: matrices rounded to int8 earlier; None if they are rounded here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        touch: Callable[[], None],
        weights: WeightsType = "model",
        activations: ActivationsType = "model",
        cache: Int8Cache | None = None,
    ) -> None:
        super().__init__(checkpoint.model, dtype, device, touch, weights, activations)
        self._checkpoint, self._cache = checkpoint, cache

    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        return self._checkpoint.tensor(name, *_sides(name, part), dtype)

    def _rounded(self, name: str, part: range | None) -> NarrowWeight:
        if self._cache is None:
            return super()._rounded(name, part)
        return self._cache.part(name, *_sides(name, part), self.dtype)

    def _stored_narrow(self, name: str, part: range | None) -> NarrowWeight | None:
        return self._checkpoint.narrow(name, *_sides(name, part), self.dtype)

    def _stored_mxfp4(self, name: str, part: range | None) -> Mxfp4Weight | None:
        is_whole = part is None or len(part) == tensor_shape(self._model, name)[cut_dim(name)]
        return self._checkpoint.mxfp4(name, self.dtype) if is_whole else None


def _sides(name: str, part: range | None) -> tuple[range | None, range | None]:
    """Rows and columns of a slice in the dimension that layouts divide; None for all."""
    return (None, part) if cut_dim(name) == 1 else (part, None)
