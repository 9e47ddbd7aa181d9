"""Run an experiment's deployments in turn on the same ranks, and collect what was measured."""

import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from expertlane import __version__
from expertlane.compare.collect import build_results, deployment_result
from expertlane.compare.collect_rebalances import rebalance_results
from expertlane.engine.commands import HeldBytes, MeasureRates, RankMachine
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.engine.rebalancing import RebalancingRunner, runner_for
from expertlane.engine.start import check_deployment, describe_ranks, fit_to_machine
from expertlane.errors import CapacityError, ModelError, UserError
from expertlane.memory import workload_limits
from expertlane.metrics import summarise
from expertlane.ops.host import ForeignLoad
from expertlane.progress import Progress
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.schema import DeploymentResult, Machine, Results, Versions
from expertlane.results.step_record import MachinePeak, StepRecord
from expertlane.results.timeline import StepTimeline, timelines_of
from expertlane.schedule.drive import FinishedStep, drive, step_records
from expertlane.schedule.limits import Limits
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.experiment import Experiment
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

_WARM_UP_LEN = 4
_TRACED_LEN = 5


def run_comparison(
    experiment: Experiment,
    pool: RankPool,
    progress: Progress,
    *,
    command: str,
    on_trace: Callable[[str, list[StepRecord]], None] | None = None,
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Args:
        command: how a user repeats it; kept in the results.
        on_trace: gets each deployment's name, and a prefill and a decode step of it with events,
            from a short run that is not measured.

    Raises:
        RankError: a rank died, hung or failed.
        ModelError: the logits of a sequence are not finite.
    """
    seen = describe_ranks(pool)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    runs = _Runs(experiment, pool, seen, peak, ranks_per_node, progress)
    # Twice, the second time backwards: what changes on the machine meanwhile hits all alike.
    for run, order in enumerate((experiment.deployments, experiment.deployments[::-1])):
        for deployment in order:
            runner = runs.measure(deployment, run)
            if run == 0:
                traced = runs.trace(deployment, runner)
                if on_trace is not None:
                    on_trace(deployment.name, traced)
    for deployment in experiment.scaling:
        runs.measure(deployment, 0)
    hosts = {each.host: each for each in seen}.values()
    machine = Machine(
        cpu_name=seen[0].cpu_name,
        device=seen[0].device,
        num_cores=sum(each.num_cores for each in hosts),
        num_idle_gpus=sum(each.num_idle_gpus for each in hosts),
        memory_bytes=sum(each.memory_bytes for each in (seen if seen[0].on_gpu else hosts)),
        num_ranks=experiment.num_ranks,
        ranks_per_node=ranks_per_node,
        backend=seen[0].backend,
        dtype=seen[0].dtype,
        peak=peak,
    )
    return build_results(
        experiment,
        command=command,
        machine=machine,
        versions=Versions(__version__, platform.python_version(), seen[0].torch_version),
        deployments=[runs.result(each) for each in experiment.deployments],
        scaling=[runs.result(each) for each in experiment.scaling],
        limits=runs.limits,
        foreign_cpu_share=runs.foreign_cpu_share,
    )


def check_memory(experiment: Experiment, pool: RankPool) -> None:
    """Compare what every deployment needs with what is free, before anything is allocated.

    Raises:
        CapacityError: the first deployment that does not fit, with both numbers.
    """
    seen = describe_ranks(pool)
    for deployment in experiment.deployments + experiment.scaling:
        deployment_limits(experiment, deployment, seen)


def deployment_limits(
    experiment: Experiment, deployment: Deployment, seen: Sequence[RankMachine]
) -> Limits:
    """The scheduler's sizes; the cache holds the whole workload, or else what memory there is.

    Args:
        seen: [num_ranks].

    Raises:
        UserError: its experts cannot be placed or reached so.
        CapacityError: not even one sequence fits, with both numbers.
    """
    model, layout = experiment.model, deployment.layout
    limits = workload_limits(experiment.workload, model, layout)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    try:
        placements = check_deployment(model, deployment, ranks_per_node)
    except UserError as error:
        raise UserError(f"deployment {deployment.name!r}: {error}") from None
    try:
        return fit_to_machine(model, layout, limits, seen, placements=placements)
    except CapacityError as error:
        raise CapacityError(
            f"deployment {deployment.name!r}: {error}; use a smaller model or shorter sequences"
        ) from None


def measure_peak(pool: RankPool, seen: Sequence[RankMachine]) -> MachinePeak:
    """Measure at once on as many ranks as have a core or a device of their own."""
    measuring = [
        rank
        for rank, each in enumerate(seen)
        if each.on_gpu or rank % each.ranks_per_node < each.num_cores
    ]
    rates = pool.call(MeasureRates(), ranks=measuring)
    on_gpu = seen[0].on_gpu
    return MachinePeak(
        gemm_flops_per_s=sum(each.gemm_flops_per_s for each in rates),
        read_bytes_per_s=sum(each.read_bytes_per_s for each in rates),
        num_units=len(rates) if on_gpu else sum(each.num_threads for each in rates),
        unit="GPU" if on_gpu else "core",
        dtype=seen[0].dtype,
    )


def _typical(
    steps: Sequence[StepRecord], measured: Sequence[StepRecord], num_kept: int
) -> Sequence[StepRecord]:
    """Of so many steps in a row those with most tokens that take most nearly the usual time."""
    rows = [steps[first : first + num_kept] for first in range(len(steps) - num_kept + 1)]
    if not rows:
        return steps

    def num_tokens(row: Sequence[StepRecord]) -> int:
        return sum(step.num_tokens for step in row)

    def seconds(row: Sequence[StepRecord]) -> float:
        return row[-1].finished_s - row[0].submitted_s

    full = [row for row in rows if num_tokens(row) == max(map(num_tokens, rows))]
    usual = [measured[first : first + num_kept] for first in range(len(measured) - num_kept + 1)]
    alike = [row for row in usual if num_tokens(row) == num_tokens(full[0])] or full
    usual_s = median(map(seconds, alike))
    return min(full, key=lambda row: abs(seconds(row) - usual_s))


def _drive(
    deployment: Deployment,
    scheduler: ContinuousScheduler,
    runner: ModelRunner | RebalancingRunner,
) -> Iterator[FinishedStep]:
    try:
        yield from drive(scheduler, runner)
    except ModelError as error:
        raise ModelError(f"deployment {deployment.name!r}: {error}") from None


class _Runs:
    """What was measured of every deployment, repetition by repetition.

    Attributes:
        limits: of each deployment's scheduler, by its name.
        foreign_cpu_share: of this host's cores, what other processes used meanwhile.
    """

    def __init__(
        self,
        experiment: Experiment,
        pool: RankPool,
        seen: Sequence[RankMachine],
        peak: MachinePeak,
        ranks_per_node: int,
        progress: Progress,
    ) -> None:
        self._experiment = experiment
        self._pool = pool
        self.limits = {
            each.name: deployment_limits(experiment, each, seen)
            for each in experiment.deployments + experiment.scaling
        }
        self._peak = peak
        self._ranks_per_node = ranks_per_node
        self._progress = progress
        self._prompts = experiment.workload.prompt_token_ids(experiment.model.vocab_size)
        self._prefill: dict[str, list[StepRecord]] = defaultdict(list)
        self._decode: dict[str, list[StepRecord]] = defaultdict(list)
        self._tokens: dict[str, npt.NDArray[np.int64]] = {}
        self._held: dict[str, list[HeldBytes]] = {}
        self._dispatch: dict[str, DispatchTable | None] = {}
        self._rebalances: dict[str, tuple[RebalanceResult, ...]] = {}
        self._timelines: dict[str, dict[Phase, StepTimeline]] = {}
        self._foreign = ForeignLoad()

    @property
    def foreign_cpu_share(self) -> float:
        """Of this host's cores, since the first run."""
        return self._foreign.share()

    def measure(self, deployment: Deployment, run: int) -> ModelRunner | RebalancingRunner:
        """Deploy, warm up, and run the workload once; gives what ran it."""
        experiment, name = self._experiment, deployment.name
        workload, progress, limits = experiment.workload, self._progress, self.limits[name]
        num_tokens = workload.num_sequences * workload.output_len
        progress.task(f"{name}, again" if run else name, 1 + num_tokens)
        runner = runner_for(
            self._pool,
            experiment.model,
            deployment,
            limits,
            seed=experiment.seed,
            ranks_per_node=self._ranks_per_node,
            checkpoint=Path(experiment.checkpoint) if experiment.checkpoint else None,
            log=lambda line: None,  # results tell of it
        )
        self._held[name] = runner.held
        self._dispatch.setdefault(name, runner.dispatch_table)
        self._warm_up(deployment, runner)
        progress.advance()
        scheduler, requests = self._schedule(deployment, workload)
        for record in step_records(_drive(deployment, scheduler, runner), run):
            steps = self._prefill if record.phase is Phase.PREFILL else self._decode
            steps[name].append(record)
            progress.advance(len(record.seq_ids))
        progress.done()
        if isinstance(runner, RebalancingRunner):
            self._rebalances[name] = rebalance_results(runner)
        self._tokens[name] = np.array([request.output_token_ids for request in requests])
        return runner

    def trace(
        self, deployment: Deployment, runner: ModelRunner | RebalancingRunner
    ) -> list[StepRecord]:
        """A prefill and a decode step of the workload with short outputs.

        Of those with most tokens the one that takes about as long as most did when measured; of
        micro-batches that rotate, as many steps of each as make a round.
        """
        workload = self._experiment.workload
        short = replace(workload, output_len=min(_TRACED_LEN, workload.output_len))
        scheduler, _ = self._schedule(deployment, short, record_events=True)
        options = deployment.options
        is_rotating = options.micro_batch_schedule == "rotating"
        num_kept = options.num_micro_batches if is_rotating else 1
        steps = list(step_records(_drive(deployment, scheduler, runner)))
        kept: list[StepRecord] = []
        for phase, measured in (
            (Phase.PREFILL, self._prefill[deployment.name]),
            (Phase.DECODE, self._decode[deployment.name]),
        ):
            of_phase = [step for step in steps if step.phase is phase]
            kept += _typical(of_phase, measured, num_kept)
        self._timelines[deployment.name] = timelines_of(kept)
        return kept

    def _schedule(
        self,
        deployment: Deployment,
        workload: Workload,
        *,
        record: bool = True,
        record_events: bool = False,
    ) -> tuple[ContinuousScheduler, list[Request]]:
        """A scheduler with the whole workload queued."""
        limits = self.limits[deployment.name]
        scheduler = ContinuousScheduler(
            deployment.layout,
            deployment.options,
            limits,
            record=record,
            record_events=record_events,
        )
        prompts = self._prompts[:, : workload.prompt_len]
        requests = [
            Request(str(number), prompt, max_tokens=workload.output_len)
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            scheduler.add(request)
        return scheduler, requests

    def _warm_up(self, deployment: Deployment, runner: ModelRunner | RebalancingRunner) -> None:
        """Short prompts and one decode step, unrecorded."""
        workload = self._experiment.workload
        short = replace(
            workload,
            prompt_len=min(_WARM_UP_LEN, workload.prompt_len),
            output_len=min(2, workload.output_len),
        )
        scheduler, _ = self._schedule(deployment, short, record=False)
        for _ in _drive(deployment, scheduler, runner):
            pass

    def result(self, deployment: Deployment) -> DeploymentResult:
        """All runs of a deployment together."""
        name = deployment.name
        return deployment_result(
            deployment,
            self._experiment.model,
            self._experiment.workload,
            summarise(
                deployment.layout,
                self._prefill[name],
                self._decode[name],
                self._peak,
                self._ranks_per_node,
            ),
            self._held[name],
            self._tokens[name],
            is_baseline=deployment.is_baseline,
            ranks_per_node=self._ranks_per_node,
            timelines=self._timelines.get(name, {}),
            rebalances=self._rebalances.get(name, ()),
            dispatch_table=self._dispatch[name],
        )
