"""Groups of options: what typer sees of a command that takes them."""

import inspect
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from expertlane.cli.app import app
from expertlane.cli.option_groups import takes_groups


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = typer.Option(3, metavar="N", help="How large.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str | None = typer.Option(None, help="What it is called.")
    inner: Inner
    is_loud: bool = typer.Option(False, "--loud", help="In capitals.")
    text: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "text", f"{self.name} {self.inner.size}")


@pytest.fixture
def run():
    """Run a command that takes an argument of its own and a group in a group."""
    kept = []

    @takes_groups
    def command(what: Annotated[str, typer.Argument()], outer: Outer) -> None:
        """Do it."""
        kept.append((what, outer.text, outer.is_loud))

    def run_with(*arguments):
        kept.clear()
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command()(command)
        done = CliRunner().invoke(single, list(arguments))
        return done.exit_code, done.output, kept

    return run_with


def test_the_options_of_all_groups_become_the_commands(run):
    assert run("it") == (0, "", [("it", "None 3", False)])
    assert run("it", "--name", "x", "--size", "5", "--loud") == (0, "", [("it", "x 5", True)])


def test_help_and_mistakes_name_each_option(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "Do it." in out
    assert [word for word in out.split() if word.startswith("--")] == [
        "--name",
        "--size",
        "--loud",
        "--help",
    ]
    assert run("it", "--size", "x")[0] == 2


def test_no_option_of_a_command_is_declared_twice():
    for command in app.registered_commands:
        names = list(inspect.signature(command.callback).parameters)
        assert len(set(names)) == len(names)
        assert "options" not in names
