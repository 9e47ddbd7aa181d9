"""What is put on a server: requests with random lengths, all at once or as they arrive."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        batch: requests kept unfinished; None in an open loop.
        rate: requests that arrive a second, on average; None in a closed loop.
    """

    num_requests: int
    prompt_len: LengthRange
    output_len: LengthRange
    batch: int | None = None
    rate: float | None = None

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


def draw_requests(load: Load, vocab_size: int, seed: Sequence[int]) -> list[TimedRequest]:
    """Random prompts, lengths and, in an open loop, arrivals; the first is due at once.

    Args:
        seed: equal ones give equal requests.
    """
    generator = np.random.default_rng(seed)
    size = load.num_requests
    prompt_lens = generator.integers(load.prompt_len.low, load.prompt_len.high + 1, size)
    output_lens = generator.integers(load.output_len.low, load.output_len.high + 1, size)
    due_s = np.zeros(size)
    if load.rate is not None:
        due_s[1:] = np.cumsum(generator.exponential(1 / load.rate, size - 1))
    return [
        TimedRequest(generator.integers(vocab_size, size=prompt_len).tolist(), output_len, due)
        for prompt_len, output_len, due in zip(
            prompt_lens.tolist(), output_lens.tolist(), due_s.tolist(), strict=True
        )
    ]
