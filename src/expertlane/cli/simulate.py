"""`expertlane simulate`: one deployment on a modelled cluster, on a virtual clock."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.load import SimulatedLoad
from expertlane.cli.model import find_model
from expertlane.cli.modelled import DraftOptions, ProjectionOptions, cluster_option
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    TOKENS_OF_STEP,
    DeploymentOptions,
    ModelArgument,
    RequestOptions,
    layout_option,
    placement_option,
    trace_option,
)
from expertlane.cli.output_options import OutputOptions
from expertlane.errors import UserError, naming
from expertlane.spec.deployment import PlacementMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertlane.cli.model import FoundModel
    from expertlane.cost.laws.profile_file import ModelledCluster
    from expertlane.results.results import Results
    from expertlane.simulate.setup import ServingSetup
    from expertlane.simulate.simulator import Outcome, Simulator


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    layout: str = layout_option(...)
    cluster: str = cluster_option(...)
    prefill_layout: str | None = typer.Option(
        None,
        metavar="LAYOUT",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Disaggregated: a separate prefill pool, on further devices; --layout is then the "
        "decode pool's. --prefill-dispatch is the prefill pool's, all other options hold for both.",
    )
    trace: bool = trace_option()


@dataclass(frozen=True, kw_only=True)
class _Deployment(DeploymentOptions):
    placement: str = placement_option("load", is_modelled=True)
    methods: ClassVar[tuple[PlacementMethod, ...]] = get_args(PlacementMethod)

    def __post_init__(self) -> None:
        for name in ("dispatch", "overlap"):
            if getattr(self, name) == "auto":
                raise UserError(
                    f"--{name} auto is timed on real ranks; simulate each of the others, or let "
                    "expertlane plan choose"
                )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class _Scheduler(RequestOptions):
    max_num_batched_tokens: int | None = typer.Option(
        None, metavar="N", show_default="2048, or --framework's", help=TOKENS_OF_STEP
    )


@takes_groups
def simulate(
    model: ModelArgument,
    own: _Options,
    output_options: OutputOptions,
    load_options: SimulatedLoad,
    projection: ProjectionOptions,
    deployment: _Deployment,
    drafts: DraftOptions,
    scheduler: _Scheduler,
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
    found = run(model, own, load_options, projection, deployment, drafts, scheduler, call)
    output.publish(found, output_options)


def run(
    model: ModelArgument,
    own: _Options,
    load_options: SimulatedLoad,
    projection: ProjectionOptions,
    deployment: _Deployment,
    drafts: DraftOptions,
    scheduler: _Scheduler,
    call: output.Call,
) -> output.Found:
    """Simulate, without a word on standard output."""
    loads = load_options.loads()
    multi_token = drafts.multi_token()
    found_model = find_model(model, weights=False)

    from expertlane.cost.laws.execution import Execution
    from expertlane.cost.laws.frameworks import served_cluster
    from expertlane.cost.routing import choose_routing
    from expertlane.results.cost import with_costs
    from expertlane.simulate.results import simulation
    from expertlane.simulate.setup import ServingSetup
    from expertlane.simulate.simulator import Simulator
    from expertlane.spec.workload import check_lengths

    config, seed = found_model.config, load_options.seed
    modelled = served_cluster(own.cluster, projection.framework)
    routing = choose_routing(config, projection.routing_trace, projection.skew, seed)
    with naming("--prefill-layout"):
        text = own.prefill_layout
        prefill_layout = None if text is None else found_model.lay_out(text)
    layout, options = found_model.lay_out(own.layout), deployment.options
    if options.placement == "load" and all(
        each is None or each.ep == 1 for each in (layout, prefill_layout)
    ):
        options = replace(options, placement="linear")  # every rank has a part of every expert
    setup = ServingSetup(
        layout=layout,
        prefill_layout=prefill_layout,
        options=options,
        types=found_model.number_types(projection, modelled),
        execution=Execution(projection.execution),
        routing=routing.source,
        multi_token=multi_token,
        prefill_options=None,
        **_sizes(scheduler, projection.framework),
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
        cautions=found_model.cautions(setup.types),
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


def _sizes(scheduler: _Scheduler, framework: str | None) -> dict[str, int]:
    """The scheduler's, what was asked for before what a framework has."""
    from expertlane.cost.laws.frameworks import find_framework

    asked = {name: value for name, value in vars(scheduler).items() if value is not None}
    if framework is None:
        return asked
    found = find_framework(framework)
    of_framework = {
        "max_num_batched_tokens": found.max_num_batched_tokens,
        "prompt_wait_steps": found.prompt_wait_steps,
    }
    return of_framework | asked


def _check(found: "FoundModel", setup: "ServingSetup", modelled: "ModelledCluster") -> None:
    """Both pools.

    Raises:
        UserError: a layout does not suit the model or the cluster.
    """
    from expertlane.simulate.setup import check_fits_cluster

    check_fits_cluster(modelled, setup)
    per_node = modelled.profile.ranks_per_node
    for role, layout in setup.pools.items():
        with naming("--prefill-layout") if role == "prefill" else nullcontext():
            found.check(layout, setup.options_of(role), per_node, is_modelled=True)


def _run(simulator: "Simulator", seed: int, *, is_alone: bool) -> "Outcome":
    num_runs, load = simulator.num_runs, simulator.load
    times = "" if num_runs == 1 else f" {num_runs} times, for the bounds"
    name = "" if is_alone else f"{load}: "
    description = f"{name}simulating {load.num_requests:,} requests{times}"
    with output.task_on_stderr(description, num_runs * load.num_requests) as advance:
        return simulator.run(seed, advance)
