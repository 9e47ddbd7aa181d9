"""`expertlane simulate`: one deployment on a modelled cluster, on a virtual clock."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.cli.engine_options import (
    BlockSize,
    Dispatch,
    DispatchOption,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MicroBatches,
    MicroBatchSchedule,
    ModelArgument,
    NumMicroBatches,
    OverlapOption,
    Overlaps,
    PayloadOption,
    PayloadTypes,
    PlacementOption,
    Redundant,
    deployment_options,
    find_model,
)
from expertlane.cli.load_options import (
    NumRequests,
    OutputLen,
    PromptLen,
    Seed,
    parse_loads,
)
from expertlane.cli.projection_options import (
    ClusterOption,
    ExecutionOption,
    Executions,
    KvTypeOption,
    NumberTypeOption,
    RoutingTraceOption,
    SkewOption,
    number_types,
    priced_wider,
)
from expertlane.cli.publish import FILES, JSON_HELP, publish, results_folder, slug
from expertlane.errors import SpecError, UserError
from expertlane.spec.ranges import take_option

if TYPE_CHECKING:
    from expertlane.cost.laws.profile_file import ModelledCluster
    from expertlane.cost.multi_token import MultiToken
    from expertlane.simulate.setup import ServingSetup
    from expertlane.simulate.simulator import Outcome, Simulator
    from expertlane.spec.model import ModelConfig
    from expertlane.spec.workload import Load

_DEFAULT_BATCH = "64"


_Layout = Annotated[
    str, typer.Option(metavar="LAYOUT", help="How ranks are arranged, dp=16,ep=16 for example.")
]
_PrefillLayout = Annotated[
    str | None,
    typer.Option(
        metavar="LAYOUT",
        help="A pool of its own for prompts, on further devices; --layout then decodes, and keys "
        "and values travel between them.",
    ),
]
_Batch = Annotated[
    str | None,
    typer.Option(
        metavar="N", help=f"Closed loop: keep N requests unfinished. Default: {_DEFAULT_BATCH}."
    ),
]
_Rate = Annotated[
    str | None,
    typer.Option(
        metavar="R",
        help="Open loop in place of --batch: R requests a second arrive at random times.",
    ),
]
_Mtp = Annotated[
    int, typer.Option(metavar="N", help="Multi-token prediction: N tokens guessed a step.")
]
_MtpAcceptance = Annotated[
    float | None,
    typer.Option(metavar="P", help="How often a guess is right, 0 to 1; needed with --mtp."),
]
_Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write what every rank does when, in one prefill and one decode step; open it "
        "in ui.perfetto.dev or chrome://tracing.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help=f"Folder for {FILES}. Default: results/simulate-MODEL-CLUSTER."
    ),
]


def simulate(
    model: ModelArgument,
    layout: _Layout,
    cluster: ClusterOption,
    prefill_layout: _PrefillLayout = None,
    batch: _Batch = None,
    rate: _Rate = None,
    num_requests: NumRequests = None,
    prompt_len: PromptLen = "1024",
    output_len: OutputLen = "128",
    seed: Seed = 0,
    dtype: NumberTypeOption = None,
    kv_dtype: KvTypeOption = None,
    execution: ExecutionOption = Executions.GRAPH,
    routing_trace: RoutingTraceOption = None,
    skew: SkewOption = 0.0,
    dispatch: DispatchOption = Dispatch.ALL_TO_ALL,
    overlap: OverlapOption = Overlaps.OFF,
    num_micro_batches: NumMicroBatches = 1,
    micro_batch_schedule: MicroBatchSchedule = MicroBatches.DRAINED,
    payload: PayloadOption = PayloadTypes.MODEL,
    placement: PlacementOption = "linear",
    redundant: Redundant = 0,
    mtp: _Mtp = 0,
    mtp_acceptance: _MtpAcceptance = None,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    block_size: BlockSize = 16,
    trace: _Trace = None,
    as_json: _Json = False,
    out: _Out = None,
) -> None:
    """Project what a deployment would do on a cluster that is not here.

    The same scheduler as when it runs, on a virtual clock; steps are priced by a profile fitted
    to published measurements or made by expertlane calibrate. Says what limits the deployment,
    and where every number comes from. Needs no GPU and no weights.

    \b
    Examples:
      expertlane simulate paper --layout dp=16,ep=16 --cluster h100x16
      expertlane simulate ./my-checkpoint --layout tp=8 --cluster h100x8 --dtype float8 --batch 256
      expertlane simulate ./my-checkpoint --layout dp=16,ep=16 --cluster h100x16 --rate 20
          --prompt-len 512:2048 --output-len 64:512 --skew 0.6 --redundant 16
      expertlane simulate ./my-checkpoint --layout dp=8,ep=8 --prefill-layout tp=8
          --cluster h100x16 --trace step.json
    """
    from expertlane.cost.laws.execution import Execution

    load = _load(batch, rate, num_requests, prompt_len, output_len)
    take_option("--seed", seed)
    take_option("--mtp-acceptance", mtp_acceptance)
    for name, choice in (("dispatch", dispatch), ("overlap", overlap)):
        if choice.value == "auto":
            raise UserError(
                f"--{name} auto is timed on real ranks; simulate each of the others, or let "
                "expertlane plan choose"
            )
    options = deployment_options(
        overlap=overlap,
        num_micro_batches=num_micro_batches,
        micro_batch_schedule=micro_batch_schedule,
        dispatch=dispatch,
        payload=payload,
        placement=placement,
        redundant=redundant,
        rebalance=0,
    )
    multi_token = _multi_token(mtp, mtp_acceptance)
    found_model = find_model(model, weights=False)

    from expertlane.cli.output import command_line
    from expertlane.cost.laws.profile_file import parse_cluster
    from expertlane.cost.routing import choose_routing
    from expertlane.results.chrome_trace import write_trace
    from expertlane.simulate.results import simulation
    from expertlane.simulate.setup import ServingSetup
    from expertlane.simulate.simulator import Simulator
    from expertlane.spec.workload import check_lengths

    config = found_model.config
    modelled = parse_cluster(cluster)
    routing = choose_routing(config, routing_trace, skew, seed)
    setup = ServingSetup(
        layout=found_model.lay_out(layout),
        prefill_layout=None if prefill_layout is None else found_model.lay_out(prefill_layout),
        options=options,
        types=number_types(found_model, dtype, kv_dtype, modelled),
        execution=Execution(execution.value),
        routing=routing.source,
        multi_token=multi_token,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
    )
    check_lengths(load, config.max_position_embeddings)
    _check(config, modelled, setup, trace)
    folder = results_folder(out, slug("simulate", config.name, cluster))
    simulator = Simulator(config, modelled, setup, load)
    outcome = _run(simulator, load, seed)
    results = simulation(
        simulator,
        outcome,
        routing,
        seed,
        command=command_line(),
        caution=priced_wider(found_model, setup.types),
    )

    def write_steps() -> list[Path]:
        return [] if trace is None else [write_trace(trace, simulator.trace(outcome))]

    publish(results, folder, as_json=as_json, also=write_steps)


def _load(
    batch: str | None, rate: str | None, num_requests: int | None, prompt_len: str, output_len: str
) -> "Load":
    if rate is None:
        batch = _DEFAULT_BATCH if batch is None else batch
    loads = parse_loads(batch, rate, num_requests, prompt_len, output_len)
    if len(loads) > 1:
        given = f"--batch {batch}" if rate is None else f"--rate {rate}"
        raise UserError(f"{given} is {len(loads)} loads; simulate takes one a run")
    return loads[0]


def _multi_token(num_drafts: int, acceptance: float | None) -> "MultiToken":
    from expertlane.cost.multi_token import MultiToken

    if (acceptance is None) == (num_drafts > 0):
        raise UserError(
            f"--mtp is {num_drafts} and --mtp-acceptance "
            + ("not given" if acceptance is None else f"{acceptance:g}")
            + "; give both, 1 or more tokens and a share from 0 to 1, or neither"
        )
    try:
        return MultiToken(num_drafts, acceptance or 0.0)
    except SpecError as error:
        raise SpecError(f"--mtp: {error}") from None


def _check(
    config: "ModelConfig",
    cluster: "ModelledCluster",
    setup: "ServingSetup",
    trace: Path | None,
) -> None:
    """What can be known before anything is simulated.

    Raises:
        UserError: it could not be run to its end.
    """
    from expertlane.cli.output import check_folder
    from expertlane.engine.start import check_deployment
    from expertlane.simulate.setup import check_devices
    from expertlane.spec.deployment import Deployment

    check_devices(cluster, setup)
    for layout in setup.layouts:
        check_deployment(
            config, Deployment(config.name, layout, setup.options), cluster.profile.ranks_per_node
        )
    if trace is not None:
        check_folder(trace.absolute().parent)
        if trace.is_dir():
            raise UserError(f"--trace is {trace}, a folder; give a file: {trace / 'step.json'}")


def _run(simulator: "Simulator", load: "Load", seed: int) -> "Outcome":
    from expertlane.cli.output import progress_on_stderr

    with progress_on_stderr() as progress:
        num_runs = simulator.num_runs
        times = "" if num_runs == 1 else f" {num_runs} times, for the bounds"
        progress.task(
            f"simulating {load.num_requests:,} requests{times}", num_runs * load.num_requests
        )
        outcome = simulator.run(seed, progress.advance)
        progress.done()
    return outcome
