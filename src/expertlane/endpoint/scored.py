"""Log-probabilities of prompts' tokens, from a server or a reference, and who gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertlane.progress import Progress

Prompt = Sequence[int]  # token ids


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Log-probabilities of a prompt's tokens, each given those before it.

    Attributes:
        token_ids: [len].
        logprobs: [len - 1], of `token_ids[1:]`, natural logarithm; NaN where one isn't known.
        topk_ids: [num_moe_layers, len, top_k], chosen experts; None where they aren't known.
        router_margins: [num_moe_layers, len], the last chosen less the first unchosen score of the
            router; None where they aren't known.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    topk_ids: NDArray[np.int64] | None = None
    router_margins: NDArray[np.float64] | None = None


class Reference(Protocol):
    """A checkpoint that a server is compared with."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_len(self) -> int:
        """Tokens of the longest prompt."""
        ...

    @property
    def dtype(self) -> str:
        """The checkpoint's own number type."""
        ...

    @property
    def moe_layers(self) -> Sequence[int]:
        """The decoder's indices of layers with experts."""
        ...

    @property
    def num_experts(self) -> Sequence[int]:
        """Number of experts of each layer that has some."""
        ...

    def score_in(
        self, prompts: Sequence[Prompt], number_types: Sequence[str], progress: Progress
    ) -> dict[str, list[PromptScores]]:
        """Log-probabilities in several number types, to measure what rounding does.

        Raises:
            UserError: a prompt is too long for it, or has tokens that it hasn't.
        """
        ...
