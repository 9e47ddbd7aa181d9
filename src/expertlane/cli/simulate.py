"""`expertlane simulate`: one deployment on a modelled cluster, on a virtual clock."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.load import SimulatedLoad
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import publishes
from expertlane.cli.options import (
    TOKENS_OF_STEP,
    TRACE,
    DeploymentOptions,
    DraftOptions,
    OptionalModel,
    ProjectionOptions,
    RequestOptions,
    cluster_option,
    layout_option,
    placement_option,
)
from expertlane.errors import CapacityError, UserError, naming
from expertlane.spec.deployment import PlacementMethod
from expertlane.spec.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertlane.cost.laws.profile import ModelledCluster
    from expertlane.results.results import Results
    from expertlane.simulator.row import Row
    from expertlane.simulator.simulator import Outcome, ServingSetup, Simulator
    from expertlane.simulator.watch import Precision
    from expertlane.spec.model import ModelConfig
    from expertlane.spec.workload import Load


_MAX_NUM_SEQS = 256  # running sequences of a data-parallel rank; more for larger batches


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    layout: str | None = layout_option(None, show_default="--plan's")
    cluster: str | None = cluster_option(None, show_default="--plan's")
    plan: str | None = typer.Option(
        None,
        metavar="FILE#N",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Simulate row N of a results.json again (of expertlane plan or compare --project), "
        "with its model, cluster and load. Without #N: what the plan recommends, or a comparison's "
        "first row; #pools: disaggregated pools; #vllm, #sglang …: the best of an engine. Options "
        "that are given take precedence; the model and layouts are the row's.",
    )
    prefill_layout: str | None = typer.Option(
        None,
        metavar="LAYOUT",
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Disaggregated: a separate prefill pool, on further devices; --layout is then the "
        "decode pool's. --prefill-dispatch is the prefill pool's, all other options hold for both.",
    )
    cold_start: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Begin idle, with all of --batch at once, and end with the last of --num-requests. "
        "Otherwise the load is in its steady state: one request begins as another ends.",
    )
    trace: bool = TRACE

    def row(self) -> "Row | None":
        """The row that `--plan` names; None without it."""
        from expertlane.simulator.row import find_row

        with naming("--plan"):
            return None if self.plan is None else find_row(self.plan)


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
    max_num_seqs: int | None = typer.Option(
        None,
        show_default=f"{_MAX_NUM_SEQS}, or as many as --batch asks for",
        help="Concurrent requests per data-parallel rank.",
    )
    max_num_batched_tokens: int | None = typer.Option(
        None, show_default="8192, or --framework's", help=TOKENS_OF_STEP
    )


def of_plan(given: "Mapping[str, Any]") -> "dict[str, Any]":
    """Options that a plan's row stands for; without `--plan`, those of the framework.

    Raises:
        UserError: there is no such row, or what it is of is given beside it.
    """
    if given.get("plan") is None:
        return _of_framework(given)
    from expertlane.simulator.row import find_row

    for name in ("model", "layout", "prefill_layout"):
        if given.get(name) is not None:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option} and --plan exclude each other: a row has its own")
    with naming("--plan"):
        return find_row(given["plan"]).values(given)


def _of_framework(given: "Mapping[str, Any]") -> "dict[str, Any]":
    """Dispatch options that `--framework` implies, of each pool; none where one is given."""
    names = "framework", "cluster", "layout"
    framework, cluster, layout = (given.get(name) for name in names)
    if framework is None or cluster is None or layout is None or given.get("dispatch") is not None:
        return {}
    from expertlane.cost.laws.frameworks import usual_dispatch
    from expertlane.cost.laws.profile import parse_cluster

    profile, of_prompts = parse_cluster(cluster).profile, given.get("prefill_layout")
    read = partial(Layout.parse, is_modelled=True)
    found: dict[str, Any] = {"dispatch": usual_dispatch(read(layout), profile)}
    if of_prompts is not None and given.get("prefill_dispatch") is None:
        found["prefill_dispatch"] = usual_dispatch(read(of_prompts), profile)
    return found


@partial(publishes, fill=of_plan)
def simulate(
    own: _Options,
    call: output.Call,
    load_options: SimulatedLoad,
    projection: ProjectionOptions,
    deployment: _Deployment,
    drafts: DraftOptions,
    scheduler: _Scheduler,
    model: OptionalModel = None,
) -> output.Found:
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
      expertlane simulate --plan results/plan-paper-h100x16/results.json#2
          the second row of a plan again, in detail
    """
    loads, multi_token, row = load_options.loads(), drafts.multi_token(), own.row()
    layout_text, cluster = _needed("--layout", own.layout), _needed("--cluster", own.cluster)
    if row is not None:
        loads = [each.of_lengths() for each in loads]  # as a plan takes recorded requests
        found = FoundModel(row.model.name, row.model, None)
    else:
        found = find_model(_needed("MODEL", model), weights=False)

    from expertlane.cost.laws.profile import Execution, parse_cluster
    from expertlane.results.results import with_costs
    from expertlane.simulator.results import simulation
    from expertlane.simulator.simulator import ServingSetup, check_fits_cluster
    from expertlane.simulator.watch import Precision
    from expertlane.spec.workload import check_lengths

    most_len, has_drafts = found.config.max_position_embeddings, multi_token.num_drafts > 0
    seed, devices = load_options.seed, parse_cluster(cluster)
    there = found.on_cluster(projection, devices, seed, has_drafts=has_drafts)
    with naming("--prefill-layout"):
        of_prompts, prefill_layout = own.prefill_layout, None
        if of_prompts is not None:
            prefill_layout = found.lay_out(of_prompts, is_modelled=True)
    layout, types = found.lay_out(layout_text, is_modelled=True), there.types
    options = deployment.options
    if options.placement == "load" and layout.ep == getattr(prefill_layout, "ep", 1) == 1:
        options = replace(options, placement="linear")  # every rank has a part of every expert
    if row is not None:  # it has settings of its own
        types = replace(types, rounds_inputs=row.options.activations == "float8")
    setup = ServingSetup(
        layout=layout,
        prefill_layout=prefill_layout,
        options=options,
        types=types,
        execution=Execution(projection.execution),
        routing=there.routing.source,
        multi_token=multi_token,
        prefill_options=None if row is None else row.prefill_options,
        **_sizes(scheduler, projection.framework, layout, loads),
    )
    for load in loads:
        check_lengths(load, most_len)
    check_fits_cluster(there.cluster, setup)
    for role, each in setup.pools.items():
        with naming("--prefill-layout") if role == "prefill" else nullcontext():
            per_node = there.cluster.profile.ranks_per_node
            found.check(each, setup.options_of(role), per_node, is_modelled=True)
    folder = call.folder(output.slug("simulate", found.config.name, cluster))
    if not own.cold_start:
        loads = [each.varied(most_len) for each in loads]
    with found.cautioning(there.types, there.cluster):
        simulators = _simulators(found.config, there.cluster, setup, loads)
    # Unless objectives are given, as long a stretch as a row was found by.
    precision = Precision.of(load_options.slos, load_options.num_requests)
    run_one = partial(_run, seed=seed, precision=precision, cold_start=own.cold_start)
    runs = [(each, run_one(each, is_alone=len(loads) == 1)) for each in simulators]
    results = simulation(
        runs,
        load_options.question(loads[0]),
        there.routing,
        load_options.slos or (row.slos if row is not None else ()),
        command=call.command,
        cautions=found.cautions(setup.types, there.cluster) if row is None else row.cautions,
    )
    if load_options.price is not None:
        results = with_costs(results, load_options.price)
    traced = folder if own.trace else None
    return output.Found(results, folder, lambda: _write_trace(runs, results, traced))


def _simulators(
    model: "ModelConfig",
    cluster: "ModelledCluster",
    setup: "ServingSetup",
    loads: "Sequence[Load]",
) -> "list[Simulator]":
    """A simulator of each load.

    Raises:
        CapacityError: it does not fit; with the type of weights with which it does, if there is
            one.
    """
    from expertlane.simulator.simulator import Simulator

    try:
        return [Simulator(model, cluster, setup, load) for load in loads]
    except CapacityError as error:
        for types in setup.types.narrower(cluster.profile.device.flops_per_s):
            other = replace(setup, types=types)
            try:
                _ = [Simulator(model, cluster, other, load) for load in loads]
            except CapacityError:
                continue
            raise CapacityError(
                f"{error}; take more devices, or --dtype {types.weights}, which fits"
            ) from None
        raise


def _needed(name: str, value: str | None) -> str:
    """A value that only a row of a plan may stand in for.

    Raises:
        UserError: there is none.
    """
    if value is None:
        what = name.lstrip("-").lower()
        raise UserError(f"{name} is missing: give a {what}, or a row of a plan, --plan FILE#N")
    return value


def _write_trace(
    runs: "Sequence[tuple[Simulator, Outcome]]", results: "Results", folder: Path | None
) -> list[Path]:
    """Write the steps of the best run, if there is a folder for them; return the paths."""
    if folder is None:
        return []

    from expertlane.results.timeline import write_traces
    from expertlane.simulator.results import best_run

    simulator, outcome = best_run(runs, results.deployments[0].serving)
    return write_traces({str(simulator.setup.layout): simulator.trace(outcome)}, folder)


def _sizes(
    scheduler: _Scheduler, framework: str | None, layout: "Layout", loads: "Sequence[Load]"
) -> dict[str, Any]:
    """Limits of the scheduler: those asked for, else those of the loads and the framework."""
    from expertlane.simulator.simulator import scheduling_of

    asked = {name: value for name, value in vars(scheduler).items() if value is not None}
    most = max(each.batch or 0 for each in loads)
    max_num_seqs = asked.get("max_num_seqs")
    if max_num_seqs is None:
        max_num_seqs = max(_MAX_NUM_SEQS, -(-most // (layout.replicas * layout.dp)))
    tokens = asked.get("max_num_batched_tokens")
    of_framework = scheduling_of(framework, tokens, 1 if tokens else max_num_seqs)
    return of_framework | asked | {"max_num_seqs": max_num_seqs}


def _run(
    simulator: "Simulator", seed: int, precision: "Precision", *, cold_start: bool, is_alone: bool
) -> "Outcome":
    from expertlane.simulator.steady import steady_state

    num_runs, load = simulator.num_runs, simulator.load
    name = "" if is_alone else f"{load}: "
    if load.is_endless and not cold_start:
        description = f"{name}simulating a steady state"
        with output.task_on_stderr(description, precision.most_steps) as advance:
            return steady_state(simulator, seed, precision, with_totals=True, advance=advance)
    times = "" if num_runs == 1 else f" {num_runs} times, for the bounds"
    description = f"{name}simulating {load.num_requests:,} requests{times}"
    with output.task_on_stderr(description, num_runs * load.num_requests) as advance:
        return simulator.run(seed, advance)
