"""`expertlane bench`: put load on a model, and show throughput and latency."""

import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from expertlane.cli.compare import DEFAULT_TIMEOUT_S, Oversubscribe
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
from expertlane.errors import UserError

if TYPE_CHECKING:
    from expertlane.experiment.serving_results import ServingResults
    from expertlane.spec.layout import Layout
    from expertlane.spec.load import LengthRange, Load

_DEFAULT_BATCH = "1,8,32"
_DEFAULT_NUM_REQUESTS = 100
_MAX_DIGITS = 7

_Number = TypeVar("_Number", int, float)

_Batch = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N…]",
        help="Closed loop: keep N requests unfinished; with several, one point each. "
        f"Default: {_DEFAULT_BATCH}.",
    ),
]
_Rate = Annotated[
    str | None,
    typer.Option(
        metavar="R[,R…]",
        help="Open loop in place of --batch: R requests a second arrive at random times.",
    ),
]
_NumRequests = Annotated[
    int | None,
    typer.Option(
        metavar="N", help=f"Of a point. Default: the batch; with --rate {_DEFAULT_NUM_REQUESTS}."
    ),
]
_PromptLen = Annotated[
    str, typer.Option(metavar="N[:N]", help="Tokens of a prompt; of a range, drawn uniformly.")
]
_OutputLen = Annotated[
    str, typer.Option(metavar="N[:N]", help="Tokens of an output; of a range, drawn uniformly.")
]
_Layouts = Annotated[
    list[str] | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="How ranks are arranged, tp=2,ep=2 for example. May be repeated: each gets the same "
        "requests, one after the other. Default: tp=1.",
    ),
]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of prompts, lengths and arrivals.")]
_Json = Annotated[bool, typer.Option("--json", help="Print bench.json instead of tables.")]
_Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write bench.json to.")]


def bench(
    model: ModelArgument,
    batch: _Batch = None,
    rate: _Rate = None,
    num_requests: _NumRequests = None,
    prompt_len: _PromptLen = "32",
    output_len: _OutputLen = "32",
    layout: _Layouts = None,
    seed: _Seed = 0,
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
      expertlane bench paper-tiny --json | jq '.points[].output_tps'
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
    )
    loads = _loads(
        batch, rate, num_requests, _length("prompt", prompt_len), _length("output", output_len)
    )
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    found = find_model(model)
    layouts = [found.lay_out(each) for each in layout or ["tp=1"]]
    _check(found, options, loads, layouts, out)
    results = _run(found, options, loads, layouts, seed)
    _publish(results, out, as_json)


def _loads(
    batch: str | None,
    rate: str | None,
    num_requests: int | None,
    prompt_len: "LengthRange",
    output_len: "LengthRange",
) -> "list[Load]":
    """What to measure, a point each.

    Raises:
        UserError: it is not clear what.
    """
    from expertlane.spec.load import Load

    if batch is not None and rate is not None:
        raise UserError("--batch and --rate exclude each other; run one, then the other")
    if num_requests is not None and num_requests < 1:
        raise UserError(f"--num-requests is {num_requests}; it must be 1 or more")
    if rate is not None:
        size = num_requests or _DEFAULT_NUM_REQUESTS
        rates = _parse_list("--rate", rate, _rate, "numbers above 0 with commas between: 2,5")
        return [Load(size, prompt_len, output_len, rate=each) for each in rates]
    batches = _parse_list(
        "--batch", batch or _DEFAULT_BATCH, _whole, "whole numbers with commas between: 1,8,32"
    )
    if num_requests is not None and num_requests < max(batches):
        raise UserError(
            f"--num-requests is {num_requests} but --batch has {max(batches)}; it must be as many "
            "or more"
        )
    return [Load(num_requests or each, prompt_len, output_len, batch=each) for each in batches]


def _length(name: str, text: str) -> "LengthRange":
    from expertlane.spec.load import LengthRange

    ends = [_whole(part) for part in text.split(":")]
    low, high = ends[0], ends[-1]
    if low is None or high is None or len(ends) > 2 or low > high:
        raise UserError(
            f"--{name}-len is {text!r}; it must be a whole number, 1 or more, or a range: 32:512"
        )
    return LengthRange(low, high)


def _parse_list(
    option: str, text: str, parse: Callable[[str], _Number | None], valid: str
) -> list[_Number]:
    numbers = []
    for part in text.split(","):
        number = parse(part)
        if number is None:
            raise UserError(f"{option} is {text!r}; it must be {valid}")
        numbers.append(number)
    return numbers


def _whole(text: str) -> int | None:
    text = text.strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) or None if is_number else None


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def _check(
    found: FoundModel,
    options: EngineOptions,
    loads: "list[Load]",
    layouts: "list[Layout]",
    out: Path | None,
) -> None:
    """What can be known before anything is loaded.

    Raises:
        UserError: it could not be run to its end.
    """
    from expertlane.cli.output import check_folder, is_speaker
    from expertlane.engine.torchrun import is_under_torchrun
    from expertlane.experiment.serving_benchmark import check_lengths

    for load in loads:
        check_lengths(load, options.max_model_len or found.config.max_position_embeddings)
    for layout in layouts:
        found.check(layout, options)
    if len(layouts) > 1 and is_under_torchrun():
        raise UserError("under torchrun, give one --layout a run; its ranks end with the run")
    if out is not None and is_speaker():
        check_folder(out)


def _run(
    found: FoundModel,
    options: EngineOptions,
    loads: "list[Load]",
    layouts: "list[Layout]",
    seed: int,
) -> "ServingResults":
    """All loads on each layout in turn."""
    from datetime import UTC, datetime

    from expertlane.cli.output import progress_on_stderr
    from expertlane.engine.host import ForeignLoad
    from expertlane.experiment.serving_benchmark import describe, run_loads
    from expertlane.experiment.serving_results import Point, ServingResults

    points: list[Point] = []
    foreign_cpu_share = 0.0
    for layout in layouts:
        with found.load(layout, options) as llm:
            machine, versions = describe(llm)
            foreign = ForeignLoad()
            with progress_on_stderr() as progress:
                points += run_loads(llm, layout, loads, seed, progress)
            foreign_cpu_share = max(foreign_cpu_share, foreign.share())
    return ServingResults(
        command_line=shlex.join(["expertlane", *sys.argv[1:]]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        machine=machine,
        model=found.name,
        options=options.options,
        ranks_per_node=options.ranks_per_node,
        seed=seed,
        prompt_len=str(loads[0].prompt_len),
        output_len=str(loads[0].output_len),
        points=tuple(points),
        foreign_cpu_share=foreign_cpu_share,
    )


def _publish(results: "ServingResults", out: Path | None, as_json: bool) -> None:
    from expertlane.cli.answers import write
    from expertlane.experiment import serving_results

    if as_json:
        write(serving_results.to_json(results))
    else:
        from expertlane.cli.bench_table import show
        from expertlane.cli.output import stdout_console

        show(results, stdout_console())
    if out is not None:
        print(f"written: {serving_results.write(results, out)}", file=sys.stderr)
