"""Chats as prompts, by the template of a checkpoint: sandboxed, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from expertlane.errors import UserError
from expertlane.spec.files import CONFIG_BYTES, read_text
from expertlane.spec.ranges import shown
from expertlane.text.tokenizer import TOKENIZER_CONFIG, read_json, token_text

_FILE = "chat_template.jinja"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # of older checkpoints
_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)

# For compiling a template, and for each chat: far more than real templates need.
_CPU_S = 1.0
_MEMORY_BYTES = 512 * 2**20
_ANSWER_S = 30.0  # wall time: the machine may be busy
# How much longer than its messages a prompt may be: templates add system prompts of their own.
_MAX_ADDED_CHARACTERS = 2**20
_MAX_EXPANSION = 4
# What templates are given anyway, and nobody else may name.
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

# Isolated: neither the working directory nor the environment decides what is imported. Packages
# outside the standard library come from where this process has them.
_PROGRAM = (
    "import sys; sys.path += sys.argv[1:]; from expertlane.text.chat_sandbox import main; main()"
)
_PACKAGES = ("expertlane", "jinja2", "markupsafe")
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")  # all that it gets: others may be secrets

Message = Mapping[str, Any]


class ChatTemplate:
    """A template for chats; safe to use from several threads.

    It is rendered in a process of its own, which starts here and ends with this object. A template
    or chat that takes more than 1 s of processor time or 512 MiB is refused.

    Args:
        source: in Jinja's language; untrusted.
        special_tokens: variables for it, such as `bos_token`.
        name: where it comes from; for error messages.

    Attributes:
        variables: names that it takes from those who ask, and from its special tokens.

    Raises:
        UserError: its syntax is wrong.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._template = {
            "source": source,
            "special_tokens": self._special_tokens,
            "cpu_s": _CPU_S,
            "memory_bytes": _MEMORY_BYTES,
        }
        self._name = name
        self._lock = threading.Lock()
        self._process: _TemplateProcess | None = None
        self.variables: frozenset[str] = frozenset()
        with self._lock:
            self._start()

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens, as given."""
        return dict(self._special_tokens)

    @property
    def source(self) -> str:
        """The template's text, in Jinja's language."""
        return str(self._template["source"])

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
            tools: that the model may call, as the OpenAI API has them.
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
        with self._lock:
            process = self._process
            if process is None or process.has_ended:  # as by a machine that is out of memory
                process = self._start()
            return self._ask(process, {"variables": given, "max_characters": most})

    def _start(self) -> "_TemplateProcess":
        process = _TemplateProcess()
        self.variables = frozenset(json.loads(self._ask(process, self._template)))
        self._process = process
        return process

    def _ask(self, process: "_TemplateProcess", request: Mapping[str, Any]) -> str:
        """The answer's text; without one, the process is ended and the next chat starts another."""
        answer: dict[str, str] = {}
        try:
            answer = process.ask(request)
        finally:
            if "text" not in answer:
                process.end()
                self._process = None
        if "text" not in answer:
            raise UserError(f"chat template {self._name}: {' '.join(answer['error'].split())}")
        return answer["text"]


class _TemplateProcess:
    """The process of one template, seen from the one that asks it."""

    def __init__(self) -> None:
        paths = dict.fromkeys(map(_package_folder, _PACKAGES))
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                process_group=0,  # a terminal's Ctrl-C is not for it
            )
        self.end = weakref.finalize(self, _end, self._process, self._connection, os.getpid())

    @property
    def has_ended(self) -> bool:
        """True if the process has ended, whoever ended it."""
        return self._process.poll() is not None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Send a request and wait for its answer: a `text`, or an `error` that says why not."""
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            if not self._connection.poll(_ANSWER_S):
                return {"error": f"no answer within {_ANSWER_S:g} s"}
            answer: dict[str, str] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return {"error": self._why_ended()}
        return answer

    def _why_ended(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code == -signal.SIGPROF:
            return f"it takes more than {_CPU_S:g} s of processor time"
        return f"its process ended with exit code {code}"


def _package_folder(name: str) -> str:
    """The folder that a package is imported from."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"chat templates need {name}, which is not installed")
    return str(Path(spec.origin).parents[1])


def _end(process: "subprocess.Popen[bytes]", connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() == owner:  # a fork of the owner only closes its copy
        process.kill()
        process.wait()


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
