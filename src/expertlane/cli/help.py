"""Help of commands: plain text in panels, what most users need first, no wider than 80 columns."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

from typer.core import TyperCommand, TyperGroup

LEAST_WIDTH, MOST_WIDTH = 40, 80
_NAME_COLUMNS = 24  # a longer name has a line of its own
_EXTRA = re.compile(r" {2}\[([^\[]*)\]$")
_WORDS = re.compile(r"\((.*)\)")


class Panel(StrEnum):
    """Where an option stands in help, in this order."""

    PROMPTS = "Prompts"
    SAMPLING = "Sampling"
    SERVER = "Server"
    WORKLOAD = "Workload"
    DEPLOYMENT = "Deployment"
    PROJECTION = "Projection"
    OUTPUT = "Output"
    OTHER = "Options"
    MORE_SERVER = "Advanced: server"
    MORE_WORKLOAD = "Advanced: workload"
    MORE_SAMPLING = "Advanced: sampling"
    BATCHING = "Advanced: batching and cache"
    MORE_DEPLOYMENT = "Advanced: deployment"
    MODELLED = "Advanced: modelled cluster"
    VIRTUAL_TIME = "Advanced: virtual time"
    RANKS = "Advanced: ranks"
    MORE_OUTPUT = "Advanced: output"


class Command(TyperCommand):
    """A command with its help in panels."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write(_help(self, ctx))


class Group(TyperGroup):
    """Commands, with the same help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write(_help(self, ctx))


def option_record(option: Any, context: Any) -> tuple[str, str, str]:
    """An option's spellings and value, what it does, and what else is said of it: its default."""
    _, text = option.get_help_record(context)
    extra = ""
    if (found := _EXTRA.search(text)) is not None:
        text, extra = text[: found.start()], _WORDS.sub(r"\1", found[1]).removesuffix(".0")
    if option.multiple:
        text += " May be repeated."
    return f"{spellings(option)} {value_of(option)}".rstrip(), text, extra


def spellings(option: Any) -> str:
    """An option's names, the short one first."""
    return ", ".join(sorted(option.opts, key=len))


def value_of(parameter: Any) -> str:
    """The metavar of an option or argument; empty for a flag."""
    return "" if getattr(parameter, "is_flag", False) else parameter.metavar or ""


def panels_of(command: Any, context: Any) -> dict[Panel, list[Any]]:
    """The options that help shows, by panel, in order."""
    found: dict[Panel, list[Any]] = {panel: [] for panel in Panel}
    other = Panel.OTHER if hasattr(command, "commands") else Panel.OUTPUT
    for each in command.get_params(context):
        if each.param_type_name == "option" and not each.hidden:
            found[Panel(getattr(each, "rich_help_panel", None) or other)].append(each)
    return {panel: options for panel, options in found.items() if options}


def _help(command: Any, context: Any) -> str:
    width = min(max(shutil.get_terminal_size().columns, LEAST_WIDTH), MOST_WIDTH)
    parts = [_usage(command, context, width), *_paragraphs(command.help or "", width)]
    arguments = [
        (value_of(each), each.help or "")
        for each in command.params
        if each.param_type_name == "argument"
    ]
    commands = [
        (name, each.short_help or "") for name, each in getattr(command, "commands", {}).items()
    ]
    parts += [_definitions("Commands", commands, width)]
    parts += [_definitions("Arguments", arguments, width)]
    for panel, options in panels_of(command, context).items():
        records = [option_record(each, context) for each in options]
        rows = [(name, f"{text} [{extra}]" if extra else text) for name, text, extra in records]
        parts.append(_definitions(panel.value, rows, width))
    return "\n\n".join(filter(None, parts)) + "\n"


def _usage(command: Any, context: Any, width: int) -> str:
    words = [context.command_path]
    for each in command.params:
        if each.param_type_name == "argument":
            name = value_of(each) + ("…" if each.nargs == -1 else "")
            words.append(name if each.required else f"[{name}]")
        elif each.required:
            words.append(option_record(each, context)[0])
    words.append("COMMAND …" if hasattr(command, "commands") else "[OPTIONS]")
    return _filled("Usage: " + " ".join(words), width, " " * 4)


def _paragraphs(text: str, width: int) -> Iterator[str]:
    """Paragraphs filled; lines stay as they are where the first one is `\\b`."""
    for each in text.split("\n\n"):
        first, _, rest = each.partition("\n")
        if first.strip() != "\b":
            yield _filled(" ".join(each.split()), width)
            continue
        lines = rest.splitlines()
        indents = [" " * (len(line) - len(line.lstrip()) + 4) for line in lines]
        yield "\n".join(map(_filled, lines, [width] * len(lines), indents))


def _definitions(heading: str, rows: Iterable[tuple[str, str]], width: int) -> str:
    rows = list(rows)
    if not rows:
        return ""
    columns = min(max(len(name) for name, _ in rows), _NAME_COLUMNS)
    lines = [f"{heading}:"]
    for name, text in rows:
        indent = " " * (columns + 4)
        head = f"  {name:{columns}}  "
        if len(name) > columns:
            lines.append(_filled(name, width, " " * 6, "  "))
            head = indent
        lines.append(_filled(text, width, indent, head).rstrip() or head.rstrip())
    return "\n".join(lines)


def _filled(text: str, width: int, indent: str = "", head: str = "") -> str:
    """Lines of whole words; a word that is too long stays whole."""
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
