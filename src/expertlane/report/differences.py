"""Differences between the servers of a comparison: versions, KV caches, options of commands."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from expertlane.errors import SpecError
from expertlane.report.document import Column, Table, text
from expertlane.report.numbers import NONE, counted, shortened
from expertlane.results.record import DeploymentRecord, ServerRecord
from expertlane.spec.files import parse_json, shown_json

_VERSION, _CACHE = "version", "KV cache"
_UNLIKE = frozenset({"--port", "--host"})  # of every server its own
_SHORT = 12  # letters of a value in a sentence
_MOST = 6  # settings in a sentence
_LONG = 80  # letters of a value in the table


@dataclass(frozen=True)
class Difference:
    """A setting in which servers differ.

    Attributes:
        values: by deployment; those that do not tell it are left out.
    """

    name: str
    values: Mapping[str, str]

    @property
    def by_value(self) -> dict[str, list[str]]:
        """The deployments with each value."""
        found: dict[str, list[str]] = {}
        for name, value in self.values.items():
            found.setdefault(value, []).append(name)
        return found


def differences_of(records: Sequence[DeploymentRecord]) -> list[Difference]:
    """Settings in which servers differ: options and files only within an engine.

    Options of two engines have different names for the same things.
    """
    servers = {each.name: each.server for each in records if each.server is not None}
    versions = {name: each.software for name, each in servers.items() if each.software}
    caches = {
        name: f"{each.kv_tokens:,} tokens"
        for name, each in servers.items()
        if each.kv_tokens is not None
    }
    found = [Difference(_VERSION, versions), Difference(_CACHE, caches)]
    engines: dict[str, dict[str, dict[str, str]]] = {}
    for name, each in servers.items():
        if settings := settings_of(each):
            engine = each.engine or each.software.partition(" ")[0]
            engines.setdefault(engine, {})[name] = settings
    for own in engines.values():
        for setting in dict.fromkeys(each for settings in own.values() for each in settings):
            values = {name: settings.get(setting, NONE) for name, settings in own.items()}
            found.append(Difference(setting, values))
    return [each for each in found if len(each.by_value) > 1]


def settings_of(server: ServerRecord) -> dict[str, str]:
    """Options and variables of a server's command, and what is in its files, by name.

    Of a server that ran already, the settings that it tells.
    """
    found = dict(_options(server.command))
    for content in server.files.values():
        try:
            table = parse_json(content)
        except (SpecError, JSONDecodeError):
            continue
        found |= {name: _shown(value) for name, value in dict(_flat(table)).items()}
    found |= {f"--{name.replace('_', '-')}": value for name, value in server.settings.items()}
    return {name: value for name, value in found.items() if name not in _UNLIKE}


def _options(command: str) -> Iterator[tuple[str, str]]:
    """`--name value`, `--name=value` and NAME=value of a shell's command."""
    try:
        words = shlex.split(command)
    except ValueError:
        return
    name, values, is_program = "", list[str](), False
    for word in words:
        if word.startswith("--"):
            if name:
                yield name, " ".join(values) or "on"
            name, mark, value = word.partition("=")
            values = [value] if mark else []
        elif name:
            values.append(word)
        elif not is_program and word.partition("=")[0].isidentifier() and "=" in word:
            yield word.partition("=")[0], word.partition("=")[2]
        else:
            is_program = True
    if name:
        yield name, " ".join(values) or "on"


def _flat(table: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested tables, under names with dots."""
    if not isinstance(table, dict):
        return
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else shown_json(value)


def differs_in(records: Sequence[DeploymentRecord]) -> str:
    """The differences, in a line or two; empty if nothing is known to differ.

    Versions are left out where each engine has one, since the line above has them.
    """
    found = differences_of(records)
    engines = {each.server.engine for each in records if each.server is not None}
    parts = []
    for each in found:
        if each.name == _VERSION and "" not in engines and len(each.by_value) == len(engines):
            continue
        values = [*each.by_value]
        is_short = len(values) < 4 and all(len(value) <= _SHORT for value in values)
        told = f" {' / '.join(values)}" if is_short else ""
        parts.append(f"{each.name}{told}")
    if len(parts) > _MOST:
        parts[_MOST:] = [f"and {counted(len(parts) - _MOST, 'setting')} more"]
    return "; ".join(parts)


_COLUMNS: tuple[Column[tuple[str, str, str]], ...] = (
    text("setting", lambda each: each[0]),
    text("value", lambda each: each[1]),
    text("deployments", lambda each: each[2]),
)


def table_of(records: Sequence[DeploymentRecord]) -> Table | None:
    """A row for each value of each setting in which servers differ; None if there is none."""
    rows = [
        (each.name if not number else "", shortened(value, _LONG), ", ".join(names))
        for each in differences_of(records)
        for number, (value, names) in enumerate(each.by_value.items())
    ]
    return Table.of("", _COLUMNS, rows) if rows else None
