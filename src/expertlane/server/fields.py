"""Types of request fields: their ranges, JSON schemas and errors."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from expertlane.server.bodies import MOST_BODY_BYTES, MOST_VALUES
from expertlane.server.errors import ApiError, bad_field
from expertlane.spec.files import strict_json
from expertlane.spec.ranges import RANGES, shown
from expertlane.text.chat_template import OWN_VARIABLES

MOST_STOPS = 64
MOST_PROMPTS = 2048  # prompts of a request, times its choices
MOST_TOKEN_IDS = 2**31
MOST_STOP_CHARACTERS = 4096  # of each stop text
_MOST_BIASES = 1024
_MOST_NAME = 512  # characters of a name
_MOST_FIELDS = 128  # fields of an object whose fields are known
MOST_PARTS = 4096  # messages of a chat, parts of a message, and the like
_MOST_VARIABLES = 64  # variables of a template
_MOST_OF_OBJECT = 4096  # keys of an object that is any JSON, at its top
_MOST_METADATA = 16
_MOST_METADATA_CHARACTERS = 16 * 2**10  # as JSON


def number(name: str, low: float | None = None) -> Any:
    """A pydantic field with the valid range of a setting."""
    allowed = RANGES[name]
    least = allowed.low if low is None else low
    if allowed.is_above:
        return Field(default=None, gt=least, le=allowed.high)
    return Field(default=None, ge=least, le=allowed.high)


def _refuse(value: object, valid: str) -> PydanticCustomError:
    text = "it is {value}; it must be {valid}"
    return PydanticCustomError("invalid_value", text, {"value": shown(value), "valid": valid})


def _take_stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if texts is not None and not (is_list and all(map(_is_stop, texts))):
        valid = f"a text, or at most {MOST_STOPS} of them, each of 1 to {MOST_STOP_CHARACTERS:,}"
        raise _refuse(value, f"{valid} characters")
    return texts


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_STOP_CHARACTERS


def _take_bias(value: dict[str, float]) -> dict[str, float]:
    for token_id in value:
        if RANGES["stop_token_ids"].parse(token_id) is None:
            raise _refuse(token_id, "a token id in every key")
    return value


def _take_variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(OWN_VARIABLES & value.keys()):
        raise _refuse(name, "another name: the template is given this one anyway")
    return value


def _take_metadata(value: dict[str, Any]) -> dict[str, Any]:
    num_characters = sum(len(each) for each in value.values() if isinstance(each, str))
    most = _MOST_METADATA_CHARACTERS
    if num_characters > most or len(strict_json(value)) > most:
        raise _refuse(value, f"at most {_MOST_METADATA_CHARACTERS:,} characters of JSON")
    return value


def _are_tokens(value: object) -> bool:
    """Whether a value is a list of token ids; checks a million without a loop in Python."""
    if not isinstance(value, list) or set(map(type, value)) != {int}:
        return False
    return bool(min(value) >= 0 and max(value) < MOST_TOKEN_IDS)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or _are_tokens(value)


def _take_prompts(value: Any) -> Any:
    """A text, token ids, or a list of either, as a list."""
    several = [value] if _is_prompt(value) else value
    if not isinstance(several, list) or not several or not all(map(_is_prompt, several)):
        raise _refuse(value, "a text, a list of token ids, or a list of either; nothing empty")
    return several


def _list_schema(items: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


_TEXT = {"type": "string", "maxLength": MOST_BODY_BYTES}
_STOP = {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS}
_TOKEN = {"type": "integer", "minimum": 0, "maximum": MOST_TOKEN_IDS - 1}
_TOKENS = _list_schema(_TOKEN, MOST_VALUES)
_STOP_SCHEMA = {
    "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}, {"type": "null"}]
}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        _TOKENS,
        _list_schema(_TEXT, MOST_PROMPTS),
        _list_schema(_TOKENS, MOST_PROMPTS),
    ]
}
Stop = Annotated[list[str] | None, BeforeValidator(_take_stop), WithJsonSchema(_STOP_SCHEMA)]
Prompts = Annotated[Any, BeforeValidator(_take_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Text = Annotated[str, Field(max_length=MOST_BODY_BYTES)]
Name = Annotated[str, Field(max_length=_MOST_NAME)]
AnyObject = Annotated[dict[Name, Any], Field(max_length=_MOST_OF_OBJECT, fail_fast=True)]
Metadata = Annotated[
    dict[Name, Any], Field(max_length=_MOST_METADATA), AfterValidator(_take_metadata)
]
TemplateVariables = Annotated[
    dict[Name, Any], Field(max_length=_MOST_VARIABLES), AfterValidator(_take_variables)
]
TokenId = Annotated[int, Field(ge=0, lt=MOST_TOKEN_IDS)]


Bias = Annotated[
    dict[Name, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
    AfterValidator(_take_bias),
]


class Strict(BaseModel):
    """An object without unknown fields or values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound(cls, given: Any) -> Any:
        """Limit the number of fields, since each unknown one would be an error of its own."""
        if isinstance(given, dict) and len(given) > _MOST_FIELDS:
            raise bad_field(None, f"an object has {len(given):,} fields; at most {_MOST_FIELDS}")
        return given


class Known(Strict):
    """A request, of which some fields may only have values without effect."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    model: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = {}
        for name, value in given.items():
            if name not in cls.neutral:
                found[name] = value
            elif not _is_neutral(value, cls.neutral[name]):
                raise _unsupported(name, value, cls.neutral[name])
        return found


def _is_neutral(value: object, neutral: Iterable[Any]) -> bool:
    """Whether a value is null or among the neutral ones; JSON's true is not 1, as Python's is."""
    same = (each for each in neutral if isinstance(value, bool) == isinstance(each, bool))
    return value is None or value in same


def _unsupported(name: str, value: object, neutral: Iterable[Any]) -> ApiError:
    valid = " or ".join(["null", *(strict_json(each) for each in neutral)])
    text = f"{name} is {shown(value)}, which is not supported; valid: {valid}"
    return bad_field(name, text, "unsupported_parameter")
