"""Types of request fields: their ranges, JSON schemas and errors.

First single values, then the messages of a chat and its tools, then structured output under all
the names that clients use.
"""

from collections.abc import Iterable, Mapping
from json import JSONDecodeError
from typing import Annotated, Any, ClassVar, Literal, Self

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

from expertlane.errors import UserError
from expertlane.server.bodies import MOST_BODY_BYTES, MOST_VALUES
from expertlane.server.errors import ApiError, bad_field
from expertlane.spec.files import parse_json, strict_json
from expertlane.spec.ranges import RANGES, shown
from expertlane.spec.sampling import (
    MOST_CHOICE_CHARACTERS,
    MOST_CHOICE_TEXTS,
    MOST_GRAMMAR_CHARACTERS,
    MOST_REGEX_CHARACTERS,
    MOST_SCHEMA_CHARACTERS,
    Structured,
)
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


MOST_CALLS = 1024  # calls in a message


class TextPart(Strict):
    """A part of a message of type `text`."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """The name of the function that a model has called, and its arguments as JSON."""

    name: Name
    arguments: Text


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, ge=0, le=MOST_CALLS)

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates take it: its arguments parsed, if they are valid JSON."""
        try:
            arguments: Any = parse_json(self.function.arguments)
        except (UserError, JSONDecodeError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Known):
    """A message of a chat; the checkpoint's template says which roles it takes."""

    neutral = dict.fromkeys(("audio", "function_call", "refusal", "model"), ()) | {
        "annotations": ([],),
    }
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Text | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)] | None
    ) = None
    name: Name | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = (
        None
    )
    tool_call_id: Name | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise bad_field("messages", "messages: only role assistant has tool_calls")
        if self.content is None and not self.tool_calls:
            raise bad_field("messages", f"messages: a message of role {self.role} has no content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it; parts of text are joined by line ends."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        more = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
        }
        given = {name: value for name, value in more.items() if value is not None}
        return {"role": self.role, "content": text} | given


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None  # whether arguments are held to the parameters


class NamedFunction(Strict):
    """The name of the function that the model has to call."""

    name: Name


class NamedTool(Strict):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


_ANY_OBJECT = {"type": "object"}
Schema = AnyObject | bool
_SchemaText = Annotated[str, Field(max_length=MOST_SCHEMA_CHARACTERS)]
_Regex = Annotated[str, Field(max_length=MOST_REGEX_CHARACTERS)]
_Grammar = Annotated[str, Field(max_length=MOST_GRAMMAR_CHARACTERS)]
_Choice = Annotated[
    list[Annotated[str, Field(max_length=MOST_CHOICE_CHARACTERS)]],
    Field(max_length=MOST_CHOICE_TEXTS, fail_fast=True),
]


class JsonSchema(Strict):
    """A JSON schema for the output. `strict` changes nothing: every output fits the schema."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: Text | None = None
    strict: bool | None = None
    schema_: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(Strict):
    """The form of the output: any text, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """The form of the output, in vLLM's field; one of json, regex, choice, grammar, json_object."""

    json_: Schema | _SchemaText | None = Field(default=None, alias="json")
    regex: _Regex | None = None
    choice: _Choice | None = None
    grammar: _Grammar | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None  # there is one backend
    disable_any_whitespace: bool | None = None  # of the JSON of whichever field has the schema
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


_STRUCTURES = {  # by field that asks for one: the argument of `Structured`
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "grammar": "grammar",
}


class StructuredRequest(Known):
    """A request whose output may be held to a schema, a regex, a choice or a grammar."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | _SchemaText | None = None
    guided_regex: _Regex | None = None
    guided_choice: _Choice | None = None
    guided_grammar: _Grammar | None = None
    regex: _Regex | None = None
    grammar: _Grammar | None = None

    def structured(self) -> tuple[Structured | None, str]:
        """The structure of the output, and the field that asks for it.

        Raises:
            ApiError: several fields ask for one, or one is not valid.
        """
        found = self._asked()
        if len(found) > 1:
            first, second = (name for name, _ in found[:2])
            raise bad_field(second, f"{second} and {first} are both given; give one")
        if self._is_compact and not any("json_schema" in given for _, given in found):
            name = "structured_outputs.disable_any_whitespace"
            raise bad_field(name, f"{name} is for JSON, which no field asks for")
        if not found:
            return None, ""
        ((param, given),) = found
        try:
            return Structured(**given, compact=self._is_compact), param
        except UserError as error:
            raise bad_field(param, f"{param}: {error}") from None

    @property
    def _is_compact(self) -> bool:
        outputs = self.structured_outputs
        return outputs is not None and bool(outputs.disable_any_whitespace)

    def _asked(self) -> list[tuple[str, dict[str, Any]]]:
        """The fields that ask for a structure, each with its arguments of `Structured`."""
        pairs: list[tuple[str, dict[str, Any]]] = [
            (name, {kind: getattr(self, name)}) for name, kind in _STRUCTURES.items()
        ]
        if (outputs := self.structured_outputs) is not None:
            given = {
                "json_schema": _ANY_OBJECT if outputs.json_object else outputs.json_,
                "regex": outputs.regex,
                "choice": outputs.choice,
                "grammar": outputs.grammar,
            }
            given = {name: value for name, value in given.items() if value is not None}
            if outputs.json_object and outputs.json_ is not None:
                text = "structured_outputs: json and json_object are both given; give one"
                raise bad_field("structured_outputs", text)
            if not given and not self._is_compact:
                raise bad_field("structured_outputs", "structured_outputs is empty; give one")
            pairs.append(("structured_outputs", given))
        if (form := self.response_format) is not None:
            pairs.append(("response_format", {"json_schema": _schema_of(form)}))
        return [
            (name, given) for name, given in pairs if any(v is not None for v in given.values())
        ]


def _schema_of(form: ResponseFormat) -> Schema | None:
    """The JSON schema of a response format; None for any text."""
    if (form.type == "json_schema") != (form.json_schema is not None):
        text = "response_format: type json_schema needs json_schema, and other types take none"
        raise bad_field("response_format", text)
    if form.json_schema is not None:
        schema = form.json_schema.schema_
        return _ANY_OBJECT if schema is None else schema
    return _ANY_OBJECT if form.type == "json_object" else None
