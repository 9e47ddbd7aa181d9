"""What the machine at hand has and can do; measured on its ranks."""

import os
import platform
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from expertlane.engine import host
from expertlane.engine.worker import RankContext

_GEMM_SIZE = 1024
_GPU_GEMM_SIZE = 8192
_READ_BYTES = 128 * 2**20  # larger than a core's share of any cache
_GPU_READ_BYTES = 2**31
_MEASURE_S = 0.6


@dataclass(frozen=True)
class RankMachine:
    """What a rank sees of its machine.

    Attributes:
        itemsize: bytes of a value of `dtype`.
        free_bytes: memory of its device that can still be allocated.
        num_idle_gpus: GPUs of its host that are not used, because there are fewer than ranks.
    """

    host: str
    num_cores: int
    cpu_name: str
    device: str
    backend: str
    dtype: str
    itemsize: int
    torch_version: str
    memory_bytes: int
    free_bytes: int
    ranks_per_node: int
    num_idle_gpus: int

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device != "cpu"


def describe(context: RankContext) -> RankMachine:
    """Run on a rank: what is there."""
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
        itemsize=chosen.dtype.itemsize,
        torch_version=torch.__version__,
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


@dataclass(frozen=True)
class RankRates:
    """What a rank can do at best, with its threads."""

    gemm_flops_per_s: float
    read_bytes_per_s: float
    num_threads: int


def measure_rates(context: RankContext) -> RankRates:
    """Run on a rank: the rates of a large matrix product and of reading memory.

    The best of the repetitions that fit into the time: a peak, not an average. Reading is timed
    as a float32 matrix-vector product, which no arithmetic holds up.
    """
    on_gpu = context.platform.device.type == "cuda"
    device, dtype = context.platform.device, context.platform.dtype
    size = _GPU_GEMM_SIZE if on_gpu else _GEMM_SIZE
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    gemm_s = _best_s(context, lambda: torch.mm(left, right))
    num_bytes = _GPU_READ_BYTES if on_gpu else _READ_BYTES
    matrix = torch.zeros(num_bytes // (4096 * 4), 4096, device=device)
    vector = torch.ones(4096, device=device)
    read_s = _best_s(context, lambda: torch.mv(matrix, vector))
    return RankRates(2 * size**3 / gemm_s, num_bytes / read_s, torch.get_num_threads())


def _best_s(context: RankContext, work: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if context.platform.device.type == "cuda" else None
    best, until = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < until or best == float("inf"):
        began = time.perf_counter()
        work()
        if synchronize:
            synchronize()
        best = min(best, time.perf_counter() - began)
        context.progress.touch()
    return best
