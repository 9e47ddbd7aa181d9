"""Description of a rank's machine, and measurement of its peak rates."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import memory_of
from expertlane.engine.ranks.commands import DescribeMachine, MeasureRates, RankMachine, RankRates
from expertlane.engine.stage.context import RankContext
from expertlane.results.hardware import cpu_name

_GEMM_SIZE = 1024
_GPU_GEMM_SIZE = 8192
_READ_BYTES = 128 * 2**20  # larger than a core's share of any cache
_GPU_READ_BYTES = 2**31
_MEASURE_S = 0.6


def describe_machine(context: RankContext, _: DescribeMachine) -> RankMachine:
    """Describe the rank's device, its memory and its software."""
    chosen = context.platform
    free_bytes, memory_bytes = memory_of(chosen.device).free_and_total()
    ops = backend_for(chosen.device)
    return RankMachine(
        host=socket.gethostname(),
        num_cores=context.cores.share.num_cores,
        cpus=list(context.cores.share.cpus) if context.cores.is_pinned else [],
        cpu_name=cpu_name(),
        device="cpu" if chosen.device.type == "cpu" else chosen.device_name,
        backend=chosen.transport,
        dtype=chosen.dtype_name,
        kernels=chosen.kernels,
        torch_version=str(torch.__version__),  # its own class would bring torch along
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        ranks_per_node=context.settings.num_local_ranks,
        num_idle_gpus=chosen.num_idle_gpus,
        keeps_narrow=ops.keeps_narrow,
        keeps_mxfp4=ops.keeps_mxfp4,
        reads_float8=ops.reads_float8,
        multiplies_float8=ops.multiplies_float8,
        ranks_on_device=chosen.ranks_on_device,
        driver=_driver() if chosen.device.type == "cuda" else "",
    )


def _driver() -> str:
    """The version of NVIDIA's driver; empty where it cannot be read."""
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        if found := re.search(r"\d+\.\d+(\.\d+)?", first):
            return found[0]
    return ""


def measure_rates(context: RankContext, _: MeasureRates) -> RankRates:
    """Measure the rates of a large matrix product and of reading memory.

    They are those of the fastest repetition: a peak, not an average. Reading is timed as a float32
    matrix-vector product, which is bound by memory.
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


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all work queued so far; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_s(context: RankContext, work: Callable[[], object]) -> float:
    """The least seconds of a repetition.

    For a single CPU thread CPU time is taken, to which other programs add little.
    """
    is_alone = context.platform.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if is_alone else time.perf_counter
    best, until = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < until or best == float("inf"):
        began = clock()
        work()
        synchronize(context.platform.device)
        best = min(best, clock() - began)
        context.progress.touch()
    return best
