"""The text formats of tool calls and reasoning, one description for each family of models.

Sources: the chat templates of the checkpoints that each names, and OpenAI's description of the
harmony format (https://cookbook.openai.com/articles/openai-harmony).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Body = Literal["json", "named", "xml", "harmony"]


@dataclass(frozen=True)
class CallForm:
    """A family's text format of tool calls: `section call between call section_end`.

    A call is `begin`, then by its body
    json: `{"name": NAME, ARGUMENTS_KEY: ARGUMENTS}`;
    named: NAME `name_end` ARGUMENTS;
    xml: NAME `name_end`, then for each argument `key_begin` KEY `key_end` VALUE `value_end`, where
    texts stand as they are and all else is JSON; and then `end`.

    Attributes:
        opener: the mark by which a call, or the first of several, is recognized; empty where a
            text that begins with `{` is a call.
        next_opener: the mark of the other calls.
        numbers: names are followed by `:` and the number of the call.
        is_list: the calls are a JSON list.
        cannot_repeat: an answer ends with its call.
    """

    body: Body
    opener: str
    begin: str
    end: str = ""
    section: str = ""
    section_end: str = ""
    between: str = ""
    next_opener: str = ""
    arguments_key: str = "arguments"
    name_end: str = ""
    key_begin: str = ""
    key_end: str = ""
    value_end: str = ""
    numbers: bool = False
    cannot_repeat: bool = False

    @property
    def openers(self) -> tuple[str, ...]:
        """The marks by which a call is recognized."""
        return tuple(filter(None, dict.fromkeys((self.opener, self.next_opener))))

    @property
    def closers(self) -> tuple[str, ...]:
        """The marks after calls, which are dropped from the text."""
        texts = (self.end.strip(), self.section_end.strip(), *self.end.strip("\n`").split())
        return tuple(dict.fromkeys(each for each in texts if len(each) > 1))


@dataclass(frozen=True)
class ThoughtForm:
    """The marks around a model's reasoning before its answer."""

    begin: str
    end: str


CALL_FORMS: dict[str, CallForm] = {
    "hermes": CallForm(  # Qwen2.5, Qwen3, Hermes
        "json", "<tool_call>", "<tool_call>\n", "\n</tool_call>", between="\n"
    ),
    "deepseek_v3": CallForm(  # DeepSeek-V3, R1
        "named",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        between="\n",
        next_opener="<｜tool▁call▁begin｜>",
        name_end="\n```json\n",
    ),
    "deepseek_v31": CallForm(  # DeepSeek-V3.1
        "named",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        next_opener="<｜tool▁call▁begin｜>",
        name_end="<｜tool▁sep｜>",
    ),
    "kimi_k2": CallForm(  # Kimi-K2
        "named",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.",
        "<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        next_opener="<|tool_call_begin|>",
        name_end="<|tool_call_argument_begin|>",
        numbers=True,
    ),
    "mistral": CallForm(  # Mistral and Mixtral Instruct up to tokenizer v7
        "json", "[TOOL_CALLS]", "", "", "[TOOL_CALLS][", "]", between=", "
    ),
    "mistral_args": CallForm(  # Mistral from tokenizer v11
        "named", "[TOOL_CALLS]", "[TOOL_CALLS]", name_end="[ARGS]"
    ),
    "llama3_json": CallForm(  # Llama 3.1 to 3.3
        "json", "", "", arguments_key="parameters", between="; "
    ),
    "qwen3_coder": CallForm(  # Qwen3-Coder
        "xml",
        "<tool_call>",
        "<tool_call>\n<function=",
        "</function>\n</tool_call>",
        between="\n",
        name_end=">\n",
        key_begin="<parameter=",
        key_end=">\n",
        value_end="\n</parameter>\n",
    ),
    "glm45": CallForm(  # GLM-4.5, GLM-4.6
        "xml",
        "<tool_call>",
        "<tool_call>",
        "</tool_call>",
        between="\n",
        name_end="\n",
        key_begin="<arg_key>",
        key_end="</arg_key>\n<arg_value>",
        value_end="</arg_value>\n",
    ),
    "minimax": CallForm(  # MiniMax-M1
        "json", "<tool_calls>", "", "", "<tool_calls>\n", "\n</tool_calls>", between="\n"
    ),
    "minimax_m2": CallForm(  # MiniMax-M2
        "xml",
        "<minimax:tool_call>",
        '<invoke name="',
        "</invoke>\n",
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        next_opener="<invoke",
        name_end='">\n',
        key_begin='<parameter name="',
        key_end='">',
        value_end="</parameter>\n",
    ),
    "harmony": CallForm(  # GPT-OSS
        "harmony",
        "<|channel|>commentary",
        "<|channel|>commentary to=functions.",
        name_end=" <|constrain|>json<|message|>",
        cannot_repeat=True,
    ),
}
THOUGHT_FORMS: dict[str, ThoughtForm] = {
    "think": ThoughtForm("<think>", "</think>"),  # DeepSeek, Qwen3, GLM, Kimi, MiniMax
    "mistral": ThoughtForm("[THINK]", "[/THINK]"),  # Magistral
    "harmony": ThoughtForm(  # GPT-OSS
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    ),
}
HARMONY_MARKS = ("<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|start|>", "<|call|>")
HARMONY_ANSWER = "<|channel|>final<|message|>"


def call_form_of(template: str) -> str | None:
    """The name of the call form whose marks a chat template has; None if no known one fits."""
    return next((name for name, does_fit in _evidence(template) if does_fit), None)


def _evidence(source: str) -> Iterator[tuple[str, bool]]:
    """Names of forms, and whether the template fits each; the first that fits counts."""
    yield "harmony", "<|channel|>" in source and "<|message|>" in source
    has_fence = "```json" in source
    yield "deepseek_v3", "<｜tool▁calls▁begin｜>" in source and has_fence
    yield "deepseek_v31", "<｜tool▁calls▁begin｜>" in source
    yield "kimi_k2", "<|tool_calls_section_begin|>" in source
    yield "minimax_m2", "minimax:tool_call" in source
    yield "minimax", "<tool_calls>" in source
    yield "mistral_args", "[TOOL_CALLS]" in source and "[ARGS]" in source
    yield "mistral", "[TOOL_CALLS]" in source
    yield "glm45", "<tool_call>" in source and "<arg_key>" in source
    yield "qwen3_coder", "<tool_call>" in source and "<function=" in source
    has_arguments = '"arguments"' in source or "'arguments'" in source
    yield "hermes", "<tool_call>" in source and has_arguments
    yield "llama3_json", "<|start_header_id|>" in source and '"parameters": ' in source


def thought_form_of(template: str) -> str | None:
    """The name of the reasoning form whose marks a chat template has; None if none fits."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    return next((name for name, form in THOUGHT_FORMS.items() if form.end in template), None)
