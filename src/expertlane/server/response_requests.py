"""The body of `/v1/responses`, and the chat that it asks for."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from expertlane.server.errors import ApiError, bad_field, validated
from expertlane.server.fields import (
    MOST_PARTS,
    CalledFunction,
    Function,
    Known,
    Name,
    Schema,
    Strict,
    TemplateVariables,
    Text,
    number,
)
from expertlane.server.requests import MOST_TOOLS, ChatRequest, Effort, SampledRequest, Verbosity

LOGPROBS = "message.output_text.logprobs"  # a value of `include`
_MOST_LOGPROBS = 2**16  # log-probabilities of a part of an earlier answer
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}  # by field of a chat request: field of a response request
_STATUS = ("in_progress", "completed", "incomplete")


class ContentPart(Known):
    """A text that is a part of a message, given or from an answer."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "model": ()}
    type: Literal["input_text", "output_text", "text"]
    text: Text
    logprobs: list[Any] | None = Field(
        default=None, max_length=_MOST_LOGPROBS
    )  # as answers have them


Parts = Annotated[list[ContentPart], Field(max_length=MOST_PARTS, fail_fast=True)]


class _Item(Known):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "status": _STATUS,
        "namespace": (),
        "caller": (),
        "phase": (),
        "model": (),
    }
    id: Name | None = None


class MessageItem(_Item):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts

    def into(self, messages: "_Messages") -> None:
        """Add it to a chat."""
        parts = self.content
        content: Any = parts
        if not isinstance(parts, str):
            content = [{"type": "text", "text": part.text} for part in parts]
        if self.role == "assistant":
            messages.of_assistant("content", content)
        else:
            messages.add({"role": self.role, "content": content})


class ReasoningText(Strict):
    """A part of a model's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


ReasoningTexts = Annotated[list[ReasoningText], Field(max_length=MOST_PARTS, fail_fast=True)]


class ReasoningItem(_Item):
    """The model's reasoning before an earlier answer."""

    neutral = dict(_Item.neutral) | {"encrypted_content": ()}
    type: Literal["reasoning"]
    summary: ReasoningTexts | None = None
    content: ReasoningTexts | None = None

    def into(self, messages: "_Messages") -> None:
        """Add it to a chat."""
        text = "".join(part.text for part in self.content or self.summary or ())
        if text:
            messages.of_assistant("reasoning_content", text)


class CallItem(_Item):
    """A tool call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text

    def into(self, messages: "_Messages") -> None:
        """Add it to a chat."""
        function = CalledFunction(name=self.name, arguments=self.arguments).model_dump()
        messages.of_assistant("tool_calls", {"id": self.call_id, "function": function})


class CallOutputItem(_Item):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Text | Parts

    def into(self, messages: "_Messages") -> None:
        """Add it to a chat."""
        parts = self.output
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        messages.add({"role": "tool", "tool_call_id": self.call_id, "content": text})


class _Messages:
    """A chat as it grows: what one turn of the model said is one message."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, message: dict[str, Any]) -> None:
        self.found.append(message)

    def of_assistant(self, name: str, value: Any) -> None:
        last = self.found[-1] if self.found else {}
        # A turn is reasoning, then text, then calls.
        order = ("reasoning_content", "content", "tool_calls")
        later = order[order.index(name) + (name == "tool_calls") :]
        if last.get("role") != "assistant" or any(each in last for each in later):
            last = {"role": "assistant"}
            self.found.append(last)
        if name == "tool_calls":
            last.setdefault(name, []).append(value)
        else:
            last[name] = value


Item = MessageItem | ReasoningItem | CallItem | CallOutputItem


class ResponseTool(Function):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]

    def for_chat(self) -> dict[str, Any]:
        """The tool in the form of `/v1/chat/completions`."""
        return {"type": self.type, "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedTool(Strict):
    """The function that the model has to call."""

    type: Literal["function"]
    name: Name


class TextFormat(Known):
    """The form of the answer: any text, a JSON object, or JSON that fits a schema."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"model": ()}
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """The format in the form of `/v1/chat/completions`."""
        schema = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": self.type} | ({"json_schema": schema} if schema else {})


class TextOptions(Known):
    """The form and the verbosity of the answer's text."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"model": ()}
    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(Known):
    """How much the model reasons before it answers."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "generate_summary": (),
        "model": (),
        "summary": (),
    }
    effort: Effort | None = None


class ResponsesRequest(SampledRequest):
    """The body of `/v1/responses`: a conversation to begin or to continue."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: int | None = number("max_tokens")
    previous_response_id: Name | None = None
    store: bool | None = None
    # Reasoning is given, and taken back, as text: there is nothing to encrypt.
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        Field(default=None, max_length=8)
    )
    top_logprobs: int | None = number("logprobs")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if self.input == "":
            raise bad_field("input", "input is empty; give a text or a list of items")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for, by `include` or `top_logprobs`."""
        return LOGPROBS in (self.include or ()) or self.top_logprobs is not None

    @property
    def effort(self) -> str | None:
        """The effort of reasoning that is asked for."""
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def format_of_text(self) -> dict[str, Any]:
        """The format of the answer's text, as it was given."""
        if self.text is None or self.text.format is None:
            return {"type": "text"}
        return self.text.format.model_dump(by_alias=True, exclude_none=True)

    def messages(self) -> list[dict[str, Any]]:
        """The messages that `input` adds to the chat, without instructions."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages = _Messages()
        for item in self.input:
            item.into(messages)
        return messages.found

    def as_chat(self, before: Iterable[dict[str, Any]]) -> ChatRequest:
        """The chat that is to be continued.

        Args:
            before: messages of the previous response and what led to it.

        Raises:
            ApiError: it is none, by the rules of chats.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        common = SampledRequest.model_fields.keys() & self.model_fields_set
        choice: Any = self.tool_choice
        if isinstance(choice, NamedTool):
            choice = {"type": choice.type, "function": {"name": choice.name}}
        given = {name: getattr(self, name) for name in common} | {
            "messages": [*system, *before, *self.messages()],
            "max_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
            "response_format": None
            if self.text is None or self.text.format is None
            else self.text.format.for_chat(),
            "reasoning_effort": self.effort,
            "verbosity": None if self.text is None else self.text.verbosity,
            "tools": None if self.tools is None else [tool.for_chat() for tool in self.tools],
            "tool_choice": choice if self.tools or choice != "auto" else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        try:
            return validated(ChatRequest, given)
        except ApiError as error:
            raise renamed(error) from None


def renamed(error: ApiError) -> ApiError:
    """An error of a chat, with this API's names of fields."""
    message, param = str(error), error.param
    for theirs, ours in _NAMES.items():
        message = message.replace(theirs, ours)
        param = ours if param is not None and param.startswith(theirs) else param
    if param is not None and param.startswith("tools"):
        param, message = param.replace(".function", ""), message.replace(".function", "")
    return ApiError(
        error.status, message, param=param, code=error.code, retry_after_s=error.retry_after_s
    )
