"""`expertlane plan`: which deployment of a model to choose on a cluster, and why."""

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.load import PlannedLoad
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import publishes
from expertlane.cli.options import (
    DraftOptions,
    ModelArgument,
    ProjectionOptions,
    cluster_option,
    fields_of,
    scripts_option,
)
from expertlane.errors import UserError
from expertlane.spec.deployment import PayloadType
from expertlane.spec.files import write_text
from expertlane.spec.names import EngineName

if TYPE_CHECKING:
    from expertlane.cost.routing import RoutingChoice
    from expertlane.cost.step.operation import NumberTypes
    from expertlane.planner.candidates import PlanRequest
    from expertlane.planner.server_start import ServeTarget
    from expertlane.spec.workload import Load

_EXPERIMENT = "experiment.toml"
_AUTO = "xauto"  # in place of a number of devices
# A plan keeps what it makes: collecting it anew all the time is a tenth of its CPU time.
_COLLECTED_AFTER = 100_000, 50, 50


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    model: ModelArgument
    cluster: str = cluster_option(
        "h100x16",
        more=" PROFILExauto: the fewest devices that serve --batch or --rate within --slo.",
    )
    engine: EngineName | None = typer.Option(
        None,
        show_default="--framework's, or any deployment, and the best of each engine",
        help="Engine that serves. Only what it runs is planned.",
    )
    scripts: Path | None = scripts_option("They start the best of each engine.", Panel.MORE_OUTPUT)


@publishes
def plan(
    own: _Options,
    call: output.Call,
    load: PlannedLoad,
    projection: ProjectionOptions,
    drafts: DraftOptions,
) -> output.Found:
    """Find the deployment with the most tokens/s on a cluster, within latency limits.

    Tries every layout × replicas × dispatch form of each phase × overlap × micro-batches ×
    redundant experts, aggregated and disaggregated (prefill and decode apart); with --mtp each
    with drafts and without; with --engine only what that engine runs. Projects each with a cost
    model calibrated on public measurements. Needs no GPU, loads no weights. Gives each deployment's
    gap to #1. Writes the winner as an experiment for expertlane compare, and the best of each
    engine as the commands that start it on all nodes: vLLM, SGLang, TensorRT-LLM, expertlane.

    \b
    Examples:
      expertlane plan paper
          the paper's model on its cluster, 16 H100
      expertlane plan ./my-checkpoint --cluster h100x32 --slo tpot.mean=50ms \\
          --batch 1024 --prompt-len 2000 --output-len 500
          the most tokens/s with a mean TPOT of at most 50 ms
      expertlane plan org/model --dtype float8 --routing-trace routing.npz
          with the routing of your own traffic
      expertlane plan org/model --cluster h200x16 --engine sglang
          what SGLang can run, and the commands that start it
      expertlane plan org/model --cluster h200xauto --rate 20 --slo tpot.mean=50ms
          how many H200 it takes to serve 20 requests per second
      expertlane plan mine --cluster machine.tomlx2
          on a machine that expertlane calibrate measured
      expertlane plan paper --json | jq '.deployments[0].layout'
          for other programs
    """
    from expertlane.cost.laws.device import stand_ins
    from expertlane.cost.routing import varying_work
    from expertlane.planner.results import make_plan
    from expertlane.planner.sizing import smallest_plan
    from expertlane.results.results import with_costs
    from expertlane.spec.experiment import Projection, ProjectionSetup

    if call.is_typed:
        gc.set_threshold(*_COLLECTED_AFTER)
    is_auto = own.cluster.endswith(_AUTO)
    cluster = own.cluster.removesuffix(_AUTO) + "x1" if is_auto else own.cluster
    found, asked, routing, request = _question(own, cluster, load, projection, drafts)
    setting, trace = request.setting, projection.routing_trace
    subject = found.config.name, own.cluster if is_auto else request.cluster
    folder = call.folder(output.slug("plan", *subject))
    if own.scripts is not None:
        output.check_folder(own.scripts)
    experiment = None if folder is None else folder / _EXPERIMENT
    stand_in_laws = stand_ins(request.cluster.profile, setting.types, found.config)
    cautions = *found.cautions(setting.types, request.cluster), *stand_in_laws
    cautions += tuple(varying_work(found.config))
    cautioning = found.cautioning(setting.types, request.cluster)
    with cautioning, output.progress_on_stderr() as progress:
        fewer = None
        if is_auto:
            sized = smallest_plan(request, routing, progress, cautions)
            made, fewer = sized.plan, sized.fewer
            cluster = f"{own.cluster.removesuffix(_AUTO)}x{made.request.cluster.num_devices}"
        else:
            made = make_plan(request, routing, progress, cautions)
    on_cluster = fields_of(ProjectionSetup, projection) | {
        "cluster": cluster,
        "routing_trace": None if trace is None else str(trace),
        "corrections": None if projection.corrections is None else str(projection.corrections),
    }
    results = made.results(
        command=call.command,
        loaded=_served(found),
        experiment=None if experiment is None else str(experiment),
        scripts=None if own.scripts is None else str(own.scripts),
        projection=ProjectionSetup(**on_cluster | fields_of(ProjectionSetup, drafts)),
        fewer=fewer,
        load=load.question(asked),
    )
    if load.price is not None:
        results = with_costs(results, load.price)
    checkpoint = os.path.abspath(found.folder) if found.folder else None

    def write_scripts() -> list[Path]:
        if own.scripts is None:
            return []
        scripts = made.scripts(_served(found))
        return [write_text(own.scripts / name, text) for name, text in scripts.items()]

    def write_experiment() -> list[Path]:
        if experiment is None:
            return []
        written_by = f"Written by: {results.command}"
        own_table = on_cluster | load.lengths(asked) | _types(setting.types) | {"slo": load.limits}
        table = Projection(**own_table).located(Path.cwd())
        name = output.slug("compare", *subject)  # so that its results leave the plan's in place
        return [write_text(experiment, made.experiment(name, checkpoint, written_by, table))]

    return output.Found(results, folder, lambda: [*write_experiment(), *write_scripts()])


class _Question(NamedTuple):
    """A plan's question, with what it was read from."""

    found: FoundModel
    load: "Load"
    routing: "RoutingChoice"
    request: "PlanRequest"


def _question(
    own: _Options,
    cluster: str,
    load: PlannedLoad,
    projection: ProjectionOptions,
    drafts: DraftOptions,
) -> _Question:
    """Read the options.

    Raises:
        UserError: they contradict each other, or name what there is not.
    """
    from expertlane.cost.laws.profile import Execution, parse_cluster
    from expertlane.cost.projector import Setting
    from expertlane.cost.throughput import Goals
    from expertlane.planner.candidates import PlanRequest

    found = find_model(own.model, weights=False)
    config, devices = found.config, parse_cluster(cluster)
    asked, multi_token = load.load(config), drafts.multi_token()
    if multi_token.num_drafts and own.engine == "expertlane":
        raise UserError("--mtp: expertlane has no drafts; leave it out with --engine expertlane")
    has_drafts = multi_token.num_drafts > 0
    there = found.on_cluster(projection, devices, load.seed, has_drafts=has_drafts)
    is_narrow = there.types.weights in ("float8", "nvfp4")  # DeepEP sends float8 beside both
    payload: PayloadType = "float8" if is_narrow else "model"
    setting = Setting(
        there.types,
        Execution(projection.execution),
        there.routing.source,
        payload,
        multi_token=multi_token,
    )
    engine, goals = _engine_of_framework(own, projection.framework), Goals.of(load.slos)
    request = PlanRequest.of_load(asked, config, there.cluster, goals, setting, engine, load.seed)
    return _Question(found, asked, there.routing, request)


def _engine_of_framework(own: _Options, framework: str | None) -> EngineName | None:
    """The engine asked for, or the one that the framework serves with.

    Raises:
        UserError: a framework does not serve with it.
    """
    from expertlane.cost.laws.frameworks import find_framework

    if framework is None:
        return own.engine
    engine = find_framework(framework).engine
    if own.engine not in (None, engine):
        raise UserError(f"--engine {own.engine}: --framework {framework} serves with {engine}")
    return engine


def _types(types: "NumberTypes") -> dict[str, str]:
    """Number types as `--dtype` and `--kv-dtype` take them."""
    kv_dtype = "model" if types.kv == types.activations else types.kv
    return {"dtype": types.weights, "kv_dtype": kv_dtype}


def _served(found: FoundModel) -> "ServeTarget":
    """The model for engines; a folder by its absolute path, as a relative one could be a hub id."""
    from expertlane.planner.server_start import ServeTarget

    if found.folder is None:
        return ServeTarget("MODEL")
    is_local = os.path.isdir(os.path.expanduser(found.name))
    model = os.path.abspath(found.folder) if is_local else found.name
    return ServeTarget(model, found.quantization)
