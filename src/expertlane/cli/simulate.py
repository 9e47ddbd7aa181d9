"""`expertlane simulate`: one deployment on a modelled cluster, on a virtual clock."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.load import SimulatedLoad
from expertlane.cli.model import find_model
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    DeploymentOptions,
    ModelArgument,
    ProjectionOptions,
    SchedulerOptions,
    cluster_option,
    layout_option,
    trace_option,
)
from expertlane.cli.output_options import OutputOptions
from expertlane.errors import UserError, naming

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertlane.cli.model import FoundModel
    from expertlane.cost.laws.profile_file import ModelledCluster
    from expertlane.cost.multi_token import MultiToken
    from expertlane.results.results import Results
    from expertlane.simulate.simulator import Outcome, ServingSetup, Simulator


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    layout: str = layout_option(...)
    cluster: str = cluster_option(...)
    prefill_layout: str | None = typer.Option(
        None,
        metavar="LAYOUT",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Disaggregated: a prefill pool of its own, on further devices; --layout then decodes. "
        "All other options hold for both pools.",
    )
    mtp: int = typer.Option(
        0,
        metavar="N",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Multi-token prediction: N draft tokens per step.",
    )
    mtp_acceptance: float | None = typer.Option(
        None,
        metavar="P",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Acceptance rate of drafts, 0 to 1; needed with --mtp.",
    )
    trace: bool = trace_option()


@dataclass(frozen=True, kw_only=True)
class _Deployment(DeploymentOptions):
    def __post_init__(self) -> None:
        for name in ("dispatch", "overlap"):
            if getattr(self, name) == "auto":
                raise UserError(
                    f"--{name} auto is timed on real ranks; simulate each of the others, or let "
                    "expertlane plan choose"
                )
        super().__post_init__()


@takes_groups
def simulate(
    model: ModelArgument,
    own: _Options,
    output_options: OutputOptions,
    load_options: SimulatedLoad,
    projection: ProjectionOptions,
    deployment: _Deployment,
    scheduler: SchedulerOptions,
) -> None:
    """Project one deployment on target hardware.

    The scheduler of real runs, on a virtual clock; steps are priced by a profile fitted to
    published measurements or made by expertlane calibrate. Says what limits the deployment,
    and where every number comes from. Needs no GPU and no weights.

    \b
    Examples:
      expertlane simulate paper --layout dp=16,ep=16 --cluster h100x16
      expertlane simulate ./my-checkpoint --layout tp=8 --cluster h100x8 \\
          --dtype float8 --batch 64,256
      expertlane simulate ./my-checkpoint --layout dp=16,ep=16 \\
          --cluster h100x16 --rate 20 --prompt-len 512:2048 --skew 0.6
      expertlane simulate ./my-checkpoint --layout dp=8,ep=8 \\
          --prefill-layout tp=8 --cluster h100x16 --trace
    """
    call = output_options.call()
    found = run(model, own, load_options, projection, deployment, scheduler, call)
    output.publish(found, output_options)


def run(
    model: ModelArgument,
    own: _Options,
    load_options: SimulatedLoad,
    projection: ProjectionOptions,
    deployment: _Deployment,
    scheduler: SchedulerOptions,
    call: output.Call,
) -> output.Found:
    """Simulate, without a word on standard output."""
    loads = load_options.loads()
    multi_token = _multi_token(own.mtp, own.mtp_acceptance)
    found_model = find_model(model, weights=False)

    from expertlane.cost.laws.execution import Execution
    from expertlane.cost.laws.profile_file import parse_cluster
    from expertlane.cost.routing import choose_routing
    from expertlane.results.cost import with_costs
    from expertlane.simulate.results import simulation
    from expertlane.simulate.simulator import ServingSetup, Simulator
    from expertlane.spec.workload import check_lengths

    config, seed = found_model.config, load_options.seed
    modelled = parse_cluster(own.cluster)
    routing = choose_routing(config, projection.routing_trace, projection.skew, seed)
    setup = ServingSetup(
        layout=found_model.lay_out(own.layout),
        prefill_layout=None
        if own.prefill_layout is None
        else found_model.lay_out(own.prefill_layout),
        options=deployment.options,
        types=found_model.number_types(projection, modelled),
        execution=Execution(projection.execution),
        routing=routing.source,
        multi_token=multi_token,
        **vars(scheduler),
    )
    for load in loads:
        check_lengths(load, config.max_position_embeddings)
    _check(found_model, setup, modelled)
    folder = call.folder(output.slug("simulate", config.name, own.cluster))
    simulators = [Simulator(config, modelled, setup, load) for load in loads]
    runs = [(each, _run(each, seed, is_alone=len(loads) == 1)) for each in simulators]
    results = simulation(
        runs,
        load_options.question(loads[0]),
        routing,
        load_options.slos,
        command=call.command,
        caution=found_model.priced_wider(setup.types),
    )
    if load_options.price is not None:
        results = with_costs(results, load_options.price)
    traced = folder if own.trace else None
    return output.Found(results, folder, lambda: _write_trace(runs, results, traced))


def _write_trace(
    runs: "Sequence[tuple[Simulator, Outcome]]", results: "Results", folder: Path | None
) -> list[Path]:
    """The steps of the best run, if there is a folder for them; gives the files."""
    if folder is None:
        return []

    from expertlane.results.chrome_trace import write_traces
    from expertlane.simulate.results import best_run

    simulator, outcome = best_run(runs, results.deployments[0].serving)
    return write_traces({str(simulator.setup.layout): simulator.trace(outcome)}, folder)


def _check(found: "FoundModel", setup: "ServingSetup", modelled: "ModelledCluster") -> None:
    """Both pools.

    Raises:
        UserError: a layout does not suit the model or the cluster.
    """
    from expertlane.simulate.simulator import check_fits_cluster

    check_fits_cluster(modelled, setup)
    per_node = modelled.profile.ranks_per_node
    found.check(setup.layout, setup.options, per_node)
    if setup.prefill_layout is not None:
        with naming("--prefill-layout"):
            found.check(setup.prefill_layout, setup.options, per_node)


def _multi_token(num_drafts: int, acceptance: float | None) -> "MultiToken":
    from expertlane.cost.multi_token import MultiToken

    if (acceptance is None) == (num_drafts > 0):
        raise UserError(
            f"--mtp is {num_drafts} and --mtp-acceptance "
            + ("not given" if acceptance is None else f"{acceptance:g}")
            + "; give both, 1 or more tokens and a share from 0 to 1, or neither"
        )
    with naming("--mtp"):
        return MultiToken(num_drafts, acceptance or 0.0)


def _run(simulator: "Simulator", seed: int, *, is_alone: bool) -> "Outcome":
    num_runs, load = simulator.num_runs, simulator.load
    times = "" if num_runs == 1 else f" {num_runs} times, for the bounds"
    name = "" if is_alone else f"{load}: "
    description = f"{name}simulating {load.num_requests:,} requests{times}"
    with output.task_on_stderr(description, num_runs * load.num_requests) as advance:
        return simulator.run(seed, advance)
