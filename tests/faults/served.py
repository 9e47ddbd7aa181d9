"""What the requests of a case are, and what became of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertlane.spec.sampling import SamplingParams

NUM_REQUESTS = 12
_KINDS = (
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 20, "frequency_penalty": 0.4},
)


@dataclass
class Served:
    """What became of the requests of a run.

    Attributes:
        tokens: by request, in order.
        gaps: by request, between the likeliest two log-probabilities, at each token; where greedy.
        arrivals_s: by request, when its tokens came.
        places: by request, its (replica, data-parallel rank) at each token; where that is known.
        reasons: by request, why it ended.
    """

    tokens: list[list[int]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)
    arrivals_s: list[list[float]] = field(default_factory=list)
    places: list[list[tuple[int, int]]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def requests(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and parameters, greedy and seeded; the same each time."""
    random, found = np.random.default_rng(4), []
    for number in range(NUM_REQUESTS):
        prompt = random.integers(vocab_size, size=int(random.integers(1, 24))).tolist()
        kind: dict[str, Any] = _KINDS[number % len(_KINDS)]
        most = int(random.integers(20, 40))
        params = SamplingParams(seed=number, max_tokens=most, ignore_eos=True, **kind)
        found.append((prompt, params))
    return found
