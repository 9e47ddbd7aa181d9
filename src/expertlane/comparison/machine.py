"""The machine: what it is, how fast at best, and whether its memory holds an experiment."""

import os
from collections.abc import Sequence
from pathlib import Path

from expertlane.balance.placement_file import check_experiment
from expertlane.cost.memory import workload_limits
from expertlane.engine.launch import describe_ranks, fit_to_machine
from expertlane.engine.ops import host
from expertlane.engine.ranks.commands import MeasureRates, RankMachine
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import CapacityError, UserError, naming
from expertlane.results.hardware import Machine, MachinePeak
from expertlane.schedule.request import Limits
from expertlane.spec.experiment import Experiment

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


def machine_record(
    seen: Sequence[RankMachine],
    num_ranks: int,
    ranks_per_node: int,
    peak: MachinePeak | None = None,
) -> Machine:
    """The machine that ranks run on.

    Args:
        seen: what each rank reports of its machine.
        num_ranks: ranks of the largest deployment.
        ranks_per_node: consecutive ranks that count as on one node.
    """
    hosts = {each.host: each for each in seen}.values()
    return Machine(
        cpu_name=seen[0].cpu_name,
        device=seen[0].device,
        num_cores=sum(each.num_cores for each in hosts),
        num_idle_gpus=sum(each.num_idle_gpus for each in hosts),
        memory_bytes=sum(seen[rank].memory_bytes for rank in _first_on_gpus(seen))
        if seen[0].on_gpu
        else sum(each.memory_bytes for each in hosts),
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        backend=seen[0].backend,
        dtype=seen[0].dtype,
        kernels=seen[0].kernels,
        peak=peak,
    )


def check_memory(experiment: Experiment, pool: RankPool) -> None:
    """Compare what every deployment needs with what is free, before anything is allocated.

    Raises:
        CapacityError: the first deployment that does not fit, with both numbers.
    """
    experiment_limits(experiment, describe_ranks(pool))


def experiment_limits(experiment: Experiment, seen: Sequence[RankMachine]) -> dict[str, Limits]:
    """The scheduler's sizes of each deployment, by its name.

    A cache holds the whole workload, or else what memory there is.

    Args:
        seen: [num_ranks].

    Raises:
        UserError: experts of a deployment cannot be placed or reached so, or ranks cannot have its
            options; the text begins with its name.
        CapacityError: not even one sequence fits, with both numbers.
    """
    model, limits = experiment.model, {}
    all_placements = check_experiment(experiment, seen[0].ranks_per_node)
    deployments = experiment.deployments + experiment.scaling
    for each, placements in zip(deployments, all_placements, strict=True):
        wanted = workload_limits(experiment.workload, model, each.layout)
        with naming(f"deployment {each.name!r}"):
            try:
                limits[each.name] = fit_to_machine(
                    *(model, each.layout, wanted, seen, 1.0, placements, each.options),
                    Path(experiment.checkpoint) if experiment.checkpoint else None,
                )
            except CapacityError as error:
                raise CapacityError(f"{error}; use a smaller model or shorter sequences") from None
    return limits


def measure_peak(pool: RankPool, seen: Sequence[RankMachine]) -> MachinePeak:
    """Measure at once on as many ranks as have a core or a device of their own."""
    measuring = _first_on_gpus(seen) or [
        rank for rank, each in enumerate(seen) if rank % each.ranks_per_node < each.num_cores
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


def _first_on_gpus(seen: Sequence[RankMachine]) -> list[int]:
    """One rank of each GPU; none on CPUs. The first ranks of a node have GPUs of their own."""
    found = []
    for node in {each.host for each in seen}:
        ranks = [rank for rank, each in enumerate(seen) if each.host == node and each.on_gpu]
        found += ranks[: round(sum(1 / seen[rank].ranks_on_device for rank in ranks))]
    return sorted(found)


def why_not_here(experiment: Experiment, dtype: str | None) -> str | None:
    """Why an experiment can't run on this machine's CPU, as far as is known before ranks start.

    Args:
        dtype: number type of weights and activations; None for a CPU's own choice.

    Returns:
        With both numbers where memory is short; None where nothing stands against it, and where
        ranks may run elsewhere: on GPUs, or started by torchrun.
    """
    if "WORLD_SIZE" in os.environ or any(map(os.path.exists, _ACCELERATORS)):
        return None
    free_bytes, memory_bytes = host.memory_bytes()
    rank = RankMachine(
        host="",
        num_cores=host.num_cores(),
        cpus=[],
        cpu_name="",
        device="cpu",
        backend="gloo",
        dtype=dtype or "float32",
        kernels="torch",
        torch_version="",
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        ranks_per_node=experiment.num_ranks,
        num_idle_gpus=0,
    )
    try:
        experiment_limits(experiment, [rank] * experiment.num_ranks)
    except UserError as error:
        return str(error)
    return None
