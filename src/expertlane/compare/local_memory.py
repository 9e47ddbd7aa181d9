"""What is known of this machine's memory before any rank is started."""

import os

from expertlane.compare.run import deployment_limits
from expertlane.engine.commands import RankMachine
from expertlane.errors import CapacityError
from expertlane.ops import host
from expertlane.spec.experiment import Experiment

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


def memory_shortage(experiment: Experiment, dtype: str | None) -> str | None:
    """Why an experiment can't run on this machine's CPU, with both numbers.

    Args:
        dtype: of weights and activations; None for a CPU's own choice.

    Returns:
        None where it fits, and where ranks may run elsewhere: on GPUs or on those of torchrun.
    """
    if "WORLD_SIZE" in os.environ or any(map(os.path.exists, _ACCELERATORS)):
        return None
    free_bytes, memory_bytes = host.memory_bytes()
    rank = RankMachine(
        host="",
        num_cores=host.num_cores(),
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
    seen = [rank] * experiment.num_ranks
    try:
        for deployment in experiment.deployments + experiment.scaling:
            deployment_limits(experiment, deployment, seen)
    except CapacityError as error:
        return str(error)
    return None
