"""Chats as prompts, by the template of a checkpoint: sandboxed, in a process of its own."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from expertlane.errors import UserError
from expertlane.spec.files import CONFIG_BYTES, read_text
from expertlane.spec.ranges import shown
from expertlane.text.limited_process import LimitedProcess, Limits
from expertlane.text.tokenizer import TOKENIZER_CONFIG, read_json, token_text

_FILE = "chat_template.jinja"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # of older checkpoints
_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)

# For each chat, with the compilation of its template where that is the first: far more than real
# templates need.
_LIMITS = Limits(cpu_s=1.0, memory_bytes=512 * 2**20)
_PACKAGES = ("expertlane", "jinja2", "markupsafe")
# How much longer than its messages a prompt may be: templates add system prompts of their own.
_MAX_ADDED_CHARACTERS = 2**20
_MAX_EXPANSION = 4
# What templates are given anyway, and nobody else may name.
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

Message = Mapping[str, Any]


class ChatTemplate:
    """A template for chats; safe to use from several threads.

    It is rendered in a process of its own, which starts here and ends with this object. A template
    or chat that takes more than 1 s of CPU time or 512 MiB is refused.

    Args:
        source: in Jinja's language; untrusted.
        special_tokens: variables for it, such as `bos_token`.
        name: its origin, for error messages.

    Attributes:
        variables: names that it takes from those who ask, and from its special tokens.

    Raises:
        UserError: its syntax is wrong.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._source = source
        self._name = name
        given = {"source": source, "special_tokens": self._special_tokens}
        self._process = LimitedProcess("chat_sandbox", _PACKAGES, _LIMITS, given)
        self.variables: frozenset[str] = frozenset(json.loads(self._ask(None)))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens, as given."""
        return dict(self._special_tokens)

    @property
    def source(self) -> str:
        """The template's text, in Jinja's language."""
        return self._source

    @staticmethod
    def is_in(folder: Path) -> bool:
        """True if a checkpoint has a template."""
        config = read_json(folder / TOKENIZER_CONFIG)
        return os.path.lexists(folder / _FILE) or config.get("chat_template") is not None

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The template of a checkpoint: `chat_template.jinja`, else in `tokenizer_config.json`.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        config = read_json(folder / TOKENIZER_CONFIG)
        tokens = read_json(folder / _SPECIAL_TOKENS_MAP) | config
        texts = {name: token_text(tokens.get(name)) for name in _SPECIAL_TOKENS}
        special_tokens = {name: text for name, text in texts.items() if text is not None}
        path = folder / _FILE
        if os.path.lexists(path):
            return cls(read_text(path, CONFIG_BYTES), special_tokens, str(path))
        path = folder / TOKENIZER_CONFIG
        return cls(_default(config.get("chat_template"), path), special_tokens, str(path))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as the text of a prompt; encode it without adding special tokens.

        Args:
            messages: each with a `role` and a `content`; the template says which roles it knows.
            add_generation_prompt: end with what begins the model's answer.
            tools: tools that the model may call, in the form of the OpenAI API.
            variables: more of the template's own, such as `enable_thinking`; none of
                `OWN_VARIABLES`, whose values win.

        Raises:
            UserError: a message lacks something, or the template refuses or fails.
        """
        if not messages:
            raise UserError("the chat is empty; give at least one message")
        for i, message in enumerate(messages):
            _check(i, message)
        given = dict(variables or {}) | {
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            num_characters = len(json.dumps(given))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the chat's messages must be plain JSON data: {error}") from None
        most = _MAX_ADDED_CHARACTERS + _MAX_EXPANSION * num_characters
        return self._ask({"variables": given, "max_characters": most})

    def _ask(self, request: Mapping[str, Any] | None) -> str:
        try:
            return self._process.ask(request)
        except UserError as error:
            raise UserError(f"chat template {self._name}: {error}") from None


def _default(templates: Any, path: Path) -> str:
    """The one template, or of several named ones that named `default`."""
    if isinstance(templates, str):
        return templates
    if templates is None:
        raise UserError(
            f"{path.parent}: there is no chat template, neither in {_FILE} nor in "
            f"{TOKENIZER_CONFIG}; give a prompt instead of a chat"
        )
    try:
        by_name = {entry["name"]: entry["template"] for entry in templates}
    except (TypeError, KeyError):
        by_name = {}
    if not isinstance(by_name.get("default"), str):
        raise UserError(
            f"{path}: chat_template must be a string, or a list with one named 'default'; "
            f"named are: {', '.join(map(str, by_name)) or 'none'}"
        )
    return str(by_name["default"])


def _check(i: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"message {i} is {shown(message)}; it must have a role and a content")
    if not isinstance(message.get("role"), str):
        raise UserError(
            f"message {i} has role {shown(message.get('role'))}; it must be a string such as 'user'"
        )
    if message.get("content") is None and message.get("tool_calls"):
        return
    if not isinstance(message.get("content"), str | list):
        raise UserError(
            f"message {i} has content {shown(message.get('content'))}; it must be a string, or a "
            "list of parts"
        )
