"""`expertlane compare`: run an experiment's deployments in turn, and show them side by side."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.cli import output
from expertlane.cli.compare_options import CompareOptions, ProjectionOptions, VirtualTimeOptions
from expertlane.cli.compare_servers import (
    ServerOptions,
    compare_running,
    compare_servers,
    named_experiment,
    print_commands,
)
from expertlane.cli.load import ServedLoad
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import given, publishes
from expertlane.cli.options import (
    LaunchOptions,
    fields_of,
    known_experiments,
    parse_list,
)
from expertlane.errors import CapacityError, MissingExtraError, UserError, naming, require_extra
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.hf_config import resolve_model
from expertlane.spec.names import Dtype
from expertlane.spec.ranges import shown

if TYPE_CHECKING:
    from expertlane.comparison.projection import ExperimentProjector
    from expertlane.comparison.virtual import VirtualSettings
    from expertlane.results.results import Results
    from expertlane.results.step_record import StepRecord
    from expertlane.spec.experiment import Experiment, Projection

_DEFAULT_EXPERIMENT = "paper-small"
_OF_EXPERIMENT = frozenset({"--only", "--dtype"})


@dataclass
class _Comparison:
    """An experiment to run, and its projection.

    Attributes:
        folder: folder for its results; None to write none.
        projection: its projection, if asked for.
    """

    experiment: "Experiment"
    folder: Path | None
    projection: "Results | None" = None
    is_measured: bool = False


@publishes
def compare(
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="EXPERIMENT",
            show_default=f"{_DEFAULT_EXPERIMENT}; with --url none",
            autocompletion=known_experiments,
            help="A TOML file, or the name of an experiment that comes with expertlane: "
            "paper-small (laptop), paper-small-skewed (the same model, some experts in demand, "
            "load balanced), paper (full size).",
        ),
    ] = None,
    *,
    own: CompareOptions,
    traffic: ServedLoad,
    call: output.Call,
    time: VirtualTimeOptions,
    launch: LaunchOptions,
    projection: ProjectionOptions,
    servers: ServerOptions,
) -> Generator[output.Found]:
    """Run an experiment's deployments in turn on the same ranks and show them side by side.

    Says which deployment is faster and why: tokens per second, time per output token, where each
    step's time goes, and how the experts were loaded. Ranks that share cores take turns, so the
    answer is in virtual time: computing as measured, each rank on its own core, transfers as on the
    links of a cluster. Wall time is shown beside it. Starts local ranks, or under torchrun those of
    several nodes. Writes results.json, report.md and report.html.

    \b
    Examples:
      expertlane compare
          the paper's deployments on a small model, 16 local ranks
      expertlane compare --experts-per-token 2,1
          the same twice: two experts per token, then one
      expertlane compare mine.toml --model ./my-checkpoint
          your experiment's deployments and workload on a checkpoint
      expertlane compare mine.toml --out results/mine
          your own experiment; start from experiments/paper-small.toml
      expertlane compare --only 7,8 --repeat 10
          the seventh and the eighth deployment, ten times each in turns
      expertlane compare --trace
          a Chrome trace of each deployment
      expertlane compare --url tp8=http://a:8000 --url ep16=http://b:8000
          two servers that run already, of any engine
      expertlane compare mine.toml --engine vllm --engine sglang
          each deployment as a server of each engine, started and stopped here
      expertlane compare paper --project
          the paper's experiment on a modelled cluster of 16 H100
      expertlane compare mine.toml --project --fit-corrections mine-fit.toml
          and correct later projections by what was measured
      expertlane compare --json | jq '.deployments[].steps[] | .phase, .tps.value'
          for other programs
      torchrun --nnodes 2 --nproc-per-node 1 … -m expertlane compare
          on two nodes, 8 ranks each
    """
    from expertlane.balance.holding import check_experiment

    if servers.dry_run:
        if not call.is_typed:
            raise UserError("dry_run prints commands; expertlane compare --dry-run does so")
        servers.check_without_ranks(own, time, launch)
        named = named_experiment(experiment, servers, traffic)
        projection.check(*(["cluster"] if servers.scripts is not None else []))
        (only,) = _comparisons(named, own, output.Call(""), has_weights=False, is_run_here=False)
        print_commands(
            only.experiment, servers, own.dtype, projection.cluster, as_json=call.as_json
        )
        return
    projection.check()
    if servers.is_asked:
        servers.check_without_ranks(own, time, launch)
        if experiment is None and servers.url and not servers.engine:
            yield from _running(own, traffic, projection, servers, call)
            return
        named = named_experiment(experiment, servers, traffic)
        if projection.fit_corrections is not None and len(servers.engines()) > 1:
            raise UserError("--fit-corrections is of one engine; give one --engine")
        yield from _on_servers(named, own, projection, servers, call)
        return
    if unused := [each for each in given(servers) if each != "--engine"]:
        raise UserError(f"{unused[0]} is for servers; give --engine or --url")
    experiment = named_experiment(experiment or _DEFAULT_EXPERIMENT, servers, traffic)

    reason = _why_only_projected(projection)
    is_run_here = reason is None
    comparisons = _comparisons(
        experiment, own, call, has_weights=is_run_here, is_run_here=is_run_here
    )
    virtual = time.settings()
    if own.resume:
        _check_resumable(comparisons, virtual)
    if projection.fit_corrections is not None and len(comparisons) > 1:
        raise UserError("--fit-corrections takes one comparison; give one --experts-per-token")
    for each in comparisons:
        check_experiment(each.experiment, is_modelled=not is_run_here)
        if virtual is not None:
            virtual.check(each.experiment.deployments + each.experiment.scaling)
    dtype = _dtype_of(comparisons, own.dtype)
    projectors = []
    if projection.project:
        projectors = [_projector(each.experiment, projection, own.dtype) for each in comparisons]
    if output.is_first_process():
        for each, projector in zip(comparisons, projectors, strict=False):
            with output.progress_on_stderr() as progress:
                each.projection = projector.run(progress, call.command)
    if reason is None:
        reason = _why_not_here(comparisons, dtype)
    if reason is not None and not projection.project:
        raise UserError(reason)
    if reason is not None and projection.fit_corrections is not None:
        raise UserError(f"--fit-corrections needs measurements, but {reason}")
    if reason is None:
        _check_checkpoint(comparisons, launch.ignore_unused_tensors)
        try:
            yield from _measure(comparisons, own, call.command, virtual, launch, projection, dtype)
            return
        except CapacityError as error:
            is_fit = projection.fit_corrections is not None
            if not projection.project or is_fit or comparisons[0].is_measured:
                raise
            reason = str(error)
    for each in comparisons:
        assert each.projection is not None, "the first process projects"
        yield output.Found(replace(each.projection, not_measured=reason), each.folder)
    output.print_message(f"expertlane: projected, and not measured on this machine: {reason}")


def _running(
    own: CompareOptions,
    traffic: ServedLoad,
    projection: ProjectionOptions,
    servers: ServerOptions,
    call: output.Call,
) -> Generator[output.Found]:
    """Compare servers that run already, without an experiment.

    Raises:
        UserError: an option needs an experiment.
    """
    from expertlane.comparison.turns import Repeats

    if projection.project:
        raise UserError("--project needs an EXPERIMENT, with model and deployments")
    of_others = [each for each in given(own) if each in _OF_EXPERIMENT]
    if of_others:
        raise UserError(f"{of_others[0]} needs an EXPERIMENT")
    names = [*servers.targets()]
    folder = call.folder(output.slug("compare", *names))
    ended: list[BaseException] = []
    repeats = Repeats(own.repeat, own.min_time)
    results = compare_running(traffic, own.model, servers, repeats, folder, call.command, ended)
    yield output.Found(results, folder)
    for error in ended:
        raise error


def _on_servers(
    experiment: str,
    own: CompareOptions,
    projection: ProjectionOptions,
    servers: ServerOptions,
    call: output.Call,
) -> Generator[output.Found]:
    from expertlane.comparison.turns import Repeats

    has_weights = bool(servers.engine)
    (each,) = _comparisons(experiment, own, call, has_weights=has_weights, is_run_here=False)
    projected = None
    if projection.project:
        projector = _projector(each.experiment, projection, own.dtype)
        with output.progress_on_stderr() as progress:
            projected = projector.run(progress, call.command)
    repeats = Repeats(own.repeat, own.min_time)
    ended: list[BaseException] = []
    results = compare_servers(
        each.experiment, servers, repeats, own.dtype, each.folder, call.command, ended
    )
    if projected is not None:
        results = results.beside(projected)
    yield output.Found(results, each.folder, partial(projection.write_fit, results))
    for error in ended:
        raise error


def _why_only_projected(projection: ProjectionOptions) -> str | None:
    """The reason why nothing can be measured, if the extra `engine` is not installed; else None.

    Raises:
        MissingExtraError: it is not installed, and no projection is asked for.
    """
    try:
        require_extra("engine", "running models")
    except MissingExtraError as error:
        if not projection.project:
            raise
        return str(error)
    return None


def _why_not_here(comparisons: list[_Comparison], dtype: Dtype | None) -> str | None:
    """The reason why one of them can't run here, as far as known before ranks start; else None."""
    from expertlane.comparison.run import why_not_here

    reasons = (why_not_here(each.experiment, dtype) for each in comparisons)
    return next(filter(None, reasons), None)


def _projector(
    experiment: "Experiment", options: ProjectionOptions, dtype: str | None
) -> "ExperimentProjector":
    """The projector, checked before anything is projected.

    Raises:
        UserError: an unknown cluster, or one with too few devices.
    """
    from expertlane.comparison.projection import (
        ExperimentProjector,
        ServingConditions,
        usual_number_type,
    )
    from expertlane.cost.laws.profile import Execution, parse_cluster
    from expertlane.cost.throughput import Goals
    from expertlane.spec.experiment import ProjectionSetup
    from expertlane.spec.workload import check_lengths

    asked = options.applied_to(experiment, dtype)
    is_own = experiment.projection is not None and not options.given
    with naming("[projection]") if is_own else nullcontext():
        model, cluster = experiment.model, parse_cluster(asked.cluster)
        load = asked.load(experiment.workload)
        if load is not None:
            check_lengths(load, model.max_position_embeddings)
        if experiment.checkpoint is None:
            found, usual = FoundModel(model.name, model, None), usual_number_type(cluster.profile)
        else:
            found = replace(find_model(experiment.checkpoint, weights=False), config=model)
            usual = None
        there = found.on_cluster(asked, cluster, experiment.workload.seed, dtype=usual)
    execution, goals = Execution(asked.execution), Goals.of(asked.slos)
    served = ServingConditions(there.routing, goals, load, execution, asked.num_running)
    on_cluster = ProjectionSetup(**fields_of(ProjectionSetup, asked))
    skew = there.skew if there.skew is not None else model.usual_skew
    return ExperimentProjector(experiment, there.cluster, there.types, skew, on_cluster, served)


def _measure(
    comparisons: list[_Comparison],
    own: CompareOptions,
    command: str,
    virtual: "VirtualSettings | None",
    launch: LaunchOptions,
    projection: ProjectionOptions,
    dtype: Dtype | None,
) -> Iterator[output.Found]:
    """Run all on the same ranks.

    Raises:
        CapacityError: one of them does not fit; raised before the first is run.
    """
    from expertlane.comparison.run import check_memory, run_comparison
    from expertlane.comparison.turns import Repeats
    from expertlane.engine.launch import start_pool

    num_ranks = max(each.experiment.num_ranks for each in comparisons)
    with output.task_on_stderr(f"starting {num_ranks} ranks"):
        config = EngineConfig(
            dtype=dtype,
            timeout_s=launch.timeout_s,
            oversubscribe=launch.oversubscribe,
            cpu_isa=launch.cpu_isa,
        )
        pool = start_pool(config, num_ranks)
    if pool is None:  # torchrun started this process beside the one that starts ranks
        return
    with pool:
        for each in comparisons:
            check_memory(each.experiment, pool)
        for each in comparisons:
            traces: dict[str, list[StepRecord]] = {}
            on_trace = traces.__setitem__ if own.trace else None
            with output.progress_on_stderr() as progress, _telling_what_is_kept(each.folder):
                results = run_comparison(
                    replace(each.experiment, projection=None),
                    pool,
                    progress,
                    command=command,
                    virtual=virtual,
                    repeats=Repeats(own.repeat, own.min_time),
                    folder=None if virtual is not None and virtual.compute else each.folder,
                    resume=own.resume,
                    on_trace=on_trace,
                )
            if each.projection is not None:
                results = results.beside(each.projection)
            each.is_measured = True
            yield output.Found(
                results, each.folder, partial(_write_more, results, traces, each.folder, projection)
            )


def _write_more(
    results: "Results",
    traces: "Mapping[str, Sequence[StepRecord]]",
    folder: Path | None,
    projection: ProjectionOptions,
) -> Sequence[Path]:
    """Write Chrome traces, where there is a folder, and corrections, where they are asked for."""
    from expertlane.results.timeline import write_traces

    written = () if folder is None else write_traces(traces, folder)
    return (*written, *projection.write_fit(results))


def _check_resumable(comparisons: list[_Comparison], virtual: "VirtualSettings | None") -> None:
    """Refuse --resume where nothing is kept.

    Raises:
        UserError: results are not written, or computing is priced from plans of steps.
    """
    if any(each.folder is None for each in comparisons):
        raise UserError("--resume needs the folder of the results; give --out")
    if virtual is not None and virtual.compute is not None:
        raise UserError("--resume and --compute: the plans of steps are not kept; leave one out")


@contextmanager
def _telling_what_is_kept(folder: Path | None) -> Iterator[None]:
    """Say how to resume, where a comparison ends before it is complete."""
    try:
        yield
    except BaseException:
        from expertlane.comparison.journal import FILE_NAME

        if folder is not None and (folder / FILE_NAME).exists():
            output.print_message(
                f"expertlane: what is measured so far is kept in {folder}; --resume goes on with it"
            )
        raise


def _check_checkpoint(comparisons: list[_Comparison], ignore_unused_tensors: bool) -> None:
    """Take the model that the checkpoint really holds; warnings go to stderr.

    Raises:
        SpecError: the checkpoint does not hold what its config.json says.
    """
    from expertlane.engine.launch import check_checkpoint

    first = comparisons[0].experiment  # they differ in experts per token alone
    if first.checkpoint is None:
        return
    tied = check_checkpoint(
        first.model,
        Path(first.checkpoint),
        ignore_unused_tensors=ignore_unused_tensors,
        log=output.print_message,
    ).tie_word_embeddings
    for each in comparisons:
        model = each.experiment.model.with_overrides(tie_word_embeddings=tied)
        each.experiment = replace(each.experiment, model=model)


def _comparisons(
    argument: str, own: CompareOptions, call: output.Call, *, has_weights: bool, is_run_here: bool
) -> list[_Comparison]:
    """The comparisons to run, all checked before the first one runs.

    Args:
        has_weights: False where a checkpoint's configuration is enough.
        is_run_here: ranks of this command read the weights, not a server's.
    """
    from expertlane.spec.experiment import find_experiment, read_experiment

    find_folder = partial(resolve_model, weights=has_weights)
    experiment = read_experiment(find_experiment(argument), find_folder, is_run_here=is_run_here)
    if own.model is not None:
        found = find_model(own.model, weights=has_weights, is_run_here=is_run_here)
        with naming(f"--model {own.model}"):
            experiment = replace(
                experiment,
                name=output.slug(experiment.name, found.config.name),
                model=found.config,
                checkpoint=os.path.abspath(found.folder) if found.folder else None,
                projection=_without_num_running(experiment),
            )
    if own.only is not None:
        with naming(f"--only {own.only}"):
            experiment = experiment.only(own.only)
        experiment = replace(experiment, name=f"{experiment.name}-only")
    if own.experts_per_token is None:
        return [_Comparison(experiment, call.folder(experiment.name))]
    given = own.experts_per_token
    top_ks = parse_list("--experts-per-token", "num_experts_per_tok", given, "2,1")
    if len(set(top_ks)) < len(top_ks):
        raise UserError(f"--experts-per-token is {shown(given)}; a number is given twice")
    comparisons = []
    for k in top_ks:
        with naming(f"--experts-per-token {k}"):
            model = experiment.model.with_overrides(num_experts_per_tok=k)
        part = f"top{k}" if len(top_ks) > 1 else ""
        own_call = call if call.out is None else replace(call, out=call.out / part)
        folder = own_call.folder(f"{experiment.name}-top{k}")
        of_model = replace(experiment, model=model, projection=_without_num_running(experiment))
        comparisons.append(_Comparison(of_model, folder))
    return comparisons


def _without_num_running(experiment: "Experiment") -> "Projection | None":
    """The experiment's `[projection]` for another model, without numbers found for its own."""
    own = experiment.projection
    return None if own is None else replace(own, num_running={})


def _dtype_of(comparisons: list[_Comparison], dtype: Dtype | None) -> Dtype | None:
    """`--dtype`, else a checkpoint's own type, else None for the machine's choice."""
    first = comparisons[0].experiment  # they differ in experts per token alone
    return dtype or (first.model.own_dtype if first.checkpoint else None)
