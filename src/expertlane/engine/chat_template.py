"""Chats as prompts: the template that a checkpoint brings, in a sandbox.

Templates see what transformers gives them, so that they render the same.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertlane.engine.tokenizer import TOKENIZER_CONFIG, read_json, token_text
from expertlane.errors import UserError
from expertlane.spec.input_file import CONFIG_BYTES, read_text

_FILE = "chat_template.jinja"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # of older checkpoints
_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)

Message = Mapping[str, Any]


class ChatTemplate:
    """A template for chats.

    Args:
        source: in Jinja's language; it is not trusted.
        special_tokens: variables for it, such as `bos_token`.
        name: where it comes from, for messages.

    Raises:
        UserError: its syntax is wrong.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._name = name
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise self._error(f"line {error.lineno}: {error.message}") from None
        except (TemplateError, SyntaxError, RecursionError) as error:
            raise self._error(str(error)) from None

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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A chat as the text of a prompt; encode it without adding special tokens.

        Args:
            messages: each with a `role` and a `content`; the template says which roles it knows.
            add_generation_prompt: end with what begins the model's answer.

        Raises:
            UserError: a message lacks something, or the template refuses or fails.
        """
        if not messages:
            raise UserError("the chat is empty; give at least one message")
        for i, message in enumerate(messages):
            _check(i, message)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:  # raise_exception among them: the template's own words
            raise self._error(str(error)) from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise self._error(f"{type(error).__name__}: {error}") from None

    def _error(self, text: str) -> UserError:
        return UserError(f"chat template {self._name}: {' '.join(text.split())}")


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
        raise UserError(f"message {i} is {message!r}; it must have a role and a content")
    if not isinstance(message.get("role"), str):
        raise UserError(
            f"message {i} has role {message.get('role')!r}; it must be a string such as 'user'"
        )
    if not isinstance(message.get("content"), str | list):
        raise UserError(
            f"message {i} has content {message.get('content')!r}; it must be a string, or a list "
            "of parts"
        )


class _Generation(Extension):
    """`{% generation %}` marks a model's own words for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
