"""Fields of requests: their types and ranges, and what is refused."""

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

from expertlane.server.errors import ApiError, bad_field
from expertlane.spec.files import strict_json
from expertlane.spec.ranges import RANGES, shown
from expertlane.text.chat_template import OWN_VARIABLES

MOST_STOPS = 64
_MOST_BIASES = 1024


def number(name: str, low: float | None = None) -> Any:
    """The range of a field, as pydantic has it."""
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
    if texts is not None and not (is_list and all(isinstance(t, str) and t for t in texts)):
        raise _refuse(value, f"a text, or at most {MOST_STOPS} of them, none empty")
    return texts


def _take_bias(value: dict[str, float]) -> dict[str, float]:
    if len(value) > _MOST_BIASES:
        raise _refuse(len(value), f"at most {_MOST_BIASES} tokens")
    for token_id in value:
        if RANGES["stop_token_ids"].parse(token_id) is None:
            raise _refuse(token_id, "a token id in every key")
    return value


def _take_variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(OWN_VARIABLES & value.keys()):
        raise _refuse(name, "another name: the template is given this one anyway")
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_prompt(value: object) -> bool:
    is_tokens = isinstance(value, list) and bool(value) and all(map(_is_token, value))
    return is_tokens or isinstance(value, str)


def _take_prompts(value: Any) -> Any:
    """A text, token ids, or a list of either, as a list."""
    several = [value] if _is_prompt(value) else value
    if not isinstance(several, list) or not several or not all(map(_is_prompt, several)):
        raise _refuse(value, "a text, a list of token ids, or a list of either; nothing empty")
    return several


_TEXT = {"type": "string"}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP_SCHEMA = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        _TOKENS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
Stop = Annotated[list[str] | None, BeforeValidator(_take_stop), WithJsonSchema(_STOP_SCHEMA)]
Prompts = Annotated[Any, BeforeValidator(_take_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_take_variables)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_take_bias)]


class Strict(BaseModel):
    """An object without unknown fields or values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Known(Strict):
    """A request, of which some fields may only have values without effect."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    model: str | None = None

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
    """Whether it is null or one of them; Python's True equals 1, JSON's does not."""
    same = (each for each in neutral if isinstance(value, bool) == isinstance(each, bool))
    return value is None or value in same


def _unsupported(name: str, value: object, neutral: Iterable[Any]) -> ApiError:
    valid = " or ".join(["null", *(strict_json(each) for each in neutral)])
    text = f"{name} is {shown(value)}, which is not supported; valid: {valid}"
    return bad_field(name, text, "unsupported_parameter")
