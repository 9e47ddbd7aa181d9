"""Log-probabilities of prompts' tokens, from a server or a reference, and who gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertlane.progress import Progress

Prompt = Sequence[int]  # token ids


@dataclass(frozen=True, eq=False)
class Scored:
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
    """What a server is compared with: a checkpoint, or a second server."""

    def score(self, prompts: Sequence[Prompt], progress: Progress) -> list[Scored]:
        """Log-probabilities of prompts, in their order.

        Raises:
            UserError: a prompt is too long for it, or has tokens that it hasn't.
        """
        ...


class NoisyReference(Reference, Protocol):
    """A reference that can also round as a server does."""

    def score_rounded(
        self, prompts: Sequence[Prompt], dtype: str, progress: Progress
    ) -> list[Scored] | None:
        """The same in a server's number type, to measure its rounding; None if it cannot.

        Args:
            dtype: `bfloat16`, `float16`, `float8`, `int8`, `nvfp4`.
        """
        ...
