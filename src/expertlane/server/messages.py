"""Messages of a chat, and the tools that a model may call."""

from json import JSONDecodeError
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from expertlane.errors import UserError
from expertlane.server.errors import bad_field
from expertlane.server.fields import MOST_PARTS, AnyObject, Known, Name, Strict, Text
from expertlane.spec.files import parse_json

MOST_CALLS = 1024  # calls in a message


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """What a model has called, with its arguments as JSON."""

    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call that an answer held."""

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
    """A tool that a model may call."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None  # whether arguments are held to the parameters


class NamedFunction(Strict):
    """The tool that has to be called."""

    name: Name


class NamedTool(Strict):
    """The same, as a request has it."""

    type: Literal["function"]
    function: NamedFunction


class Tool(Strict):
    """The same, as a request has it."""

    type: Literal["function"]
    function: Function
