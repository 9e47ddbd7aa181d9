"""The process of one chat template, which compiles the template, then renders chats.

A template is an untrusted program. Jinja's sandbox keeps it from files and from Python's internals.
"""

import json
from datetime import datetime
from functools import cached_property, partial
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertlane.text.limited_process import Worker


def main() -> None:
    """Answer until the connection is closed: the names of the template's variables, and chats."""
    worker = Worker(_explanation)
    worker.limit_memory()
    template = _TemplateCode(**worker.given)
    for request in worker.requests():
        worker.answer(partial(template.answer, request))


class _TemplateCode:
    """A template, compiled when it is first asked."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._source = source
        self._special_tokens = special_tokens

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self._source)

    def answer(self, request: bytes) -> str:
        """A chat as text; without a chat, the names of variables as JSON."""
        chat = json.loads(request)
        if chat is None:
            self._template  # noqa: B018
            parsed = _environment().parse(self._source)
            return json.dumps(sorted(meta.find_undeclared_variables(parsed)))
        text: str = self._template.render(**self._special_tokens | chat["variables"])
        if len(text) > chat["max_characters"]:
            raise TemplateError(
                f"it makes {len(text):,} characters of this chat; at most "
                f"{chat['max_characters']:,} are taken"
            )
        return text


def _explanation(error: Exception) -> str:
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, TemplateError):  # also by the template, with raise_exception
        return str(error)
    return f"{type(error).__name__}: {error}"


class _Generation(Extension):
    """`{% generation %}` marks a model's answers for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    """Functions that transformers gives templates, so that they render the same."""
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
