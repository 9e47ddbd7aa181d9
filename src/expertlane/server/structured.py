"""Fields for structured output, under all the names that clients use."""

from typing import Annotated, Any, Literal

from pydantic import Field

from expertlane.errors import UserError
from expertlane.server.errors import bad_field
from expertlane.server.fields import AnyObject, Known, Strict, Text
from expertlane.spec.sampling import (
    MOST_CHOICE_CHARACTERS,
    MOST_CHOICES,
    MOST_GRAMMAR_CHARACTERS,
    MOST_REGEX_CHARACTERS,
    MOST_SCHEMA_CHARACTERS,
    Structured,
)

_ANY_OBJECT = {"type": "object"}
Schema = AnyObject | bool
_SchemaText = Annotated[str, Field(max_length=MOST_SCHEMA_CHARACTERS)]
_Regex = Annotated[str, Field(max_length=MOST_REGEX_CHARACTERS)]
_Grammar = Annotated[str, Field(max_length=MOST_GRAMMAR_CHARACTERS)]
_Choice = Annotated[
    list[Annotated[str, Field(max_length=MOST_CHOICE_CHARACTERS)]],
    Field(max_length=MOST_CHOICES, fail_fast=True),
]


class JsonSchema(Strict):
    """A schema by name, as the API has it. `strict` changes nothing: all are held to it."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: Text | None = None
    strict: bool | None = None
    schema_: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(Strict):
    """What the API has for it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """What vLLM has for it; one of them."""

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


class StructuredRequest(Known):
    """A request whose output may have to be something."""

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
            ("guided_json", {"json_schema": self.guided_json}),
            ("guided_regex", {"regex": self.guided_regex}),
            ("guided_choice", {"choice": self.guided_choice}),
            ("guided_grammar", {"grammar": self.guided_grammar}),
            ("regex", {"regex": self.regex}),
            ("grammar", {"grammar": self.grammar}),
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
