"""The process of one chat template: compiles the template, then renders chats.

A template is an untrusted program. Jinja's sandbox keeps it from files and from Python's internals;
only limits of a process hold inside a single operation, such as `10 ** 10 ** 9`. Requests and
answers are JSON, over the connection that is its standard input.
"""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PARENT_CHECK_S = 2.0  # how often an idle process checks that its parent lives
_MAX_ERROR_CHARACTERS = 500


def main() -> None:
    """Answer until the connection is closed: first a template with its limits, then its chats.

    The answer to the template is the names of its variables.
    """
    connection = Connection(0)
    requests = _requests(connection, os.getppid())
    given = json.loads(next(requests))
    _limit(resource.RLIMIT_AS, given["memory_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    template: Any = None

    def compile() -> str:
        nonlocal template
        environment, source = _environment(), given["source"]
        template = environment.from_string(source)
        return json.dumps(sorted(meta.find_undeclared_variables(environment.parse(source))))

    def render(request: bytes) -> str:
        chat = json.loads(request)
        text: str = template.render(**given["special_tokens"] | chat["variables"])
        if len(text) > chat["max_characters"]:
            raise TemplateError(
                f"it makes {len(text):,} characters of this chat; at most "
                f"{chat['max_characters']:,} are taken"
            )
        return text

    _answer(connection, compile, given["cpu_s"])
    for request in requests:
        _answer(connection, partial(render, request), given["cpu_s"])


def _requests(connection: Connection, parent: int) -> Iterator[bytes]:
    """Requests as they arrive, until `parent` ends, even if other processes hold its socket."""
    while True:
        while not connection.poll(_PARENT_CHECK_S):
            if os.getppid() != parent:
                return
        try:
            yield connection.recv_bytes()
        except EOFError:
            return


def _answer(connection: Connection, make: Callable[[], str], cpu_s: float) -> None:
    """Send the text, or the reason for having none; beyond `cpu_s`, SIGPROF ends this process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        answer = {"text": make()}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except TemplateSyntaxError as error:
        answer = {"error": f"line {error.lineno}: {error.message}"}
    except TemplateError as error:  # also by the template, with raise_exception
        answer = {"error": str(error)}
    except Exception as error:  # a template is a program: anything can fail
        answer = {"error": f"{type(error).__name__}: {error}"}
    if "error" in answer:
        answer["error"] = answer["error"][:_MAX_ERROR_CHARACTERS]
    connection.send_bytes(json.dumps(answer).encode())
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


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
