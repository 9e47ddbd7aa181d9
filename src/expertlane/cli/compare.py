"""`expertlane compare`: run an experiment's deployments in turn, and show them side by side."""

import os
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.cli.compare_output import (
    DEFAULT_SKEW,
    Shown,
    projections_of,
    projectors_of,
)
from expertlane.cli.publish import FILES, JSON_HELP, slug
from expertlane.errors import CapacityError, SpecError, UserError
from expertlane.spec.ranges import RANGES, shown, take_option

if TYPE_CHECKING:
    from expertlane.engine.pool import RankPool
    from expertlane.results.step_record import StepRecord
    from expertlane.spec.experiment import Experiment

DEFAULT_EXPERIMENT = "paper-small"
DEFAULT_TIMEOUT_S = 60.0


class Dtype(StrEnum):
    """What weights and activations are held in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_ExperimentArgument = Annotated[
    str,
    typer.Argument(
        help="A TOML file, or the name of an experiment that comes with expertlane: "
        "paper-small (laptop), paper-small-skewed (the same model, some experts in demand, "
        "load balanced), paper (full size)."
    ),
]
_ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="In place of the experiment's model: a checkpoint's folder, a hub id (org/name), or "
        "a preset, whose weights are random.",
    ),
]
_TopK = Annotated[
    str | None,
    typer.Option(
        metavar="K[,K…]",
        help="Experts per token in place of the model's; with several, one comparison "
        "each, one after the other.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help=f"Folder for {FILES} (with several K, its subfolders topK). "
        "Default: results/NAME, with -MODEL and -topK added where those options are given.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
_Traffic = Annotated[
    bool,
    typer.Option(
        "--traffic",
        help="Also show, of each deployment: who sent how much to whom, how far tokens spread, "
        "what is hottest, who comes last.",
    ),
]
_Trace = Annotated[
    bool,
    typer.Option(
        "--trace",
        help="Also write trace-NAME.json of each deployment: what every rank did when, in one "
        "prefill and one decode step; open it in ui.perfetto.dev or chrome://tracing.",
    ),
]
_Project = Annotated[
    bool,
    typer.Option(
        "--project",
        help="Also show what a cluster model says of the same deployments, in tables of its own; "
        "alone where this machine is too small to run them.",
    ),
]
_Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILExN",
        help="The modelled cluster for --project: so many devices of a profile (h100, h200, b200, "
        "a100, or a TOML file of expertlane calibrate). Default: as many h100 as ranks.",
    ),
]
_Skew = Annotated[
    float,
    typer.Option(
        metavar="ALPHA",
        help="For --project: beside balanced routing, one where experts' popularity falls with "
        "their rank to the power of -ALPHA.",
    ),
]
Oversubscribe = Annotated[
    bool, typer.Option("--oversubscribe", help="Allow more than 32 local ranks a core.")
]
IgnoreUnusedTensors = Annotated[
    bool,
    typer.Option(
        "--ignore-unused-tensors",
        help="Go on, with a warning, where a checkpoint holds tensors that its config.json has "
        "no use for.",
    ),
]
_TimeoutS = Annotated[
    float, typer.Option(metavar="SECONDS", help="Longest wait for a rank without progress.")
]
_Dtype = Annotated[
    Dtype | None, typer.Option(help="Of weights and activations. Default: the machine's choice.")
]


def compare(
    experiment: _ExperimentArgument = DEFAULT_EXPERIMENT,
    model: _ModelOption = None,
    top_k: _TopK = None,
    out: _Out = None,
    as_json: _Json = False,
    traffic: _Traffic = False,
    trace: _Trace = False,
    oversubscribe: Oversubscribe = False,
    ignore_unused_tensors: IgnoreUnusedTensors = False,
    timeout_s: _TimeoutS = DEFAULT_TIMEOUT_S,
    dtype: _Dtype = None,
    project: _Project = False,
    cluster: _Cluster = None,
    skew: _Skew = DEFAULT_SKEW,
) -> None:
    """Run an experiment's deployments in turn on the same ranks and show them side by side.

    Says which deployment was faster here and why: tokens per second, time per output token, where
    each step's time goes, and how the experts were loaded. Starts its own local ranks, or uses
    those of torchrun. Writes results.json, report.md and report.html.

    \b
    Examples:
      expertlane compare
          the paper's deployments on a small model, 16 local ranks
      expertlane compare --top-k 2,1
          the same twice: two experts a token, then one
      expertlane compare mine.toml --model ./my-checkpoint
          your experiment's deployments and workload on a checkpoint
      expertlane compare mine.toml --out results/mine
          your own experiment; start from experiments/paper-small.toml
      expertlane compare --traffic
          who sends how much to whom, and which rank, expert and layer are hottest
      expertlane compare --trace
          what every rank does when, step by step
      expertlane compare paper --project
          the paper's experiment on a modelled cluster of 16 H100
      expertlane compare --json | jq '.deployments[].steps[] | .phase, .tps.value'
          for other programs
      torchrun --nproc-per-node 16 -m expertlane compare
          on ranks that torchrun started
    """
    take_option("--timeout-s", timeout_s)
    comparisons = _comparisons(experiment, model, top_k, out)
    from expertlane.cli.output import check_folder, is_first_process
    from expertlane.engine.start import check_experiment

    for each, _ in comparisons:
        check_experiment(each)
    number_type = _dtype_of(comparisons, dtype)
    projectors = projectors_of(comparisons, project, cluster, skew, number_type)
    if is_first_process():
        for _, folder in comparisons:
            check_folder(folder)
    projections = projections_of(projectors) if is_first_process() else {}
    shown = Shown(projections, as_json=as_json, traffic=traffic)
    reason = _shortage(comparisons, number_type) if projectors else None
    if reason is None:
        comparisons = _with_checked_checkpoint(comparisons, ignore_unused_tensors)
        try:
            _measure(comparisons, shown, timeout_s, number_type, oversubscribe, trace)
            return
        except CapacityError as error:
            if not projectors or shown.num_published:
                raise
            reason = str(error)
    for each, folder in comparisons:
        shown.publish_projection(each, folder, reason)


def _measure(
    comparisons: "list[tuple[Experiment, Path]]",
    shown: Shown,
    timeout_s: float,
    dtype: str | None,
    oversubscribe: bool,
    trace: bool,
) -> None:
    """Run all on the same ranks.

    Raises:
        CapacityError: one of them does not fit; raised before the first is run.
    """
    from expertlane.cli.output import command_line, progress_on_stderr
    from expertlane.compare.machine import check_memory
    from expertlane.compare.run import run_comparison

    num_ranks = max(each.num_ranks for each, _ in comparisons)
    pool = _start(num_ranks, timeout_s, dtype, oversubscribe)
    if pool is None:  # this process was a rank of torchrun's; the first one speaks
        return
    with pool:
        for each, _ in comparisons:
            check_memory(each, pool)
        for each, folder in comparisons:
            traces: dict[str, list[StepRecord]] = {}
            on_trace = traces.__setitem__ if trace else None
            with progress_on_stderr() as progress:
                results = run_comparison(
                    each, pool, progress, command=command_line(), on_trace=on_trace
                )
            shown.publish(results, each, folder, traces)


def _with_checked_checkpoint(
    comparisons: "list[tuple[Experiment, Path]]", ignore_unused_tensors: bool
) -> "list[tuple[Experiment, Path]]":
    """The comparisons of the model that the checkpoint really holds; warnings go to stderr.

    Raises:
        SpecError: the checkpoint does not hold what its config.json says.
    """
    from expertlane.engine.start import check_checkpoint

    first = comparisons[0][0]  # they differ in experts per token alone
    if first.checkpoint is None:
        return comparisons
    tied = check_checkpoint(
        first.model,
        Path(first.checkpoint),
        ignore_unused_tensors=ignore_unused_tensors,
        log=lambda line: print(line, file=sys.stderr),
    ).tie_word_embeddings
    return [
        (replace(each, model=each.model.with_overrides(tie_word_embeddings=tied)), folder)
        for each, folder in comparisons
    ]


def _shortage(comparisons: "list[tuple[Experiment, Path]]", dtype: str | None) -> str | None:
    """Why one of them can't be run here, if that is known before any rank is started."""
    from expertlane.compare.machine import memory_shortage

    reasons = (memory_shortage(each, dtype) for each, _ in comparisons)
    return next(filter(None, reasons), None)


def _comparisons(
    argument: str, model_name: str | None, top_k: str | None, out: Path | None
) -> list[tuple["Experiment", Path]]:
    """What to run, and the folder of each; all checked before the first one runs."""
    from expertlane.engine.hub import resolve_model
    from expertlane.spec.experiment import find_experiment, read_experiment

    experiment = read_experiment(find_experiment(argument), resolve_model)
    if model_name is not None:
        experiment = _with_model(experiment, model_name)
    if top_k is None:
        return [(experiment, out or Path("results", experiment.name))]
    top_ks = _parse_top_ks(top_k)
    comparisons = []
    for k in top_ks:
        try:
            model = experiment.model.with_overrides(num_experts_per_tok=k)
        except SpecError as error:
            raise SpecError(f"--top-k {k}: {error}") from None
        if out is None:
            folder = Path("results", f"{experiment.name}-top{k}")
        else:
            folder = out / f"top{k}" if len(top_ks) > 1 else out
        comparisons.append((replace(experiment, model=model), folder))
    return comparisons


def _with_model(experiment: "Experiment", model_name: str) -> "Experiment":
    """The experiment's deployments and workload on another model."""
    from expertlane.cli.engine_options import find_model

    found = find_model(model_name)
    try:
        return replace(
            experiment,
            name=slug(experiment.name, found.config.name),
            model=found.config,
            checkpoint=os.path.abspath(found.folder) if found.folder else None,
        )
    except SpecError as error:
        raise SpecError(f"--model {model_name}: {error}") from None


def _parse_top_ks(text: str) -> list[int]:
    allowed = RANGES["num_experts_per_tok"]
    top_ks = [allowed.parse(part) for part in text.split(",")]
    if None in top_ks:
        raise UserError(
            f"--top-k is {shown(text)}; it must be {allowed}, or several with commas between: 2,1"
        )
    if len(set(top_ks)) < len(top_ks):
        raise UserError(f"--top-k is {shown(text)}; a number is given twice")
    return [int(top_k) for top_k in top_ks if top_k is not None]


def _dtype_of(comparisons: "list[tuple[Experiment, Path]]", dtype: Dtype | None) -> str | None:
    """What was asked for, else a checkpoint's own type, else None, the machine's choice."""
    from expertlane.engine.llm import own_dtype

    if dtype is not None:
        return dtype.value
    first = comparisons[0][0]  # they differ in experts per token alone
    return own_dtype(first.model if first.checkpoint else None)


def _start(
    num_ranks: int, timeout_s: float, dtype: str | None, oversubscribe: bool
) -> "RankPool | None":
    """Start the ranks, saying so on stderr."""
    from expertlane.cli.output import progress_on_stderr
    from expertlane.engine.start import start_pool

    with progress_on_stderr() as progress:
        progress.task(f"starting {num_ranks} ranks", 1)
        pool = start_pool(
            num_ranks,
            timeout_s=timeout_s,
            dtype=dtype,
            oversubscribe=oversubscribe,
        )
        progress.advance()
        progress.done()
    return pool
