"""`expertlane judge`: measured against projected numbers, and corrections of assumptions."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import cluster_option
from expertlane.cli.output import OutputOptions
from expertlane.spec.files import strict_json, write_text


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.PROJECTION
    cluster: str | None = cluster_option(None, "that of the projection")
    of_engine: str | None = typer.Option(
        None,
        metavar="NAME",
        show_default="the measured one",
        help="Engine whose deployments are judged, if several were measured.",
    )


@takes_groups
def judge(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS",
            help="A results.json of compare, or its folder, with measured and projected "
            "deployments; or one with measured deployments, and one of plan or simulate.",
        ),
    ],
    *,
    own: _Options,
    output_options: OutputOptions,
) -> None:
    """Find the wrong assumption of a projection by measurements; runs no model.

    Projects every measured deployment again with one assumption changed at a time: bandwidth and
    latency of links, families of kernels, overheads of host and scheduler, routing skew. Prints
    which assumption explains most of the difference, its share and a confidence; if measurements
    do not identify one, what to measure to separate them. Then measured against projected, by
    deployment and by part of a step. Writes corrections.toml for --corrections of plan, simulate
    and compare.

    \b
    Examples:
      expertlane judge results/mine
          results of expertlane compare mine.toml --project
      expertlane judge results/measured results/plan-mine-h100x16
          measured deployments, and the plan that chose them
      expertlane judge results/mine --cluster machine.tomlx2
          measured deployments, projected on a profile of calibrate
      expertlane plan mine --cluster h100x16 --corrections \\
          results/judge-MODEL/corrections.toml
          a better plan
      expertlane judge results/mine --json | jq '.candidates[0]'
    """
    from expertlane.comparison.judge import judge as judged
    from expertlane.comparison.judge import row_of
    from expertlane.cost.laws.corrections import FILE_NAME, write_corrections
    from expertlane.report.files import write_reports
    from expertlane.report.judge import report_of_judgement
    from expertlane.results.file import aligned, read, write_table

    read_in = [read(each) for each in results]
    folder = output.Call.typed(output_options.out).folder(
        output.slug("judge", read_in[0].model_name)
    )
    assert folder is not None, "a command always writes"
    created = output.now()
    with output.progress_on_stderr() as progress:
        found = judged(read_in, progress, own.cluster, own.of_engine)
    written = [write_corrections(found.corrections, folder / FILE_NAME)]
    report = report_of_judgement(found, output.command_line(), created, written[0])
    text = strict_json(asdict(found), indent=2, ensure_ascii=False) + "\n"
    written.append(write_text(folder / "judge.json", text))
    try:
        output.print_report(report, output_options, folder / "report.html", lambda: text)
    finally:
        written += write_reports(report, folder)
        if output_options.export is not None:
            rows = aligned([row_of(each) for each in found.numbers])
            written.append(write_table(rows, folder / "judge.csv", output_options.export))
    output.print_written(written)
