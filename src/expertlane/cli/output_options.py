"""Options of printing, and of files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import typer

from expertlane.cli.help import Panel
from expertlane.errors import UserError


def out_option(default: str) -> Any:
    """`--out`: the folder for files."""
    return typer.Option(
        None,
        "--out",
        "-o",
        metavar="DIR",
        show_default=default,
        rich_help_panel=Panel.OUTPUT,
        help="Folder that files are written to.",
    )


def json_option() -> Any:
    """JSON for other programs."""
    return typer.Option(
        False, "--json", rich_help_panel=Panel.OUTPUT, help="Print JSON instead of text."
    )


def export_option() -> Any:
    """A flat table beside the other files."""
    return typer.Option(
        None,
        "--export",
        rich_help_panel=Panel.MORE_OUTPUT,
        help="Also write a flat table for other programs, a row for each deployment and phase or "
        "load. parquet needs pyarrow.",
    )


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """Options for how much of the answer is printed.

    Raises:
        UserError: two forms at once.
    """

    panel: ClassVar = Panel.OUTPUT
    full: bool = typer.Option(False, "--full", help="Print all tables.")
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print one line.")
    as_json: bool = json_option()

    def __post_init__(self) -> None:
        given = [
            name
            for name, is_given in (
                ("--full", self.full),
                ("--quiet", self.quiet),
                ("--json", self.as_json),
            )
            if is_given
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(PrintOptions):
    """Options of printing, and the folder for files."""

    out: Path | None = out_option("results/NAME, after the command and its subject")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(AnswerOptions):
    """Options of printing and files, with export of results.

    Raises:
        UserError: as in `PrintOptions`, or a library for `--export` is missing.
    """

    export: Literal["csv", "parquet"] | None = export_option()

    def __post_init__(self) -> None:
        from expertlane.results.table import check_format  # numpy, not for the help of commands

        check_format(self.export)
        super().__post_init__()
