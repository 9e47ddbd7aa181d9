"""Log-probabilities of a prompt's tokens, in arrays: a prompt may have 100,000."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from expertlane.spec.sampling import TokenLogprobs


@dataclass(frozen=True, eq=False)
class PromptPart:
    """Consecutive tokens of a prompt, as a step gives them.

    Attributes:
        start: place of the first one in the prompt.
        logprobs: [num_tokens] float32.
        ranks: [num_tokens] int32; 1 for the likeliest of the vocabulary.
        top_ids, top_logprobs: [num_tokens, num_top] int32 and float32; the likeliest tokens.
    """

    start: int
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """[prompt_len]; log-probability of every token given those before it, None for the first.

    Args:
        token_ids: [prompt_len].
        num_top: likeliest tokens reported for each.

    Attributes:
        ranks: [prompt_len]; 1 for the likeliest of the vocabulary, 0 where it is not known yet.
    """

    def __init__(self, token_ids: Sequence[int], num_top: int) -> None:
        size = len(token_ids)
        self._token_ids = token_ids
        self._logprobs = np.full(size, np.nan, dtype=np.float32)
        self.ranks = np.zeros(size, dtype=np.int32)
        self._top_ids = np.zeros((size, num_top), dtype=np.int32)
        self._top_logprobs = np.full((size, num_top), np.nan, dtype=np.float32)

    def add(self, part: PromptPart) -> None:
        """Take some tokens in; those of a step that runs again come again."""
        places = slice(part.start, part.start + len(part.logprobs))
        self._logprobs[places] = part.logprobs
        self.ranks[places] = part.ranks
        self._top_ids[places] = part.top_ids
        self._top_logprobs[places] = part.top_logprobs

    def whole(self) -> PromptPart:
        """All parts as one, in the form that `add` takes."""
        return PromptPart(0, self._logprobs, self.ranks, self._top_ids, self._top_logprobs)

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenLogprobs | None]: ...
    def __getitem__(self, place: int | slice) -> TokenLogprobs | list[TokenLogprobs | None] | None:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place == 0:
            return None
        top = zip(self._top_ids[place].tolist(), self._top_logprobs[place].tolist(), strict=True)
        return TokenLogprobs(self._token_ids[place], float(self._logprobs[place]), tuple(top))
