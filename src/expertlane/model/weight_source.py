"""Where a rank takes its slices of the logical tensors from: seeded ones or a checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class WeightSource(ABC):
    """Gives slices on the rank's device, and counts them.

    Args:
        dtype: of the slices, unless another is asked for.
        touch: called after every tensor, to say that work goes on.

    Attributes:
        num_bytes: taken so far.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, touch: Callable[[], None]) -> None:
        self.dtype = dtype
        self.device = device
        self._touch = touch
        self.num_bytes = 0

    def take(
        self, name: str, part: range | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor `name`, or a part of it along the dimension that layouts cut; contiguous."""
        tensor = self._read(name, part, dtype or self.dtype).to(self.device)
        self.num_bytes += tensor.nbytes
        self._touch()
        return tensor

    @abstractmethod
    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        """The same, wherever it is convenient; contiguous."""
