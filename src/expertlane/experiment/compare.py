"""Run an experiment's deployments in turn on the same ranks, and collect what was measured."""

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from expertlane import __version__
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.errors import CapacityError
from expertlane.experiment.collect import build_results, deployment_result
from expertlane.experiment.progress import Progress
from expertlane.metrics import summarise
from expertlane.plan.memory import largest_rank_memory
from expertlane.results import DeploymentResult, Machine, Results, Versions
from expertlane.schedule.drive import FinishedStep, drive
from expertlane.schedule.fixed import FixedScheduler
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.machine import MachinePeak
from expertlane.spec.record import StepRecord

if TYPE_CHECKING:
    from expertlane.experiment.machine import RankMachine, RankRates

_DESCRIBE = "expertlane.experiment.machine:describe"
_MEASURE_RATES = "expertlane.experiment.machine:measure_rates"


def run_comparison(
    experiment: Experiment, pool: RankPool, progress: Progress, *, command: str
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Args:
        command: how a user repeats it; kept in the results.

    Raises:
        RankError: a rank died, hung or failed.
    """
    seen: list[RankMachine] = pool.call(_DESCRIBE)
    ranks_per_node = experiment.cluster.ranks_per_node or seen[0].ranks_per_node
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    deployments, scaling = (
        [_run(experiment, each, pool, peak, ranks_per_node, progress) for each in group]
        for group in (experiment.deployments, experiment.scaling)
    )
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
        deployments=deployments,
        scaling=scaling,
    )


def check_memory(experiment: Experiment, pool: RankPool) -> None:
    """Compare what every deployment needs with what is free, before anything is allocated.

    Raises:
        CapacityError: the first deployment that does not fit, with both numbers.
    """
    seen: list[RankMachine] = pool.call(_DESCRIBE)
    tightest = min(seen, key=lambda each: each.free_bytes)
    free = f"{_size(tightest.free_bytes)} are free on {tightest.host}"
    for deployment in experiment.deployments + experiment.scaling:
        layout = deployment.layout
        need = largest_rank_memory(experiment.model, layout, experiment.workload, tightest.itemsize)
        num_sharing = 1 if tightest.on_gpu else min(layout.world_size, tightest.ranks_per_node)
        if need.total_bytes * num_sharing > tightest.free_bytes:
            in_all = (
                f", {_size(need.total_bytes * num_sharing)} for the {num_sharing} ranks of a node"
            )
            raise CapacityError(
                f"deployment {deployment.name!r} needs {_size(need.total_bytes)} a rank (weights "
                f"{_size(need.weight_bytes)}, key/value cache {_size(need.kv_bytes)}, activations "
                f"{_size(need.activation_bytes)}){in_all if num_sharing > 1 else ''}, but {free}; "
                "use a smaller model, fewer or shorter sequences"
            )


def _size(num_bytes: int) -> str:
    unit, name = (10**12, "TB") if num_bytes >= 10**12 else (10**9, "GB")
    return f"{num_bytes / unit:.3g} {name}"


def measure_peak(pool: RankPool, seen: Sequence["RankMachine"]) -> MachinePeak:
    """Measure at once on as many ranks as have a core or a device of their own."""
    measuring = [
        rank
        for rank, each in enumerate(seen)
        if each.on_gpu or rank % each.ranks_per_node < each.num_cores
    ]
    rates: list[RankRates] = pool.call(_MEASURE_RATES, ranks=measuring)
    on_gpu = seen[0].on_gpu
    return MachinePeak(
        gemm_flops_per_s=sum(each.gemm_flops_per_s for each in rates),
        read_bytes_per_s=sum(each.read_bytes_per_s for each in rates),
        num_units=len(rates) if on_gpu else sum(each.num_threads for each in rates),
        unit="GPU" if on_gpu else "core",
        dtype=seen[0].dtype,
    )


def _run(
    experiment: Experiment,
    deployment: Deployment,
    pool: RankPool,
    peak: MachinePeak,
    ranks_per_node: int,
    progress: Progress,
) -> DeploymentResult:
    model, workload = experiment.model, experiment.workload
    prompts = workload.prompt_token_ids(model.vocab_size)
    progress.task(deployment.name, 1 + workload.output_len)
    runner = ModelRunner(
        pool, model, deployment, workload, seed=experiment.seed, ranks_per_node=ranks_per_node
    )
    warm_up = replace(workload, output_len=min(2, workload.output_len))
    scheduler = FixedScheduler(warm_up, deployment, prompts, record=False)
    _exhaust(drive(scheduler, runner))
    if scheduler.start_decode():
        _exhaust(drive(scheduler, runner))
    progress.advance()
    scheduler = FixedScheduler(workload, deployment, prompts)
    prefill = list(_step_records(drive(scheduler, runner)))
    progress.advance()
    decode: list[StepRecord] = []
    if scheduler.start_decode():
        num_in_round = 0
        for record in _step_records(drive(scheduler, runner)):
            decode.append(record)
            num_in_round += len(record.seq_ids)
            if num_in_round >= workload.num_sequences:
                num_in_round = 0
                progress.advance()
    progress.done()
    tokens = np.array([scheduler.outputs[seq] for seq in range(workload.num_sequences)])
    return deployment_result(
        deployment,
        model,
        workload,
        summarise(deployment.layout, prefill, decode, peak),
        runner.held,
        tokens,
        is_baseline=deployment.is_baseline,
    )


def _exhaust(steps: Iterable[FinishedStep]) -> None:
    for _ in steps:
        pass


def _step_records(steps: Iterable[FinishedStep]) -> Iterator[StepRecord]:
    for plan, outcome in steps:
        batches = [batch for micro_batch in plan.micro_batches for batch in micro_batch]
        yield StepRecord(
            phase=plan.phase,
            replica=plan.replica,
            num_micro_batches=len(plan.micro_batches),
            seq_ids=tuple(int(seq) for batch in batches for seq in batch.seq_ids),
            num_tokens=sum(batch.num_tokens for batch in batches),
            submitted_s=outcome.submitted_s,
            finished_s=outcome.finished_s,
            records=outcome.records,
        )
