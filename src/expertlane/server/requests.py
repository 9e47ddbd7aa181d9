"""Bodies of requests: all known fields, their valid values, and the engine's parameters of them.

A field that is neither here nor in a table of neutral values is refused by its name, as is a value
that would have an effect that this server lacks. `docs/http_api.md` says which clients were run.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from expertlane.server.bodies import MOST_VALUES
from expertlane.server.errors import bad_field
from expertlane.server.fields import (
    MOST_PARTS,
    MOST_PROMPTS,
    MOST_STOPS,
    Bias,
    Function,
    Known,
    Message,
    Metadata,
    Name,
    NamedTool,
    Prompts,
    Stop,
    Strict,
    StructuredRequest,
    TemplateVariables,
    Text,
    TokenId,
    Tool,
    number,
)
from expertlane.spec.sampling import SamplingParams

_AS_THEY_ARE = (  # fields that `SamplingParams` takes unchanged
    *("temperature", "top_p", "min_p", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
MOST_CHOICES = 128  # choices of a prompt
MOST_TOOLS = 128
_COMPLETION_TOKENS = 16  # by default, as in the API

# Fields of the API and of engines that speak it, with the values that change nothing here; null is
# always one. Others are refused: the field is not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_NEUTRAL_OF_COMPLETIONS = _NEUTRAL | {"suffix": ("",), "prompt_embeds": ()}
_NEUTRAL_OF_CHAT = _NEUTRAL | {
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


class StreamOptions(Strict):
    """Token counts to send in a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(StructuredRequest):
    """Fields of completions and chats."""

    temperature: float | None = number("temperature")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k", -1)  # -1 like 0: all tokens
    min_p: float | None = number("min_p")
    repetition_penalty: float | None = number("repetition_penalty")
    presence_penalty: float | None = number("presence_penalty")
    frequency_penalty: float | None = number("frequency_penalty")
    logit_bias: Bias | None = None
    seed: int | None = number("seed", -(2**63))
    min_tokens: int | None = number("min_tokens")
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MOST_STOPS
    )
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = number("priority")
    timeout_s: float | None = number("timeout_s")
    # Without effect, whatever they are.
    user: Name | None = None
    metadata: Metadata | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    request_id: Name | None = None

    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = number("max_tokens")
    prompt_logprobs: int | None = number("prompt_logprobs")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "stream_options is given, but stream is not true")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_field("prompt_logprobs", "prompt_logprobs is given, but stream is true")
        return self

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return self.n or 1

    @property
    def wanted_tokens(self) -> int | None:
        """Output tokens at most; None for as many as fit."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Likely tokens to report with each output token's log-probability; None for neither."""
        return None

    @property
    def drops_output(self) -> bool:
        """Whether only the prompt is evaluated, and no output token returned."""
        return False

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """Likely tokens to report with each prompt token's log-probability; None for neither."""
        return self.prompt_logprobs

    def seed_of(self, choice: int) -> int | None:
        """The seed of one of a prompt's choices, if there is one."""
        return None if self.seed is None else (self.seed + choice) % 2**64

    def params(self, recommended: Mapping[str, Any], **more: Any) -> SamplingParams:
        """Sampling parameters of a prompt's first choice; others differ in the seed (`seed_of`).

        Args:
            recommended: the checkpoint's settings, for fields that the request leaves out.
            more: parameters that are no fields of the request, such as the settled `max_tokens`.

        Raises:
            UserError: two fields do not go together.
        """
        given = {name: getattr(self, name) for name in _AS_THEY_ARE}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            given["seed"] = self.seed_of(0)
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        known = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **dict(recommended) | known | more,
            logprobs=self.wanted_logprobs,
            prompt_logprobs=self.wanted_prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`: prompts to continue."""

    neutral = _NEUTRAL_OF_COMPLETIONS
    prompt: Prompts
    echo: bool | None = None
    max_tokens: int | None = number("max_tokens", 0)
    logprobs: int | None = number("logprobs")

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        most = MOST_PROMPTS // self.num_choices
        if len(self.prompt) > most:
            text = (
                f"prompt has {len(self.prompt)} items; valid with n={self.num_choices}: 1 to {most}"
            )
            raise bad_field("prompt", text)
        if self.drops_output and not self.echo and self.prompt_logprobs is None:
            text = "max_tokens is 0, which needs echo or prompt_logprobs; else it must be 1 or more"
            raise bad_field("max_tokens", text)
        return self

    @property
    def drops_output(self) -> bool:
        """Whether only the prompt is evaluated (`max_tokens` 0)."""
        return self.max_tokens == 0

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The larger of `prompt_logprobs` and, with `echo`, `logprobs`; None without them."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((each for each in asked if each is not None), default=None)

    @property
    def wanted_tokens(self) -> int | None:
        """`max_tokens`; the API's default if it is absent, None (as many as fit) if it is null."""
        if self.max_tokens is None and "max_tokens" not in self.model_fields_set:
            return _COMPLETION_TOKENS
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The field `logprobs`: likely tokens to report with each output token."""
        return self.logprobs


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Verbosity = Literal["low", "medium", "high"]
USUAL_VERBOSITY = "medium"  # has no effect on a template that knows no other


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`: a conversation to continue."""

    neutral = _NEUTRAL_OF_CHAT
    messages: Messages
    max_completion_tokens: int | None = number("max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = number("logprobs")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Effort | None = None
    verbosity: Verbosity | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise bad_field("top_logprobs", "top_logprobs is given, but logprobs is not true")
        self._check_tools()
        for name, value in self.named_variables.items():
            if (self.chat_template_kwargs or {}).get(name, value) != value:
                raise bad_field(name, f"{name} and chat_template_kwargs.{name} differ; give one")
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            text = "max_tokens and max_completion_tokens differ; give one"
            raise bad_field("max_tokens", text)
        return self

    @property
    def named_variables(self) -> dict[str, str]:
        """Template variables that the request sets by fields of their own."""
        given = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        return {name: value for name, value in given.items() if value is not None}

    def _check_tools(self) -> None:
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if choice not in (None, "none") and not names:
            raise bad_field("tool_choice", "tool_choice is given, but no tools are")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            text = f"tool_choice names {choice.function.name!r}; the tools: {', '.join(names)}"
            raise bad_field("tool_choice", text)
        if len(set(names)) < len(names):
            raise bad_field("tools", "tools: two have the same name")

    @property
    def callable_functions(self) -> list[Function]:
        """The functions that the answer may call, by `tools` and `tool_choice`."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [each for each in functions if each.name == name]
        return [] if self.tool_choice == "none" else functions

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None where the model may call none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def wanted_tokens(self) -> int | None:
        """`max_tokens` or `max_completion_tokens`; None for as many as fit."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """`top_logprobs` with `logprobs`; None without it."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Known):
    """The body of `/tokenize`: a text or a chat to turn into token ids."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "chat_template": (),
        "continue_final_message": (False,),
    }
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise bad_field("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Known):
    """The body of `/detokenize`: token ids to turn into text."""

    tokens: Annotated[list[TokenId], Field(max_length=MOST_VALUES, fail_fast=True)]
