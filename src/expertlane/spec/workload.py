"""What is to be generated: sequences, prompt and output lengths, and the seed of the prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError, UserError
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import MAX_TOKENS_OF_A_RUN, Strict, take, take_fields


@dataclass(frozen=True)
class Workload(Strict):
    """`num_sequences` prompts of `prompt_len` tokens, each continued by `output_len` tokens.

    Raises:
        SpecError: a number is out of its range.
    """

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

    @property
    def mean_context(self) -> int:
        """Positions cached before a decode step, on average."""
        return self.prompt_len + (self.output_len - 1) // 2

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


@dataclass(frozen=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly; both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Load:
    """What is put on the engine.

    Attributes:
        batch: concurrency; None in an open loop.
        rate: requests that arrive a second, on average; None in a closed loop.

    Raises:
        UserError: a number or the sum of all tokens is out of its range.
    """

    num_requests: int
    prompt_len: LengthRange
    output_len: LengthRange
    batch: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        take("num_requests", self.num_requests)
        for name, value in (("batch", self.batch), ("rate", self.rate)):
            if value is not None:
                take(name, value)
        for name, lengths in (("prompt_len", self.prompt_len), ("output_len", self.output_len)):
            if take(name, lengths.low) > take(name, lengths.high):
                raise UserError(f"{name} is {lengths}; the first end must be the lower one")
        num_tokens = self.num_requests * (self.prompt_len.high + self.output_len.high)
        if num_tokens > MAX_TOKENS_OF_A_RUN:
            raise UserError(
                f"{self.num_requests:,} requests with prompts of {self.prompt_len} and outputs of "
                f"{self.output_len} tokens may be {num_tokens:,} in all; a run holds at most "
                f"{MAX_TOKENS_OF_A_RUN:,}"
            )

    @property
    def max_len(self) -> int:
        """Positions of the longest sequence; its last token is not fed back."""
        return self.prompt_len.high + self.output_len.high - 1

    def __str__(self) -> str:
        return f"{self.rate:g} req/s" if self.batch is None else f"batch {self.batch}"


@dataclass(frozen=True, eq=False)
class TimedRequest:
    """A request to come.

    Attributes:
        due_s: from the start; 0 in a closed loop, where it is due as soon as there is room.
    """

    prompt_token_ids: list[int]
    output_len: int
    due_s: float


def check_lengths(load: Load, max_positions: int) -> None:
    """Check that all requests of a load can have their whole output.

    Args:
        max_positions: that a sequence can take.

    Raises:
        UserError: the longest ones cannot.
    """
    num_positions = load.max_len
    if num_positions > max_positions:
        raise UserError(
            f"prompts of {load.prompt_len.high} and outputs of {load.output_len.high} tokens take "
            f"{num_positions} positions; valid: {max_positions} at most"
        )


def draw_requests(
    load: Load, vocab_size: int, seed: Sequence[int], *, blank: bool = False
) -> list[TimedRequest]:
    """Random prompts, lengths and, in an open loop, arrivals; the first is due at once.

    Args:
        seed: equal ones give equal requests.
        blank: prompts that nobody reads; lengths and arrivals are the same.
    """
    generator = np.random.default_rng(seed)
    size = load.num_requests
    prompt_lens = generator.integers(load.prompt_len.low, load.prompt_len.high + 1, size)
    output_lens = generator.integers(load.output_len.low, load.output_len.high + 1, size)
    due_s = np.zeros(size)
    if load.rate is not None:
        due_s[1:] = np.cumsum(generator.exponential(1 / load.rate, size - 1))

    def prompt(length: int) -> list[int]:
        return [0] * length if blank else generator.integers(vocab_size, size=length).tolist()

    return [
        TimedRequest(prompt(prompt_len), output_len, due)
        for prompt_len, output_len, due in zip(
            prompt_lens.tolist(), output_lens.tolist(), due_s.tolist(), strict=True
        )
    ]
