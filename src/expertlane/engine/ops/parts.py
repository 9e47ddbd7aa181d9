"""Parts of a layer that a backend may compute in one call."""

from typing import Protocol

from torch import Tensor

from expertlane.engine.ops.kv_cache import KVCache, PagedBatch


class AttentionCall(Protocol):
    """A layer's attention, from hidden states to the output projection, in one call."""

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend.

        Args:
            x: [num_tokens, hidden_size].
            adds_input: x is added to the result.

        Returns:
            [num_tokens, hidden_size].
        """


class MlpCall(Protocol):
    """An MLP of all tokens in one call; with the norm before it and the scale after it, if any."""

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
