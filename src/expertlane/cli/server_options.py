"""Options of the commands that serve, or talk to a server: API keys, tokenizers, time limits."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import typer

from expertlane.cli.help import Panel
from expertlane.errors import UserError, naming
from expertlane.spec.files import read_text

if TYPE_CHECKING:
    from expertlane.client.server import Vocabulary

API_KEY = "EXPERTLANE_API_KEY"
_MOST_BYTES = 2**16


def key_lines(path: Path) -> dict[str, str]:
    """The keys of a file, one a line, by where they stand.

    Raises:
        UserError: it cannot be read, or has none.
    """
    with naming("--api-key-file"):
        lines = read_text(path, _MOST_BYTES).splitlines()
    keys = {f"{path}, line {number}": line.strip() for number, line in enumerate(lines, 1)}
    keys = {where: key for where, key in keys.items() if key}
    if not keys:
        raise UserError(f"--api-key-file: {path} has no key; give one a line")
    return keys


def one_key_each(files: Sequence[Path], num_servers: int = 1) -> list[str | None]:
    """The keys of servers, one of each file; without files, the environment's or None.

    Raises:
        UserError: a file cannot be read or has several keys, or there are too many files.
    """
    if len(files) > num_servers:
        raise UserError(f"--api-key-file is given {len(files)} times; once for each server")
    found: dict[str, str] = {}
    for path in files:
        own = key_lines(path)
        if len(own) > 1:
            raise UserError(f"--api-key-file: {path} has {len(own)} keys; one is needed")
        found |= own
    return [*api_keys(found)] or [None]


def api_keys(given: Mapping[str, str]) -> list[str]:
    """The keys that are given, by where they stand; without any, the environment's.

    Raises:
        UserError: one is no word of printable ASCII, which headers can carry.
    """
    if not given and (own := os.environ.get(API_KEY)):
        given = {API_KEY: own}
    for where, key in given.items():
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{where} is no API key: it must be one word of printable ASCII")
    return list(given.values())


def request_timeout_option(shown: str) -> Any:
    """`--request-timeout-s`."""
    return typer.Option(None, show_default=shown, help="Time limit of a request, waiting included.")


def api_key_file_option(more: str = "", **how: Any) -> Any:
    """`--api-key-file` of a client.

    Args:
        more: further help.
    """
    return typer.Option(
        None, show_default=f"{API_KEY}, else none", help=f"File with the API key.{more}", **how
    )


# `--flush-caches`.
FLUSH_CACHES: Any = typer.Option(
    False,
    help="Empty the server's prefix cache before each round: SGLang; vLLM in development mode.",
)


# `--engine-python`.
ENGINE_PYTHON: Any = typer.Option(
    None,
    metavar="[NAME=]PATH",
    rich_help_panel=Panel.MORE_SERVER,
    show_default="commands on the PATH",
    help="Python of the environment that the engine is installed in.",
)


# `--engine-args`.
ENGINE_ARGS: Any = typer.Option(
    None,
    metavar="[NAME=]ARGS",
    rich_help_panel=Panel.MORE_SERVER,
    help='Further arguments of the engine\'s command, such as "--enforce-eager".',
)


# `--start-timeout-s`.
START_TIMEOUT: Any = typer.Option(
    1_200.0,
    rich_help_panel=Panel.MORE_SERVER,
    help="Time in which a server must become ready.",
)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What prompts are sent as: the API, and the tokens that they are made of."""

    panel: ClassVar = Panel.MORE_SERVER
    endpoint: Literal["completions", "chat"] = typer.Option(
        "completions", help="API that requests use; prompts of chats are text."
    )
    tokenizer: Path | None = typer.Option(
        None,
        metavar="DIR",
        show_default="MODEL if it is such a folder, else the server's /tokenize",
        help="Folder of the model's tokenizer. Required for chats.",
    )


def vocabulary(tokenizer: Path | None, model: str | None) -> "Vocabulary | None":
    """The tokens of a tokenizer that was given, or is in a model's folder.

    Raises:
        UserError: there is none that can be read.
    """
    from expertlane.client.server import Vocabulary

    if tokenizer is not None:
        with naming("--tokenizer"):
            return Vocabulary.of_folder(tokenizer)
    return None if model is None else Vocabulary.of_name(model)
