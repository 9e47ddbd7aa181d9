"""Sampling parameters and log-probabilities of tokens."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.ranges import shown, take, take_fields
from expertlane.spec.structured import Structured

MOST_LISTED = 2**20  # stop strings, or token ids in a list


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request.

    Each token is chosen in this order: bias, penalties, `structured`, temperature, top-k, top-p,
    min-p, draw.
    Tokens as likely as the last one that top-k or top-p keeps are kept too.

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
        min_tokens: output tokens at least: before, no end-of-sequence or stop token is chosen, and
            stop strings are text like any other.
        logit_bias: (token id, what is added to its logit), each token once; a mapping too.
        logprobs: report the log-probability of each chosen token and of this many likeliest ones;
            0 for the chosen token only, None for none. They are of the model's own distribution,
            the log-softmax of the logits before penalties, temperature and filters.
        prompt_logprobs: the same of each token of the prompt but the first, which has none. Such a
            prompt is computed whole, whatever the prefix cache holds.
        structured: what the output must be. It ends when nothing can follow, whatever `ignore_eos`
            and `min_tokens` say; after `max_tokens` it may be cut off.
        skip_special_tokens: leave control tokens out of the text.
        shown_token_ids: control tokens that are in the text all the same.
        include_stop_str_in_output: the text ends with the stop string or token that ended it.

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
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: Structured | None = None
    skip_special_tokens: bool = True
    shown_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", stop)
        self._take_list("stop", "strings, none empty")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _refusal("stop", "holds", text, "a string, not empty")
        self._take_list("stop_token_ids", "whole numbers")
        self._take_list("shown_token_ids", "whole numbers")
        take_fields(self, "sampling: {}".format)
        if not isinstance(self.structured, Structured | None):
            raise _refusal("structured", "is", self.structured, "Structured, or nothing")
        if self.min_tokens > self.max_tokens:
            valid = f"at most max_tokens, {self.max_tokens}"
            raise _refusal("min_tokens", "is", self.min_tokens, valid)
        self._take_bias()

    def with_valid(self, **values: Any) -> Self:
        """A copy with these values, which are not checked; it shares all others.

        Checks take long where lists are long, and a request may have thousands of choices.
        """
        found = copy(self)
        for name, value in values.items():
            object.__setattr__(found, name, value)
        return found

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is taken, after penalties."""
        return self.temperature == 0

    @property
    def counts_output(self) -> bool:
        """True if a penalty depends on how often a token is in the output."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_logits(self) -> bool:
        """True if more is needed than the argmax of the model's logits."""
        return (
            not self.is_greedy
            or self.repetition_penalty != 1
            or self.counts_output
            or self.logprobs is not None
            or self.prompt_logprobs is not None
            or bool(self.logit_bias)
            or self.holds_stops
            or self.structured is not None
        )

    @property
    def holds_stops(self) -> bool:
        """True if tokens that end the output may not be chosen at first."""
        return self.min_tokens > 0 and not (self.ignore_eos and not self.stop_token_ids)

    def _take_list(self, name: str, items: str) -> None:
        values = getattr(self, name)
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise _refusal(name, "is", values, f"a list of {items}")
        taken = tuple(islice(values, MOST_LISTED + 1))
        if len(taken) > MOST_LISTED:
            raise UserError(f"sampling: {name} has more than {MOST_LISTED:,} {items}")
        object.__setattr__(self, name, taken)

    def _take_bias(self) -> None:
        given = self.logit_bias
        pairs = given.items() if isinstance(given, Mapping) else given
        try:
            by_token = {
                take("stop_token_ids", token, "sampling: a token of logit_bias"): take(
                    "bias", bias, "sampling: a number of logit_bias"
                )
                for token, bias in pairs
            }
        except (TypeError, ValueError):
            raise _refusal("logit_bias", "is", given, "pairs of a token id and a number") from None
        object.__setattr__(self, "logit_bias", tuple(by_token.items()))


@dataclass(frozen=True, eq=False)
class SamplingState:
    """A request's sampling state, sent to ranks when it is admitted, also after a preemption.

    Attributes:
        seed: the request's own, or the one chosen for it.
        prompt_token_ids: [prompt_len].
        output_token_ids: [num_output_tokens]; generated before.
        stop_token_ids: all tokens that end its output, where `min_tokens` holds them back.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: npt.NDArray[np.int64]
    output_token_ids: npt.NDArray[np.int64]
    stop_token_ids: tuple[int, ...] = ()

    @property
    def scores_prompt(self) -> bool:
        """True if log-probabilities of the prompt are asked for, and there is no output yet."""
        return self.params.prompt_logprobs is not None and not len(self.output_token_ids)


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
