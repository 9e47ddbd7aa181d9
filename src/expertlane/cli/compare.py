"""`expertlane compare`: run an experiment's deployments in turn, and show them side by side."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.cli.compare_output import (
    DEFAULT_SKEW,
    ResultPrinter,
    projections_of,
    projectors_of,
)
from expertlane.cli.options import (
    Dtype,
    LaunchOptions,
    cluster_option,
    dtype_option,
    parse_list,
    takes_groups,
)
from expertlane.cli.publish import FILES, JSON_HELP, slug
from expertlane.errors import CapacityError, SpecError, UserError
from expertlane.spec.ranges import shown

if TYPE_CHECKING:
    from expertlane.results.step_record import StepRecord
    from expertlane.spec.experiment import Experiment

DEFAULT_EXPERIMENT = "paper-small"


@dataclass(frozen=True, kw_only=True)
class _Options:
    model: str | None = typer.Option(
        None,
        metavar="MODEL",
        help="In place of the experiment's model: a checkpoint's folder, a hub id (org/name), or "
        "a preset, whose weights are random.",
    )
    top_k: str | None = typer.Option(
        None,
        metavar="K[,K…]",
        help="Experts per token in place of the model's; with several, one comparison each, one "
        "after the other.",
    )
    out: Path | None = typer.Option(
        None,
        metavar="DIR",
        help=f"Folder for {FILES} (with several K, its subfolders topK). "
        "Default: results/NAME, with -MODEL and -topK added where those options are given.",
    )
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP)
    traffic: bool = typer.Option(
        False,
        "--traffic",
        help="Also show, of each deployment: who sent how much to whom, how far tokens spread, "
        "what is hottest, who comes last.",
    )
    trace: bool = typer.Option(
        False,
        "--trace",
        help="Also write trace-NAME.json of each deployment: what every rank did when, in one "
        "prefill and one decode step; open it in ui.perfetto.dev or chrome://tracing.",
    )
    dtype: Dtype | None = dtype_option("the machine's choice")


@dataclass(frozen=True, kw_only=True)
class _Projection:
    project: bool = typer.Option(
        False,
        "--project",
        help="Also show what a cluster model says of the same deployments, in tables of its own; "
        "alone where this machine is too small to run them.",
    )
    cluster: str | None = cluster_option(
        None, "The modelled cluster for --project", "Default: as many h100 as ranks."
    )
    skew: float = typer.Option(
        DEFAULT_SKEW,
        metavar="ALPHA",
        help="For --project: beside balanced routing, one where experts' popularity falls with "
        "their rank to the power of -ALPHA.",
    )


@takes_groups
def compare(
    experiment: Annotated[
        str,
        typer.Argument(
            help="A TOML file, or the name of an experiment that comes with expertlane: "
            "paper-small (laptop), paper-small-skewed (the same model, some experts in demand, "
            "load balanced), paper (full size)."
        ),
    ] = DEFAULT_EXPERIMENT,
    *,
    own: _Options,
    launch: LaunchOptions,
    projection: _Projection,
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
    comparisons = _comparisons(experiment, own)
    from expertlane.cli.output import check_folder, is_first_process
    from expertlane.engine.launch import check_experiment

    for each, _ in comparisons:
        check_experiment(each)
    number_type = _dtype_of(comparisons, own.dtype)
    projectors = projectors_of(
        comparisons, projection.project, projection.cluster, projection.skew, number_type
    )
    for _, folder in comparisons:
        check_folder(folder)
    projections = projections_of(projectors) if is_first_process() else {}
    printer = ResultPrinter(projections, as_json=own.as_json, traffic=own.traffic)
    reason = _shortage(comparisons, number_type) if projectors else None
    if reason is None:
        comparisons = _with_checked_checkpoint(comparisons, launch.ignore_unused_tensors)
        try:
            _measure(comparisons, printer, launch, number_type, own.trace)
            return
        except CapacityError as error:
            if not projectors or printer.num_published:
                raise
            reason = str(error)
    for _, folder in comparisons:
        printer.publish_projection(folder, reason)


def _measure(
    comparisons: "list[tuple[Experiment, Path]]",
    printer: ResultPrinter,
    launch: LaunchOptions,
    dtype: str | None,
    trace: bool,
) -> None:
    """Run all on the same ranks.

    Raises:
        CapacityError: one of them does not fit; raised before the first is run.
    """
    from expertlane.cli.output import command_line, progress_on_stderr, task_on_stderr
    from expertlane.compare.machine import check_memory
    from expertlane.compare.run import run_comparison
    from expertlane.engine.launch import start_pool

    num_ranks = max(each.num_ranks for each, _ in comparisons)
    with task_on_stderr(f"starting {num_ranks} ranks"):
        pool = start_pool(
            num_ranks, timeout_s=launch.timeout_s, dtype=dtype, oversubscribe=launch.oversubscribe
        )
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
            printer.publish(results, folder, traces)


def _with_checked_checkpoint(
    comparisons: "list[tuple[Experiment, Path]]", ignore_unused_tensors: bool
) -> "list[tuple[Experiment, Path]]":
    """The comparisons of the model that the checkpoint really holds; warnings go to stderr.

    Raises:
        SpecError: the checkpoint does not hold what its config.json says.
    """
    from expertlane.engine.launch import check_checkpoint

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


def _comparisons(argument: str, own: _Options) -> list[tuple["Experiment", Path]]:
    """What to run, and the folder of each; all checked before the first one runs."""
    from expertlane.engine.checkpoint_folder import resolve_model
    from expertlane.spec.experiment import find_experiment, read_experiment

    experiment = read_experiment(find_experiment(argument), resolve_model)
    if own.model is not None:
        experiment = _with_model(experiment, own.model)
    if own.top_k is None:
        return [(experiment, own.out or Path("results", experiment.name))]
    top_ks = parse_list("--top-k", "num_experts_per_tok", own.top_k, "2,1")
    if len(set(top_ks)) < len(top_ks):
        raise UserError(f"--top-k is {shown(own.top_k)}; a number is given twice")
    comparisons = []
    for k in top_ks:
        try:
            model = experiment.model.with_overrides(num_experts_per_tok=k)
        except SpecError as error:
            raise SpecError(f"--top-k {k}: {error}") from None
        if own.out is None:
            folder = Path("results", f"{experiment.name}-top{k}")
        else:
            folder = own.out / f"top{k}" if len(top_ks) > 1 else own.out
        comparisons.append((replace(experiment, model=model), folder))
    return comparisons


def _with_model(experiment: "Experiment", model_name: str) -> "Experiment":
    """The experiment's deployments and workload on another model."""
    from expertlane.cli.model import find_model

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


def _dtype_of(comparisons: "list[tuple[Experiment, Path]]", dtype: Dtype | None) -> str | None:
    """What was asked for, else a checkpoint's own type, else None, the machine's choice."""
    from expertlane.engine.llm import own_dtype

    if dtype is not None:
        return dtype
    first = comparisons[0][0]  # they differ in experts per token alone
    return own_dtype(first.model if first.checkpoint else None)
