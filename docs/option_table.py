"""Write options.md: every option of every command, from the code.

Run it after a change of an option: `python docs/option_table.py`. `make docs` does,
as docs/conf.py does; the page is not in the repository.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from expertlane.cli.app import app
from expertlane.cli.help import Panel, option_record, panels_of, spellings, value_of

_HEAD = """# All options

Written by `docs/option_table.py` from the code; don't edit it. An option has one spelling and one
meaning in all commands; what differs is its default. `expertlane COMMAND --help` shows its own.
"""


@dataclass
class Option:
    """An option, in all commands that have it.

    Attributes:
        panels: where its help has it, by command; likewise `values`, what it takes, `texts` and
            `defaults`.
    """

    name: str
    panels: dict[str, Panel] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def panel(self) -> Panel:
        """The panel that most commands have it in."""
        return Counter(self.panels.values()).most_common(1)[0][0]


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every command with its name and a context; those of a group under `group command`."""
    group = group or typer.main.get_command(app)
    for each, command in group.commands.items():
        path = f"{name} {each}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, path)
        else:
            yield path, command, command.context_class(command, info_name=path)


def options() -> list[Option]:
    """All options but `--help`, by panel and name."""
    found: dict[str, Option] = {}
    for path, command, context in commands():
        for panel, in_panel in panels_of(command, context).items():
            for each in in_panel:
                if (name := spellings(each)).endswith("--help"):
                    continue
                option = found.setdefault(name, Option(name))
                option.panels[path] = panel
                option.values[path] = value_of(each)
                _, option.texts[path], option.defaults[path] = option_record(each, context)
    order = list(Panel)
    return sorted(found.values(), key=lambda option: (order.index(option.panel), option.name))


def render() -> str:
    """The page."""
    parts, panel = [_HEAD], None
    for each in options():
        if each.panel is not panel:
            panel = each.panel
            parts.append(
                f"\n## {panel.value}\n\n| option | what it does | commands |\n| --- | --- | --- |\n"
            )
        value = max(each.values.values(), key=len).replace("|", "\\|")
        name = f"{each.name} {value}".strip()
        parts.append(f"| `{name}` | {_words(each)} | {_commands(each)} |\n")
    return "".join(parts)


def _words(option: Option) -> str:
    """The sentences that all commands have; then the others, after the commands that have them."""
    commands_of: dict[str, list[str]] = {}
    for command, text in option.texts.items():
        for sentence in re.split(r"(?<=\.) (?=[A-Z])", text):
            commands_of.setdefault(sentence, []).append(command)
    common = [each for each, of in commands_of.items() if len(of) == len(option.texts)]
    if not common:
        return max(option.texts.values(), key=len).replace("|", "\\|")
    own: dict[str, list[str]] = {}
    for sentence, of in commands_of.items():
        if sentence not in common:
            own.setdefault(", ".join(of), []).append(sentence)
    parts = common + [f"{names}: {' '.join(said)}" for names, said in own.items()]
    return " ".join(parts).replace("|", "\\|")


def _commands(option: Option) -> str:
    """The commands by their default."""
    by_default: dict[str, list[str]] = {}
    for command, default in option.defaults.items():
        by_default.setdefault(default.removeprefix("default: "), []).append(command)
    return "; ".join(
        ", ".join(names) + (f" ({default})" if default else "")
        for default, names in by_default.items()
    ).replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(render(), encoding="utf-8")
