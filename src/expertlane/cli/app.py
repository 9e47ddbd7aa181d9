"""The command line: its commands. Heavy imports wait until one runs."""

from typing import Annotated

import typer

from expertlane import __version__
from expertlane.cli.balance import balance
from expertlane.cli.bench import bench
from expertlane.cli.calibrate import calibrate
from expertlane.cli.compare import compare
from expertlane.cli.diff import diff
from expertlane.cli.drill import drill
from expertlane.cli.generate import generate
from expertlane.cli.help import Command, Group
from expertlane.cli.list import app as list_app
from expertlane.cli.plan import plan
from expertlane.cli.report import report
from expertlane.cli.scale import scale
from expertlane.cli.serve import serve
from expertlane.cli.simulate import simulate
from expertlane.cli.verify import verify

app = typer.Typer(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: quick to start, and the same in a pipe
    pretty_exceptions_enable=False,
)
for _command, _help in {
    compare: "Run deployments side by side; say which is faster, and why.",
    plan: "Find the best deployment of a model on a cluster, and why it is.",
    generate: "Continue prompts with a model, or talk to it.",
    serve: "Serve a model over HTTP, with the OpenAI API.",
    scale: "Give a running server another layout, under load.",
    bench: "Measure throughput and latency under load.",
    verify: "Say whether a server computes the model that it claims.",
    drill: "Kill a part of a server under load; say what was lost.",
    simulate: "Project one deployment on target hardware; needs no GPU.",
    balance: "Place experts on ranks by the load in a routing trace.",
    calibrate: "Measure this machine, to plan and simulate for it.",
    diff: "Say what changed between two results; exit code 1 on a regression.",
    report: "Show a results.json again, and write its pages.",
}.items():
    app.command(short_help=_help, cls=Command)(_command)
app.add_typer(list_app, name="list", short_help="List models, clusters, profiles, valid layouts.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertlane {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _expertlane(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run, serve and compare expert-parallel inference of Mixture-of-Experts models.

    \b
    Examples:
      expertlane compare
          the paper's deployments, on this machine
      expertlane plan CHECKPOINT --cluster h100x16
          which deployment to choose, without a GPU
      expertlane simulate paper --layout dp=16,ep=16 --cluster h100x16
          one deployment there, in detail
      expertlane list layouts paper --cluster h100x16
          what may be chosen

    \b
    Environment:
      EXPERTLANE_BACKEND=cpu|cuda|torch
          expertlane's kernels for CPUs or for GPUs, or PyTorch's; by default
          expertlane's where they work
      EXPERTLANE_PIN=0|1
          pin ranks to cores: 0 never, 1 always; by default unless another engine
          of expertlane runs on this machine
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
