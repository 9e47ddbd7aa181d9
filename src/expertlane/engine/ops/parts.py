"""Parts of a layer that a backend may compute in one call."""

from typing import Protocol

from torch import Tensor

from expertlane.engine.ops.kv_cache import KVCache, PagedBatch


class AttentionCall(Protocol):
    """A layer's attention, from tokens to its output."""

    def takes(self, x: Tensor) -> bool:
        """Whether it supports tokens [num_tokens, hidden_size]."""

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend.

        Args:
            x: [num_tokens, hidden_size].
            adds_input: x is added to the result.

        Returns:
            [num_tokens, hidden_size].
        """


class MlpCall(Protocol):
    """Norm, if it has one, projections, and the scale, if it has one."""

    def takes(self, x: Tensor) -> bool:
        """Whether it supports tokens [num_tokens, hidden_size]."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size]."""
