"""What a rank sees of the machine it runs on."""

import os
import platform
import socket
from pathlib import Path

import torch

from expertlane.engine.commands import DescribeMachine, RankMachine
from expertlane.engine.worker import RankContext
from expertlane.ops import host


def describe(context: RankContext, _: DescribeMachine) -> RankMachine:
    """What is there."""
    chosen = context.platform
    if chosen.device.type == "cuda":
        free_bytes, memory_bytes = torch.cuda.mem_get_info(chosen.device)
    else:
        free_bytes, memory_bytes = host.memory_bytes()
    return RankMachine(
        host=socket.gethostname(),
        num_cores=host.num_cores(),
        cpu_name=_cpu_name(),
        device="cpu" if chosen.device.type == "cpu" else chosen.device_name,
        backend=chosen.backend,
        dtype=chosen.dtype_name,
        kernels=chosen.kernels,
        torch_version=str(torch.__version__),  # its own class would bring torch along
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        ranks_per_node=context.settings.num_local_ranks,
        num_idle_gpus=torch.cuda.device_count() if chosen.device.type == "cpu" else 0,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine
