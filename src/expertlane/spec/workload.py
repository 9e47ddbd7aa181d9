"""What is to be generated: sequences, prompt and output lengths, and the seed of the prompts."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError
from expertlane.spec.model import ModelConfig


@dataclass(frozen=True)
class Workload:
    """`num_sequences` prompts of `prompt_len` tokens, each continued by `output_len` tokens.

    Raises:
        SpecError: a count is under 1, or the seed is no unsigned 64-bit number.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    num_sequences: int
    prompt_len: int
    output_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_sequences", "prompt_len", "output_len"):
            if getattr(self, name) < 1:
                raise SpecError(f"workload: {name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.seed < 2**64:
            raise SpecError(f"workload: seed is {self.seed}; it must be 0 to 2**64 - 1")

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

    def prompt_token_ids(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """The prompts, drawn uniformly from the vocabulary: [num_sequences, prompt_len]."""
        generator = np.random.Generator(np.random.Philox(key=self.seed))
        return generator.integers(0, vocab_size, size=(self.num_sequences, self.prompt_len))
