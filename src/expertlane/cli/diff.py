"""`expertlane diff`: two results, deployment by deployment."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.output import OutputOptions, export_option, out_option
from expertlane.errors import UserError
from expertlane.spec.files import strict_json, write_text

REGRESSION = 1  # exit code
THRESHOLD_PERCENT = 5.0

_RESULTS = "A results.json of compare, plan, simulate or bench, or the folder it is in."


@dataclass(frozen=True, kw_only=True)
class _Options:
    threshold: float = typer.Option(
        THRESHOLD_PERCENT,
        metavar="PERCENT",
        rich_help_panel=Panel.OUTPUT,
        help="By how much a metric may get worse; beyond, and beyond its noise, the exit code is "
        "1.",
    )
    strict: bool = typer.Option(
        False,
        rich_help_panel=Panel.OUTPUT,
        help="Also count changes of a busy machine or of unknown noise.",
    )


@dataclass(frozen=True, kw_only=True)
class _Output(OutputOptions):
    out: Path | None = out_option("none: nothing is written")
    export: Literal["csv", "parquet"] | None = export_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.export is not None and self.out is None:
            raise UserError("--export writes a file; give --out a folder")


@takes_groups
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help=_RESULTS)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The results to compare with A.")],
    *,
    own: _Options,
    output_options: _Output,
) -> None:
    """Compare two results, deployment by deployment and load by load; runs nothing.

    Says what is faster in B, what is slower, and what is not significant: where the interval of
    B over A contains 1. Measured intervals are independent; projections on the same devices share
    their terms, whose errors cancel. Where the clocks differ, those that both have are compared.

    A measured change is trustworthy if other processes used less than 5 % of the cores, and if
    repetitions tell its noise. For CI: a quiet machine, and the repetitions of expertlane compare.

    \b
    Exit code
      1   a trustworthy change for the worse, beyond --threshold and its noise;
          with --strict also one of a busy machine or of unknown noise
      2   the two cannot be compared, as they are of two commands or models, or
          most metrics have no partner (of plans: only the first choices need one)
      0   otherwise

    \b
    Examples:
      expertlane diff results/before results/after
      expertlane diff main.json branch.json --threshold 3 --quiet
          in CI: one line, exit code 1 on a regression
      expertlane diff results/before results/after --json | jq '.changes[] | .gain'
    """
    from expertlane.report import markdown
    from expertlane.report.diff import report_of_difference, too_little_in_common
    from expertlane.results.diff import difference
    from expertlane.results.file import aligned, read, write_table

    folder = output_options.out
    if folder is not None:
        output.check_folder(folder)
    names = str(first), str(second)
    created = output.now()
    results = read(first), read(second)
    found = difference(*results, names, own.threshold / 100, own.strict)
    report = report_of_difference(found, output.command_line(), created)
    plain = asdict(found) | {
        "other_parts": found.other_parts,
        "num_regressions": len(found.regressions),
        "num_not_trustworthy": len(found.untrusted),
        "num_unpaired": len(found.unpaired),
    }
    as_json = strict_json(plain, indent=2, ensure_ascii=False) + "\n"
    output.print_report(report, output_options, None, lambda: as_json)
    if folder is not None:
        texts = {"diff.json": as_json, "diff.md": markdown.render(report)}
        written = [write_text(folder / name, words) for name, words in texts.items()]
        if output_options.export is not None:
            rows = aligned([change.row() for change in found.changes])
            written.append(write_table(rows, folder / "diff.csv", output_options.export))
        output.print_written(written)
    if found.has_few_pairs:
        raise UserError(
            f"{too_little_in_common(found)}; give results of the same deployments and loads"
        )
    if found.regressions:
        raise typer.Exit(REGRESSION)
