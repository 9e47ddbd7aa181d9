"""How the tokens of a request are chosen, and what is told of a chosen token."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError

_MAX_LOGPROBS = 20


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
        seed: equal seeds draw equally; None for a seed of the engine's choice.
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
        self._take_number("temperature", "a finite number, 0 or more", lambda t: t >= 0)
        self._take_number("top_p", "above 0 and at most 1", lambda p: 0 < p <= 1)
        self._take_number("min_p", "0 to 1", lambda p: 0 <= p <= 1)
        self._take_number("repetition_penalty", "a finite number above 0", lambda r: r > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            self._take_number(name, "-2 to 2", lambda penalty: -2 <= penalty <= 2)
        self._take_whole("top_k", "0 or more", lambda k: k >= 0)
        self._take_whole("max_tokens", "1 or more", lambda n: n >= 1)
        if self.seed is not None:
            self._take_whole("seed", "0 to 2**64 - 1", lambda seed: 0 <= seed < 2**64)
        if self.logprobs is not None:
            valid = f"0 to {_MAX_LOGPROBS}"
            self._take_whole("logprobs", valid, lambda n: 0 <= n <= _MAX_LOGPROBS)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", stop)
        self._take_list("stop", "strings, none empty", _is_text)
        self._take_list(
            "stop_token_ids", "whole numbers, 0 or more", lambda i: _is_whole(i) and i >= 0
        )
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
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

    def _take_number(self, name: str, valid: str, is_valid: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = _finite(value)
        if number is None or not is_valid(number):
            raise _refusal(name, "is", value, valid)
        object.__setattr__(self, name, number)

    def _take_whole(self, name: str, valid: str, is_valid: Callable[[int], bool]) -> None:
        value = getattr(self, name)
        if not _is_whole(value) or not is_valid(value):
            raise _refusal(name, "is", value, f"a whole number, {valid}")
        object.__setattr__(self, name, int(value))

    def _take_list(self, name: str, valid: str, is_valid: Callable[[Any], bool]) -> None:
        values = getattr(self, name)
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise _refusal(name, "is", values, f"a list of {valid}")
        values = tuple(values)
        for value in values:
            if not is_valid(value):
                raise _refusal(name, "holds", value, f"a list of {valid}")
        object.__setattr__(self, name, values)


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


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _finite(value: object) -> float | None:
    """`value` as a finite number, or None if it is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _refusal(name: str, verb: str, value: object, valid: str) -> UserError:
    shown = value.item() if isinstance(value, np.generic) else value
    return UserError(f"sampling: {name} {verb} {shown!r}; it must be {valid}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""
