"""What is to be generated: sequences, prompt and output lengths, and the seed of the prompts."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import MAX_TOKENS_OF_A_RUN, take_fields


@dataclass(frozen=True)
class Workload:
    """`num_sequences` prompts of `prompt_len` tokens, each continued by `output_len` tokens.

    Raises:
        SpecError: a number is out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    num_sequences: int
    prompt_len: int
    output_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        take_fields(self, "workload: {}".format)

    @property
    def max_len(self) -> int:
        """Positions a sequence takes: the last output token is never fed back."""
        return self.prompt_len + self.output_len - 1

    def check_model(self, model: ModelConfig) -> None:
        """Check that every sequence fits the model's positions.

        Raises:
            SpecError: prompt and output together pass `max_position_embeddings`.
        """
        limit = model.max_position_embeddings
        if self.max_len > limit:
            valid = (
                f"valid output_len with a prompt of one token: 1 to {limit}"
                if self.output_len > limit
                else f"valid prompt_len at this output_len: 1 to {limit - self.output_len + 1}"
            )
            raise SpecError(
                f"workload: a prompt of {self.prompt_len} and {self.output_len} output tokens take "
                f"{self.max_len} positions but {model.name} has {limit}; {valid}"
            )

    def check_size(self) -> None:
        """Check that its tokens can be held in memory.

        Raises:
            SpecError: they are too many.
        """
        num_tokens = self.num_sequences * (self.prompt_len + self.output_len)
        if num_tokens > MAX_TOKENS_OF_A_RUN:
            raise SpecError(
                f"workload: {self.num_sequences:,} sequences of {self.prompt_len:,} and "
                f"{self.output_len:,} tokens are {num_tokens:,} in all; a run holds at most "
                f"{MAX_TOKENS_OF_A_RUN:,}"
            )

    def prompt_token_ids(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """The prompts, drawn uniformly from the vocabulary: [num_sequences, prompt_len]."""
        generator = np.random.Generator(np.random.Philox(key=self.seed))
        return generator.integers(0, vocab_size, size=(self.num_sequences, self.prompt_len))
