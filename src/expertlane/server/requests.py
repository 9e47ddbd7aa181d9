"""What requests may ask for: every field that is known, what it may be, and what it becomes.

A field that is neither here nor in a table of neutral values is refused by its name, as is a value
that would have an effect that this server lacks. `docs/commands/serve.md` says which clients were
looked at.
"""

from collections.abc import Iterable, Mapping
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

from expertlane.server.errors import ApiError, bad_field
from expertlane.spec.files import strict_json
from expertlane.spec.ranges import RANGES, shown
from expertlane.spec.sampling import SamplingParams

_AS_THEY_ARE = (  # in `SamplingParams`
    *("temperature", "top_p", "min_p", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
MOST_CHOICES = 128  # of a prompt
MOST_PROMPTS = 2048  # of a request, times its choices
_MOST_STOPS = 64
_MOST_BIASES = 1024
_COMPLETION_TOKENS = 16  # by default, as in the API

# Fields of the API and of engines that speak it, with the values that change nothing here; null is
# always one. Others are refused: the field is not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
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
    "reasoning_effort": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def _number(name: str, low: float | None = None) -> Any:
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
    is_list = isinstance(texts, list) and len(texts) <= _MOST_STOPS
    if texts is not None and not (is_list and all(isinstance(t, str) and t for t in texts)):
        raise _refuse(value, f"a text, or at most {_MOST_STOPS} of them, none empty")
    return texts


def _take_bias(value: dict[str, float]) -> dict[str, float]:
    if len(value) > _MOST_BIASES:
        raise _refuse(len(value), f"at most {_MOST_BIASES} tokens")
    for token_id in value:
        if RANGES["stop_token_ids"].parse(token_id) is None:
            raise _refuse(token_id, "a token id in every key")
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
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Known(_Strict):
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
            elif value is not None and value not in cls.neutral[name]:
                raise _unsupported(name, value, cls.neutral[name])
        return found


def _unsupported(name: str, value: object, neutral: Iterable[Any]) -> ApiError:
    valid = " or ".join(["null", *(strict_json(each) for each in neutral)])
    text = f"{name} is {shown(value)}, which is not supported; valid: {valid}"
    return bad_field(name, text, "unsupported_parameter")


class GenerationRequest(_Known):
    """What completions and chats have in common."""

    temperature: float | None = _number("temperature")
    top_p: float | None = _number("top_p")
    top_k: int | None = _number("top_k", -1)  # as 0: all
    min_p: float | None = _number("min_p")
    repetition_penalty: float | None = _number("repetition_penalty")
    presence_penalty: float | None = _number("presence_penalty")
    frequency_penalty: float | None = _number("frequency_penalty")
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_take_bias)]
        | None
    ) = None
    seed: int | None = _number("seed", -(2**63))
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = _number("max_tokens")
    min_tokens: int | None = _number("min_tokens")
    stop: Stop = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=_MOST_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = _number("priority")
    timeout_s: float | None = _number("timeout_s")
    # Without effect, whatever they are.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "stream_options is given, but stream is not true")
        return self

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def wanted_tokens(self) -> int | None:
        """Output tokens at most; None for as many as fit."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """As `SamplingParams.logprobs`."""
        return None

    def params(
        self, recommended: Mapping[str, Any], max_tokens: int, choice: int
    ) -> SamplingParams:
        """How tokens of one of the choices are drawn.

        Args:
            recommended: by the checkpoint, where the request says nothing.

        Raises:
            UserError: two fields do not go together.
        """
        given = {name: getattr(self, name) for name in _AS_THEY_ARE}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % 2**64
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        known = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **dict(recommended) | known, max_tokens=max_tokens, logprobs=self.wanted_logprobs
        )


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    neutral = _NEUTRAL_OF_COMPLETIONS
    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = _number("logprobs")

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        most = MOST_PROMPTS // self.num_choices
        if len(self.prompt) > most:
            raise bad_field(
                "prompt",
                f"prompt holds {len(self.prompt)}; valid with n={self.num_choices}: 1 to {most}",
            )
        if self.echo and self.logprobs is not None:
            text = "echo with logprobs is not supported: prompts have no log-probabilities here"
            raise bad_field("echo", text, "unsupported_parameter")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """As the API has it: few where the request says nothing; null for as many as fit."""
        if self.max_tokens is None and "max_tokens" not in self.model_fields_set:
            return _COMPLETION_TOKENS
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """As asked for."""
        return self.logprobs


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Known):
    """A message of a chat; the checkpoint's template says which roles it takes."""

    neutral = dict.fromkeys(("audio", "function_call", "refusal", "model"), ()) | {
        "tool_calls": ([],),
        "annotations": ([],),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, str]:
        """As templates take it; parts are joined by line ends."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        message = {"role": self.role, "content": text}
        more = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in more.items() if value is not None}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    neutral = _NEUTRAL_OF_CHAT
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = _number("max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = _number("logprobs")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # there are no tools

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise bad_field("top_logprobs", "top_logprobs is given, but logprobs is not true")
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            text = "max_tokens and max_completion_tokens differ; give one"
            raise bad_field("max_tokens", text)
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Under either name."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """As `SamplingParams.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(_Known):
    """The body of `/tokenize`: a text or a chat."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "chat_template": (),
        "continue_final_message": (False,),
    }
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise bad_field("prompt", "give prompt or messages, one of them")
        return self


class DetokenizeRequest(_Known):
    """The body of `/detokenize`."""

    tokens: list[TokenId]
