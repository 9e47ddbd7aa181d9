"""Run an experiment's deployments in turn on the same ranks, and collect what was measured."""

import platform
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from expertlane import __version__
from expertlane.engine.local_ranks import num_cores
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.errors import CapacityError
from expertlane.experiment.collect import build_results, deployment_result
from expertlane.experiment.progress import Progress
from expertlane.metrics import summarise
from expertlane.plan.memory import largest_rank_memory, rank_memory
from expertlane.results import DeploymentResult, Machine, Results, Versions
from expertlane.schedule.drive import FinishedStep, drive
from expertlane.schedule.fixed import FixedScheduler
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.machine import MachinePeak
from expertlane.spec.record import StepRecord

if TYPE_CHECKING:
    from expertlane.experiment.machine import RankMachine

_DESCRIBE = "expertlane.experiment.machine:describe"
_MEASURE_RATES = "expertlane.experiment.machine:measure_rates"
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def run_comparison(
    experiment: Experiment, pool: RankPool, progress: Progress, *, command: str
) -> Results:
    """Measure every deployment of the experiment on the ranks of `pool`.

    Args:
        command: how a user repeats it; kept in the results.

    Raises:
        CapacityError: a deployment needs more memory than there is; nothing was allocated.
        RankError: a rank died, hung or failed.
    """
    seen: RankMachine = pool.call(_DESCRIBE, ranks=[0])[0]
    itemsize = _ITEMSIZE[seen.dtype]
    check_memory(experiment, seen, itemsize)
    progress.task("measuring this machine's peak", 1)
    peak = measure_peak(pool, seen)
    progress.advance()
    progress.done()
    deployments = [
        _run(experiment, deployment, pool, peak, itemsize, progress)
        for deployment in experiment.deployments
    ]
    scaling = [
        _run(experiment, deployment, pool, peak, itemsize, progress)
        for deployment in experiment.scaling
    ]
    machine = Machine(
        cpu_name=seen.cpu_name,
        device=seen.device,
        num_cores=num_cores(),
        memory_bytes=seen.memory_bytes,
        num_ranks=experiment.num_ranks,
        ranks_per_node=experiment.cluster.ranks_per_node or seen.ranks_per_node,
        backend=seen.backend,
        dtype=seen.dtype,
        peak=peak,
    )
    return build_results(
        experiment,
        command=command,
        machine=machine,
        versions=Versions(__version__, platform.python_version(), seen.torch_version),
        deployments=deployments,
        scaling=scaling,
    )


def check_memory(experiment: Experiment, seen: "RankMachine", itemsize: int) -> None:
    """Compare what every deployment needs with what is free.

    Raises:
        CapacityError: the first deployment that does not fit, with both numbers.
    """
    on_gpu = seen.device != "cpu"
    for deployment in experiment.deployments + experiment.scaling:
        need = largest_rank_memory(
            experiment.model, deployment.layout, experiment.workload, itemsize
        )
        num_sharing = 1 if on_gpu else min(deployment.layout.world_size, seen.ranks_per_node)
        if need.total_bytes * num_sharing > seen.free_bytes:
            sharing = "" if num_sharing == 1 else f" for each of {num_sharing} ranks here"
            raise CapacityError(
                f"deployment {deployment.name!r} needs {_size(need.total_bytes)} a rank (weights "
                f"{_size(need.weight_bytes)}, key/value cache {_size(need.kv_bytes)}, activations "
                f"{_size(need.activation_bytes)}){sharing}, but {_size(seen.free_bytes)} are free "
                "in all; use a smaller model, fewer or shorter sequences"
            )


def _size(num_bytes: int) -> str:
    unit, name = (10**12, "TB") if num_bytes >= 10**12 else (10**9, "GB")
    return f"{num_bytes / unit:.3g} {name}"


def measure_peak(pool: RankPool, seen: "RankMachine") -> MachinePeak:
    """Measure at once on as many ranks as have a core or a device of their own."""
    on_gpu = seen.device != "cpu"
    num_measuring = pool.num_ranks if on_gpu else min(pool.num_ranks, num_cores())
    rates = pool.call(_MEASURE_RATES, ranks=range(num_measuring))
    return MachinePeak(
        gemm_flops_per_s=sum(flops_per_s for flops_per_s, _ in rates),
        read_bytes_per_s=sum(bytes_per_s for _, bytes_per_s in rates),
        num_cores=num_measuring,
        dtype=seen.dtype,
    )


def _run(
    experiment: Experiment,
    deployment: Deployment,
    pool: RankPool,
    peak: MachinePeak,
    itemsize: int,
    progress: Progress,
) -> DeploymentResult:
    model, workload, layout = experiment.model, experiment.workload, deployment.layout
    prompts = workload.prompt_token_ids(model.vocab_size)
    progress.task(deployment.name, 1 + workload.output_len)
    runner = ModelRunner(
        pool,
        model,
        deployment,
        workload,
        seed=experiment.seed,
        ranks_per_node=experiment.cluster.ranks_per_node,
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
        summarise(layout, prefill, decode, peak),
        [rank_memory(model, layout, workload, r, itemsize) for r in range(layout.world_size)],
        tokens,
        is_baseline=deployment.is_baseline or deployment is experiment.deployments[0],
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
