"""How the tokens of a request are chosen, and what is reported of a chosen token."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.ranges import shown, take_fields


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    Each token is chosen in this order: penalties, temperature, top-k, top-p, min-p, draw. Tokens
    as likely as the last one that top-k or top-p keeps are kept too.

    Attributes:
        temperature: 0 takes the likeliest token (the lowest id of equals).
        top_k: draw from the `top_k` likeliest tokens; 0 for all.
        top_p: draw from the fewest likeliest tokens that hold this share of the probability.
        min_p: draw from tokens at least this share as likely as the likeliest.
        repetition_penalty: divides positive logits and multiplies negative ones of tokens in the
            prompt or the output.
        presence_penalty: taken off the logits of tokens in the output.
        frequency_penalty: the same, once for each time a token is in the output.
        seed: reproducible for equal seeds; None for a seed of the engine's choice.
        max_tokens: output tokens at most.
        stop: strings that end the output and are no part of it; one string or a list.
        stop_token_ids: tokens that end the output, besides the end-of-sequence tokens.
        ignore_eos: end-of-sequence tokens do not end the output.
        logprobs: report the log-probability of each chosen token and of this many likeliest ones;
            0 for the chosen token only, None for none. They are of the model's own distribution,
            the log-softmax of the logits before penalties, temperature and filters.

    Raises:
        UserError: a value is not valid.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", stop)
        self._take_list("stop", "strings, none empty")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _refusal("stop", "holds", text, "a string, not empty")
        self._take_list("stop_token_ids", "whole numbers")
        take_fields(self, "sampling: {}".format)
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", "is", self.ignore_eos, "true or false")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, after penalties."""
        return self.temperature == 0

    @property
    def counts_output(self) -> bool:
        """Whether it matters how often a token is in the output."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_logits(self) -> bool:
        """Whether more is needed than the argmax of the model's logits."""
        return (
            not self.is_greedy
            or self.repetition_penalty != 1
            or self.counts_output
            or self.logprobs is not None
        )

    def _take_list(self, name: str, items: str) -> None:
        values = getattr(self, name)
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise _refusal(name, "is", values, f"a list of {items}")
        object.__setattr__(self, name, tuple(values))


@dataclass(frozen=True, eq=False)
class SamplingState:
    """What a rank is told of a request when it is admitted, again after a preemption too.

    Attributes:
        seed: the request's own, or the one chosen for it.
        prompt_token_ids: [prompt_len].
        output_token_ids: [num_output_tokens]; generated before.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: npt.NDArray[np.int64]
    output_token_ids: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a chosen token, and of the likeliest ones.

    Attributes:
        top: (token id, log-probability), the likeliest first, the lowest id of equals first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def _refusal(name: str, verb: str, value: object, valid: str) -> UserError:
    return UserError(f"sampling: {name} {verb} {shown(value)}; it must be {valid}")
