"""`expertlane bench`: put load on a model, and show throughput and latency."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.cli.compare import DEFAULT_TIMEOUT_S, IgnoreUnusedTensors, Oversubscribe
from expertlane.cli.engine_options import (
    BlockSize,
    Dispatch,
    DispatchOption,
    DtypeOption,
    EngineOptions,
    FoundModel,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MicroBatches,
    MicroBatchSchedule,
    ModelArgument,
    NoPrefixCaching,
    NumBlocks,
    NumMicroBatches,
    OverlapOption,
    Overlaps,
    PayloadOption,
    PayloadTypes,
    PlacementOption,
    RanksPerNode,
    Rebalance,
    Redundant,
    TimeoutS,
    deployment_options,
    find_model,
)
from expertlane.cli.load_options import (
    Batch,
    NumRequests,
    OutputLen,
    PromptLen,
    Rate,
    Seed,
    parse_loads,
)
from expertlane.cli.publish import FILES, JSON_HELP, publish, results_folder, slug
from expertlane.errors import UserError
from expertlane.spec.ranges import take_option

if TYPE_CHECKING:
    from expertlane.results.results import Results
    from expertlane.spec.layout import Layout
    from expertlane.spec.workload import Load

_Layouts = Annotated[
    list[str] | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="How ranks are arranged, tp=2,ep=2 for example. May be repeated: each gets the same "
        "requests, one after the other. Default: tp=1.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help=f"Folder for {FILES}. Default: results/bench-MODEL."),
]


def bench(
    model: ModelArgument,
    batch: Batch = None,
    rate: Rate = None,
    num_requests: NumRequests = None,
    prompt_len: PromptLen = "32",
    output_len: OutputLen = "32",
    layout: _Layouts = None,
    seed: Seed = 0,
    as_json: _Json = False,
    out: _Out = None,
    dtype: DtypeOption = None,
    max_model_len: MaxModelLen = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = 16,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    no_prefix_caching: NoPrefixCaching = False,
    overlap: OverlapOption = Overlaps.OFF,
    num_micro_batches: NumMicroBatches = 1,
    micro_batch_schedule: MicroBatchSchedule = MicroBatches.DRAINED,
    dispatch: DispatchOption = Dispatch.ALL_TO_ALL,
    payload: PayloadOption = PayloadTypes.MODEL,
    placement: PlacementOption = "linear",
    redundant: Redundant = 0,
    rebalance: Rebalance = 0,
    ranks_per_node: RanksPerNode = 0,
    timeout_s: TimeoutS = DEFAULT_TIMEOUT_S,
    oversubscribe: Oversubscribe = False,
    ignore_unused_tensors: IgnoreUnusedTensors = False,
) -> None:
    """Put load on a model and measure throughput and latency.

    A sweep over batch sizes, or requests that arrive at a rate. Prompts are random token ids;
    tokens are chosen greedily, beyond any end of sequence. Each point is warmed up first.

    \b
    TTFT     from a request's arrival to its first token
    TPOT     a request's mean time of a token after the first
    ITL      each time between successive tokens of a request
    E2E      from a request's arrival to its last token
    output   output tokens a second, from the first arrival to the last token
    total    the same, with the prompts' tokens
    prefill  prompt tokens over the time until all requests have their first token; only where
             all are there from the start

    \b
    Examples:
      expertlane bench ./my-checkpoint
      expertlane bench ./my-checkpoint --batch 1,32 --layout tp=2 --layout dp=2,ep=2
      expertlane bench ./my-checkpoint --rate 2,5 --prompt-len 32:512 --output-len 16:128
      expertlane bench paper-tiny --json | jq '.deployments[].serving[].output_tps.value'
    """
    options = EngineOptions(
        dtype=dtype,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=not no_prefix_caching,
        options=deployment_options(
            overlap=overlap,
            num_micro_batches=num_micro_batches,
            micro_batch_schedule=micro_batch_schedule,
            dispatch=dispatch,
            payload=payload,
            placement=placement,
            redundant=redundant,
            rebalance=rebalance,
        ),
        ranks_per_node=ranks_per_node,
        timeout_s=timeout_s,
        oversubscribe=oversubscribe,
        ignore_unused_tensors=ignore_unused_tensors,
    )
    loads = parse_loads(batch, rate, num_requests, prompt_len, output_len)
    take_option("--seed", seed)
    found = find_model(model)
    layouts = [found.lay_out(each) for each in layout or ["tp=1"]]
    _check(found, options, loads, layouts)
    folder = results_folder(out, slug("bench", found.config.name))
    results = _run(found, options, loads, layouts, seed)
    publish(results, folder, as_json=as_json)


def _check(
    found: FoundModel,
    options: EngineOptions,
    loads: "list[Load]",
    layouts: "list[Layout]",
) -> None:
    """What can be known before anything is loaded.

    Raises:
        UserError: it could not be run to its end.
    """
    from expertlane.engine.torchrun import is_under_torchrun
    from expertlane.spec.workload import check_lengths

    for load in loads:
        check_lengths(load, options.max_model_len or found.config.max_position_embeddings)
    for layout in layouts:
        found.check(layout, options)
    if len(layouts) > 1 and is_under_torchrun():
        raise UserError("under torchrun, give one --layout a run; its ranks end with the run")


def _run(
    found: FoundModel,
    options: EngineOptions,
    loads: "list[Load]",
    layouts: "list[Layout]",
    seed: int,
) -> "Results":
    """All loads on each layout in turn."""
    from expertlane.cli.output import command_line, progress_on_stderr
    from expertlane.compare.machine import machine_record
    from expertlane.compare.serving_benchmark import run_loads
    from expertlane.ops.host import ForeignLoad
    from expertlane.results.record import DeploymentRecord
    from expertlane.results.results import Results

    records = []
    foreign_cpu_share = 0.0
    for layout in layouts:
        with found.load(layout, options) as llm:
            seen = llm.machine
            foreign = ForeignLoad()
            with progress_on_stderr() as progress:
                serving = tuple(run_loads(llm, layout, loads, seed, progress))
            foreign_cpu_share = max(foreign_cpu_share, foreign.share())
        records.append(
            DeploymentRecord(str(layout), layout, options.options, "measured", serving=serving)
        )
    num_ranks = max(layout.world_size for layout in layouts)
    ranks_per_node = options.ranks_per_node or seen[0].ranks_per_node
    first = loads[0]
    return Results.now(
        "bench",
        command_line(),
        {
            "model": found.name,
            "workload": {
                "prompt_len": str(first.prompt_len),
                "output_len": str(first.output_len),
                "seed": seed,
            },
            "ranks_per_node": options.ranks_per_node,
        },
        records,
        torch_version=seen[0].torch_version,
        machine=machine_record(seen, num_ranks, ranks_per_node),
        foreign_cpu_share=foreign_cpu_share,
    )
