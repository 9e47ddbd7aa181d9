"""`expertlane plan`: which deployment of a model to choose on a cluster, and why."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.options import (
    ModelArgument,
    OutputOptions,
    ProjectionOptions,
    cluster_option,
    takes_groups,
)
from expertlane.errors import UserError
from expertlane.spec.deployment import PayloadType
from expertlane.spec.files import write_text
from expertlane.spec.ranges import parse_sizes, shown

if TYPE_CHECKING:
    from expertlane.plan.commands import ServeTarget
    from expertlane.spec.model import ModelConfig
    from expertlane.spec.workload import Workload

_EXPERIMENT = "experiment.toml"
_DEFAULT_WORKLOAD = {"num_sequences": 256, "prompt_len": 1024, "output_len": 256}
DEFAULT_WORKLOAD = ",".join(f"{key}={number}" for key, number in _DEFAULT_WORKLOAD.items())


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    model: ModelArgument
    cluster: str = cluster_option("h100x16")
    workload: str = typer.Option(
        DEFAULT_WORKLOAD,
        metavar="KEY=N,…",
        rich_help_panel=Panel.WORKLOAD,
        help="num_sequences: how many are to be served at once; prompt_len, output_len: tokens of "
        "each.",
    )
    max_tpot_ms: float | None = typer.Option(
        None,
        metavar="MS",
        rich_help_panel=Panel.WORKLOAD,
        help="Longest mean time of an output token.",
    )
    max_ttft_ms: float | None = typer.Option(
        None,
        metavar="MS",
        rich_help_panel=Panel.WORKLOAD,
        help="Longest mean time from a prompt's arrival to a first token.",
    )


@takes_groups
def plan(own: _Options, output_options: OutputOptions, projection: ProjectionOptions) -> None:
    """Find the deployment that serves most tokens a second on a cluster, within limits.

    Tries every layout × replicas × dispatch form × overlap × micro-batches × redundant experts,
    in one pool and with prefill and decode apart; projects each with a cost model calibrated on
    public measurements. Needs no GPU, loads no weights. Says why the others lose, and writes the
    winner as an experiment for expertlane compare, and as vLLM and SGLang command lines.

    \b
    Examples:
      expertlane plan paper
          the paper's model on its cluster, 16 H100
      expertlane plan ./my-checkpoint --cluster h100x32 --max-tpot-ms 50 \\
          --workload num_sequences=1024,prompt_len=2000,output_len=500
          the most tokens a second with at most 50 ms a token
      expertlane plan org/model --dtype float8 --routing-trace trace.npz
          by the experts that your own traffic chooses
      expertlane plan mine --cluster machine.tomlx2
          on a machine that expertlane calibrate measured
      expertlane plan paper --json | jq '.deployments[0].layout'
          for other programs
    """
    from expertlane.cost.laws.execution import Execution
    from expertlane.cost.laws.profile_file import parse_cluster
    from expertlane.cost.routing import choose_routing
    from expertlane.plan.candidates import Goals, PlanRequest
    from expertlane.plan.project import Setting
    from expertlane.plan.results import make_plan

    found, devices = find_model(own.model, weights=False), parse_cluster(own.cluster)
    limits_s = (each and each / 1e3 for each in (own.max_tpot_ms, own.max_ttft_ms))
    workload = _workload(own.workload, found.config)
    routing = choose_routing(
        found.config, projection.routing_trace, projection.skew, num_sampled_layers=2
    )
    types = found.number_types(projection, devices)
    payload: PayloadType = "float8" if types.weights == "float8" else "model"
    setting = Setting(types, Execution(projection.execution), routing.source, payload)
    name = output.slug("plan", found.config.name, devices)
    folder = output.results_folder(output_options.out, name)
    cautions = tuple(filter(None, [found.priced_wider(types)]))
    request = PlanRequest(found.config, devices, workload, Goals(*limits_s), setting)
    with output.progress_on_stderr() as progress:
        plan = make_plan(request, routing, progress, cautions)
    results = plan.results(
        command=output.command_line(),
        loaded=_served(found),
        experiment=str(folder / _EXPERIMENT),
    )
    checkpoint = os.path.abspath(found.folder) if found.folder else None
    text = plan.experiment(name, checkpoint, f"Written by: {results.command}")
    output.publish(
        results, folder, output_options, also=lambda: [write_text(folder / _EXPERIMENT, text)]
    )


def _served(found: FoundModel) -> "ServeTarget":
    """A folder by its absolute path: a relative one could be taken for a hub id."""
    from expertlane.plan.commands import ServeTarget

    if found.folder is None:
        return ServeTarget("MODEL")
    is_local = os.path.isdir(os.path.expanduser(found.name))
    model = os.path.abspath(found.folder) if is_local else found.name
    return ServeTarget(model, found.quantization)


def _workload(text: str, model: "ModelConfig") -> "Workload":
    """Read `num_sequences=256,prompt_len=1024,output_len=256`; what is left out is the default."""
    from expertlane.spec.workload import Workload

    given = parse_sizes("--workload", "unknown key", text, tuple(_DEFAULT_WORKLOAD))
    if not given:
        raise UserError(f"--workload is {shown(text)}; an example: {DEFAULT_WORKLOAD}")
    workload = Workload(**(_DEFAULT_WORKLOAD | given))
    workload.check_model(model)
    return workload
