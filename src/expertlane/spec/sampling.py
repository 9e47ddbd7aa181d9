"""Sampling parameters, output constraints, log-probabilities.

Sizes of constraints are bounded, since a server compiles what a client sends.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.ranges import shown, take, take_fields, take_flag

KIB = 1024
MOST_SCHEMA_CHARACTERS = 256 * KIB
MOST_CHOICE_CHARACTERS = 64 * KIB
MOST_GRAMMAR_CHARACTERS = 8 * KIB  # compiling can take the cube of it
MOST_REGEX_CHARACTERS = 16 * KIB
MOST_LITERAL_CHARACTERS = 16 * KIB  # each mask takes a time in proportion to a text's length
MOST_CHOICE_TEXTS = 4096
MOST_DEPTH = 64  # of lists and objects in a schema
MOST_PROPERTIES = 1000  # in a schema; compiling takes the square of them


@dataclass(frozen=True)
class Structured:
    """A constraint on an output; exactly one of the first four fields is given.

    Attributes:
        json_schema: schema of a JSON value, as an object, a boolean or JSON text; kept as text.
        regex: expression that the whole output matches, in the syntax of Rust's `regex` crate.
        grammar: in llguidance's Lark syntax, or in GBNF (`root ::= …`).
        choice: texts, of which the output is one.
        lead: text that comes before it, such as reasoning, of any kind up to this end; None where
            there is none.
        may_lead: the beginning of such a text, where the output may have one or not; None where it
            has one anyway.
        prefix: text that stands before the constrained part.
        is_of_schemas: the grammar is this program's own, made of schemas, and may be as large.
        compact: JSON of the schema has no white space but within texts.

    Raises:
        UserError: none or several are given, or one is too large or of a wrong type; or `compact`
            without a schema.
    """

    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    lead: str | None = None
    may_lead: str | None = None
    prefix: str = ""
    is_of_schemas: bool = False
    compact: bool = False

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(KINDS)
            raise UserError(f"structured: {len(given)} of {names} are given; give one")
        (kind,) = given
        take_flag("is_of_schemas", self.is_of_schemas)
        if take_flag("compact", self.compact) and kind != "json_schema":
            raise UserError(f"structured: compact is for json_schema; {kind} is given")
        for name in ("lead", "may_lead", "prefix"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "prefix"):
                raise UserError(f"{name} is {shown(text)}; it must be a text")
        value = getattr(self, kind)
        if kind == "json_schema":
            object.__setattr__(self, kind, _schema_text(value))
        elif kind == "choice":
            object.__setattr__(self, kind, _choices(value))
        else:
            most = MOST_REGEX_CHARACTERS if kind == "regex" else MOST_GRAMMAR_CHARACTERS
            most = MOST_SCHEMA_CHARACTERS if self.is_of_schemas else most
            if not isinstance(value, str) or not value:
                raise UserError(f"{kind} is {shown(value)}; it must be a text, not empty")
            _check_size(kind, value, most)

    @property
    def kind(self) -> str:
        """The name of the constraint that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)


_NOTES = ("title", "description", "$comment")
KINDS = ("json_schema", "regex", "grammar", "choice")


def _check_size(kind: str, text: str, most: int) -> None:
    if len(text) > most:
        raise UserError(f"{kind} has {len(text):,} characters; at most {most:,} are taken")
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise UserError(f"{kind} holds half a surrogate pair; give valid Unicode")


def _schema_text(value: Any) -> str:
    if isinstance(value, str):
        _check_size("json_schema", value, MOST_SCHEMA_CHARACTERS)
        try:
            value = parse_json(value)
        except (UserError, ValueError) as error:
            raise UserError(f"json_schema is no JSON: {error}") from None
    if not isinstance(value, Mapping | bool):
        raise UserError(f"json_schema is {shown(value)}; it must be an object or a boolean")
    num_properties = 0
    for depth, each in _inner(value):
        if depth > MOST_DEPTH:
            raise UserError(f"json_schema is nested more than {MOST_DEPTH} deep")
        properties = each.get("properties") if isinstance(each, Mapping) else None
        num_properties += len(properties) if isinstance(properties, Mapping) else 0
        longest = max(map(len, _literals(each)), default=0)
        if longest > MOST_LITERAL_CHARACTERS:
            raise UserError(
                f"json_schema holds a text of {longest:,} characters; at most "
                f"{MOST_LITERAL_CHARACTERS:,} are taken"
            )
    if num_properties > MOST_PROPERTIES:
        raise UserError(
            f"json_schema has {num_properties:,} properties; at most {MOST_PROPERTIES:,} are taken"
        )
    try:
        text = strict_json(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UserError(f"json_schema is no JSON: {error}") from None
    _check_size("json_schema", text, MOST_SCHEMA_CHARACTERS)
    return text


def _inner(value: Any) -> Iterator[tuple[int, Any]]:
    """Each list and object with its depth, from the outside."""
    found = [(value, 1)]
    while found:
        each, depth = found.pop()
        inner: Iterable[Any] = ()
        if isinstance(each, Mapping):
            inner = each.values()
        elif isinstance(each, list | tuple):
            inner = each
        else:
            continue
        yield depth, each
        found += [(part, depth + 1) for part in inner]


def _literals(value: Any) -> Iterator[str]:
    """Texts right in a list or an object that outputs may have to hold."""
    if isinstance(value, Mapping):
        yield from (key for key in value if isinstance(key, str))
        value = [each for key, each in value.items() if key not in _NOTES]
    yield from (each for each in value if isinstance(each, str))


def _choices(value: Any) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(each, str) for each in texts):
        raise UserError(f"choice is {shown(value)}; it must be a list of texts, not empty")
    if len(texts) > MOST_CHOICE_TEXTS:
        raise UserError(
            f"choice holds {len(texts):,} texts; at most {MOST_CHOICE_TEXTS:,} are taken"
        )
    _check_size("choice", "".join(texts), MOST_CHOICE_CHARACTERS)
    return texts


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
