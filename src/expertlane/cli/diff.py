"""`expertlane diff`: two results, deployment by deployment."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.output import PrintOptions
from expertlane.errors import UserError
from expertlane.spec.files import strict_json

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


@takes_groups
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help=_RESULTS)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The results to compare with A.")],
    *,
    own: _Options,
    print_options: PrintOptions,
) -> None:
    """Compare two results, deployment by deployment and load by load; runs nothing.

    Says what is faster in B, what is slower, and what is not significant: where the interval of
    B over A contains 1. Of two projections on the same devices, errors that both have cancel.
    Compared are times on a clock that both have: virtual time, else wall time, else projected.

    Noise of a measured change is known if other processes used less than 5 % of the cores, and
    with 3 repetitions or more. For CI: a quiet machine, and the repetitions of expertlane compare.

    \b
    Exit code
      1   a change for the worse, beyond --threshold and its noise
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
    from expertlane.report.diff import report_of_difference, too_little_in_common
    from expertlane.results.diff import difference
    from expertlane.results.file import read

    names = str(first), str(second)
    found = difference(read(first), read(second), names, own.threshold / 100)
    report = report_of_difference(found, output.command_line(), output.now())
    plain = asdict(found) | {
        "num_regressions": len(found.regressions),
        "num_unpaired": found.num_unpaired,
    }
    as_json = strict_json(plain, indent=2, ensure_ascii=False) + "\n"
    output.print_report(report, print_options, None, lambda: as_json)
    if found.has_few_pairs:
        raise UserError(
            f"{too_little_in_common(found)}; give results of the same deployments and loads"
        )
    if found.regressions:
        raise typer.Exit(REGRESSION)
