"""The hardware of results, measured or modelled: machine, cluster, links between ranks."""

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from expertlane.spec.ranges import Counted, Strict


@dataclass(frozen=True)
class MachinePeak(Strict):
    """Measured peak rates of the whole machine, all its cores or devices together.

    Attributes:
        gemm_flops_per_s: rate of a large matrix product in `dtype`.
        read_bytes_per_s: rate of reading memory too large for any cache.
        num_units, unit: cores or GPUs that the measurement used: number and kind.
        dtype: number type of the matrix product, for example `float32`.
    """

    gemm_flops_per_s: float
    read_bytes_per_s: float
    num_units: int
    unit: str
    dtype: str


@dataclass(frozen=True)
class Machine(Strict):
    """The machine of a run.

    Attributes:
        device: `cpu`, or the name of the accelerator.
        num_cores: cores the ranks may use, of all hosts.
        num_idle_gpus: GPUs that were not used, because there are fewer than ranks.
        memory_bytes: memory of the machine.
        num_ranks: ranks of the largest deployment.
        ranks_per_node: consecutive ranks whose traffic counts as inside a node.
        backend: transport of the collectives, for example `shared_memory`.
        dtype: number type of weights and activations.
        kernels: what computes: `expertlane (avx2)` for our own CPU kernels with that instruction
            set, else `torch`, with the reason where ours would have been better.
        peak: None where no utilisation is given.
    """

    cpu_name: str
    device: str
    num_cores: Counted
    num_idle_gpus: int
    memory_bytes: int
    num_ranks: int
    ranks_per_node: Counted
    backend: str
    dtype: str
    kernels: str
    peak: MachinePeak | None = None

    @property
    def ranks_per_core(self) -> float:
        """Ranks over cores; above 1, ranks take turns."""
        return self.num_ranks / self.num_cores

    def is_oversubscribed_by(self, num_ranks: int) -> bool:
        """True if `num_ranks` ranks share cores that each of them needs to compute."""
        return self.device == "cpu" and num_ranks > self.num_cores

    @property
    def is_oversubscribed(self) -> bool:
        """True if the largest deployment's ranks share cores."""
        return self.is_oversubscribed_by(self.num_ranks)


def cpu_name() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine


_GPUS = Path("/proc/driver/nvidia/gpus")
_EACH_ENGINE = "each engine's own"


def gpu_names() -> list[str]:
    """The NVIDIA GPUs of this machine that its processes see, as the driver names them."""
    if not _GPUS.is_dir():
        return []
    names = []
    for each in sorted(_GPUS.iterdir()):
        found = re.search(r"^Model:\s*(.+)$", (each / "information").read_text(), re.MULTILINE)
        names.append(found[1].strip() if found else "GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([*filter(None, visible.split(","))])]


def own_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parted_cores(sizes: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """This machine's cores for servers, and those for their client alone.

    Servers keep three quarters at least, in a number that their ranks share evenly. If there are
    too few for that, servers have all cores, and the client none of its own.

    Args:
        sizes: ranks of each server, if they compute on cores.
    """
    cores = tuple(own_cores())
    even = lcm(*sizes)
    num_left = (len(cores) - 1) // even * even
    if 4 * num_left < 3 * len(cores) or not hasattr(os, "sched_setaffinity"):
        return cores, ()
    return cores[:num_left], cores[num_left:]


def this_machine(num_ranks: int, dtype: str) -> Machine:
    """This machine, for servers of other engines on it; read without what engines need."""
    gpus = gpu_names()
    return Machine(
        cpu_name=cpu_name(),
        device=gpus[0] if gpus else "cpu",
        num_cores=len(own_cores()),
        num_idle_gpus=max(0, len(gpus) - num_ranks),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        backend=f"{_EACH_ENGINE} transport",
        dtype=dtype,
        kernels=_EACH_ENGINE,
    )


@dataclass(frozen=True)
class LinkSpeed(Strict):
    """Decode throughput of an experiment's deployments on links of one speed.

    Attributes:
        scale: factor of the time that the profile gives for transfers; 0: they take no time.
        tps: tokens/s of each deployment that decodes, in the experiment's order.
    """

    scale: float
    tps: tuple[float, ...]


@dataclass(frozen=True)
class VirtualTime(Strict):
    """Assumptions of virtual time about links.

    Attributes:
        links: name of the profile of the links; None where transfers take no time.
        scale: factor of the time that the profile gives for transfers.
        byte_scale: factor of the bytes sent, before the profile is applied.
        speeds: decode throughput by the speed of the links.
    """

    links: str | None
    scale: float
    byte_scale: float
    speeds: tuple[LinkSpeed, ...]


@dataclass(frozen=True)
class Validation(Strict):
    """Error of projections of a kind, as judged against measurements.

    Attributes:
        what: the projected and measured kind, in words.
        median_error: median size of the difference, as a share of what was measured.
    """

    what: str
    num_rows: int
    median_error: float


def below_above(ratios: tuple[float, float]) -> str:
    """A range about 1 in words: `−18%/+20%`, `−58%/2.4×`."""
    low, high = ratios
    above = f"+{high - 1:.0%}" if high < 2 else f"{high:.{1 if high < 9.95 else 0}f}×"
    return f"−{1 - low:.0%}/{above}"


@dataclass(frozen=True)
class KnownError(Strict):
    """Measured over projected in the nearest measured kind: the 5th and 95th percentile.

    Attributes:
        what, num_rows: the measured kind in words, and the number of its rows.
        tpot, output, ttft: ratios of TPOT, of output throughput and of TTFT; low ≤ 1 ≤ high.
        is_own_kind: whether model, card, types, framework, pools and drafts are those of the
            projection.
    """

    what: str
    num_rows: int
    tpot: tuple[float, float]
    output: tuple[float, float]
    ttft: tuple[float, float]
    is_own_kind: bool = False

    @property
    def has_two_pools(self) -> bool:
        """True if the nearest kind has pools for prefill and decode."""
        return "disaggregated" in self.what


@dataclass(frozen=True)
class Cluster(Strict):
    """The modelled cluster; figures are from one device's datasheet.

    Attributes:
        name: name that `--cluster` takes.
        flops_per_s: dense peak for the type of weights.
        framework: framework whose corrections were used; "" for none.
        judged: errors of projections of this kind; None if it was not judged.
        nearest: errors of the nearest measured kind, which bounds of throughput and latency are no
            narrower than; None where the profile was measured on the machine itself.
    """

    name: str
    device: str
    num_devices: int
    ranks_per_node: Counted
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    framework: str = ""
    judged: Validation | None = None
    nearest: KnownError | None = None
