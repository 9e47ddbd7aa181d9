"""Device, dtype, transport and compute backend of a rank: chosen once, and here only.

`EXPERTLANE_BACKEND` is `cpu` for our own kernels on the CPU, `cuda` for those on GPUs, or `torch`;
unset, ours if available.
`EXPERTLANE_CPU_ISA` is the largest instruction set that may be used; unset, the CPU's best.
`EXPERTLANE_TRANSPORT` is `shared_memory` or `gloo`, through the memory of hosts. Set, ranks may
share GPUs, where there are any. Unset, each needs a GPU of its own, and they talk by nccl; else
they compute on CPUs, and share memory where a node's ranks can and our C++ is available, whatever
computes; otherwise, and between nodes, it is gloo.
"""

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch

from expertlane.engine.ops.build import (
    BASELINE,
    ONLY_IF_ASKED_FOR,
    SETS,
    BuildError,
    InstructionSet,
    build,
)
from expertlane.engine.ops.cpu import CpuBackend, VectorBackend
from expertlane.engine.ops.host import asked_backend, asked_set, asked_transport
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHARED_MEMORY = "shared_memory"  # begins the name of that transport
STAGED = ", staged on the host"  # ends it
_TORCH = TorchBackend()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 128 << 20  # at most, on top of a rank's heap
_LARGEST_KEPT_BYTES = 32 << 20  # glibc's own limit


def backend_for(device: torch.device) -> TorchBackend:
    """The compute backend of a device; on a CPU, our kernels are compiled if need be.

    Raises:
        UserError: `EXPERTLANE_BACKEND` or `EXPERTLANE_CPU_ISA` is not valid, or asks for an
            instruction set that cannot be had.
    """
    if device.type == "cpu":
        return backend_of_cpu()[0]
    return backend_of_cuda(device)[0] if device.type == "cuda" else _TORCH


@cache
def backend_of_cuda(device: torch.device) -> tuple[TorchBackend, str]:
    """The backend with our Triton kernels, if they run and agree with torch; else torch's.

    With it the reason why it is torch's, in a line; empty where it is ours.
    """
    if asked_backend() == "torch":
        return _TORCH, "EXPERTLANE_BACKEND=torch"
    if find_spec("triton") is None:
        return _TORCH, "Triton is not installed"
    # A CPU does without Triton.
    from expertlane.engine.ops.cuda.backend import (
        CudaBackend,
        multiplies_float8,
        multiplies_narrow,
        reads_float8,
        why_not,
    )

    if reason := why_not(device):
        return _TORCH, reason
    backend = CudaBackend(
        keeps_narrow=multiplies_narrow(device),
        reads_float8=reads_float8(device),
        multiplies_float8=multiplies_float8(device),
    )
    return backend, ""


@cache
def backend_of_cpu() -> tuple[TorchBackend, str]:
    """The best backend of this CPU, and a line that says why it lacks kernels; empty if none."""
    return _best_of_cpu(build)


def _best_of_cpu(build: Callable[[InstructionSet], ctypes.CDLL]) -> tuple[TorchBackend, str]:
    wanted, allowed = asked_backend(), _allowed_sets()
    if wanted == "torch":
        return _TORCH, "EXPERTLANE_BACKEND=torch"
    try:
        baseline = build(BASELINE)
    except BuildError as error:
        if allowed and asked_set():
            raise _without(str(error)) from None
        return _TORCH, str(error)
    _check_asked(baseline)
    why_not = "this CPU lacks avx2 or neon, one of which bfloat16 needs"
    if SETS and not allowed:
        why_not = "the baseline, which was asked for, has no kernels for bfloat16"
    for instructions in reversed(allowed):
        if not baseline.has_instructions(instructions.name.encode()):
            continue
        try:
            return VectorBackend(baseline, build(instructions), instructions.name), ""
        except BuildError as error:  # perhaps the compiler is too old for it
            why_not = str(error)
            if instructions.name == asked_set():
                raise _without(why_not) from None
    return CpuBackend(baseline), why_not


@cache
def compiled_messages() -> tuple[ctypes.CDLL | None, str]:
    """The library of `shared_memory.cpp`, or None and a line that says why there is none."""
    backend, _ = backend_of_cpu()
    if isinstance(backend, CpuBackend):
        return backend.baseline, ""
    try:
        return build(BASELINE), ""
    except BuildError as error:
        return None, str(error)


def _transport_of_hosts(
    *, shares_memory: bool, several_nodes: bool, touch: Callable[[], None] | None
) -> str:
    value = asked_transport()
    if value == "shared_memory" and not shares_memory:
        raise UserError(
            "EXPERTLANE_TRANSPORT=shared_memory, but these ranks share no memory; valid here: gloo"
        )
    if value == "gloo" or not shares_memory:
        return "gloo"
    if touch is not None and asked_backend() == "torch":  # else it is compiled by now
        with contextlib.suppress(BuildError):
            build(BASELINE, touch)
    library, why_not = compiled_messages()
    if library is None and value == "shared_memory":
        raise UserError(
            f"EXPERTLANE_TRANSPORT=shared_memory, but its C++ is not available: {why_not}; "
            f"valid here: gloo"
        )
    if library is None:
        return "gloo"
    return f"{SHARED_MEMORY}, gloo between nodes" if several_nodes else SHARED_MEMORY


def _allowed_sets() -> tuple[InstructionSet, ...]:
    """Instruction sets that may be used, smallest first, without the baseline."""
    value, names = asked_set(), [BASELINE.name, *(each.name for each in SETS)]
    if value is None:
        return tuple(each for each in SETS if each not in ONLY_IF_ASKED_FOR)
    if value not in names:
        raise UserError(
            f"--cpu-isa (or EXPERTLANE_CPU_ISA) is {value!r}; valid here: {', '.join(names)}"
        )
    return SETS[: names.index(value)]


def _without(reason: str) -> UserError:
    """The error for an instruction set that was asked for and cannot be had."""
    return UserError(f"--cpu-isa (or EXPERTLANE_CPU_ISA) asks for {asked_set()}, but {reason}")


def _check_asked(baseline: ctypes.CDLL) -> None:
    """Refuse a set that this CPU lacks: another set's speed would be taken for that set's."""
    names = [BASELINE.name, *(each.name for each in SETS)]
    has = [name for name in names[1:] if baseline.has_instructions(name.encode())]
    if asked_set() in {*names[1:]} - {*has}:
        raise UserError(
            f"this CPU lacks {asked_set()}, which --cpu-isa or EXPERTLANE_CPU_ISA asks for; it "
            f"has: {', '.join([BASELINE.name, *has])}"
        )


@dataclass(frozen=True)
class Platform:
    """Device, transport and kernels of a rank.

    Attributes:
        transport: begins with `shared_memory`, or with torch.distributed's name of the backend; its
            end says so where transfers between GPUs are staged on their hosts.
        kernels: whose kernels compute: on GPUs `torch and expertlane (triton 3.6.0)`; on CPUs
            `expertlane (avx2)` for our own with the instruction set in parentheses, or `torch and
            expertlane (avx2)` where torch computes products of many rows; else `torch`, with the
            reason where ours would have been better.
        ranks_on_device: ranks that share this rank's GPU.
        num_idle_gpus: GPUs of this node that are not used because there are fewer than ranks.
    """

    device: torch.device
    transport: str
    dtype: torch.dtype
    device_name: str
    kernels: str
    ranks_on_device: int = 1
    num_idle_gpus: int = 0

    @property
    def is_staged(self) -> bool:
        """Whether transfers between GPUs go through the memory of hosts."""
        return self.transport.endswith(STAGED)

    @property
    def dtype_name(self) -> str:
        """The dtype as a user writes it."""
        return str(self.dtype).removeprefix("torch.")


def choose_platform(
    local_rank: int,
    num_local_ranks: int,
    dtype_name: str | None,
    *,
    shares_memory: bool = False,
    several_nodes: bool = False,
    touch: Callable[[], None] | None = None,
) -> Platform:
    """Choose device, dtype, transport and kernels of a rank.

    By default GPUs with float16 and nccl if each rank has a GPU; else the CPU with float32.

    Args:
        shares_memory: whether the ranks of this node have inherited memory that they share.
        several_nodes: whether there are ranks on other nodes.
        touch: called every second while a compiler works.

    Raises:
        UserError: float16 was asked for on a CPU, which has no fast float16 arithmetic; or the
            kernels or the transport that the user demands are not available.
    """
    num_gpus = 0 if asked_backend() == "cpu" else _num_gpus()
    through_hosts = asked_transport() is not None
    on_gpu = num_gpus > 0 and (through_hosts or num_gpus >= num_local_ranks)
    if not on_gpu:
        _check_cpu(dtype_name, num_gpus)
    transport = "nccl"
    if through_hosts or not on_gpu:
        # Compile kernels if need be: a rank is only said to be up afterwards, so no step waits.
        if touch is not None:
            _best_of_cpu(partial(build, touch=touch))
        transport = _transport_of_hosts(
            shares_memory=shares_memory, several_nodes=several_nodes, touch=touch
        )
    if on_gpu:
        transport += STAGED if through_hosts else ""
        device = torch.device("cuda", local_rank % num_gpus)
        torch.cuda.set_device(device)
        name, dtype = torch.cuda.get_device_name(device), DTYPES[dtype_name or "float16"]
        sharing = max(1, len(range(local_rank % num_gpus, num_local_ranks, num_gpus)))
        return Platform(device, transport, dtype, name, _kernels_of_cuda(device), sharing)
    _keep_freed_memory()
    dtype = DTYPES[dtype_name or "float32"]
    kernels = _kernels_of_cpu(dtype)
    return Platform(torch.device("cpu"), transport, dtype, "CPU", kernels, num_idle_gpus=num_gpus)


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_cpu(dtype_name: str | None, num_gpus: int) -> None:
    """Refuse a CPU where Triton's kernels or float16 are asked for."""
    sharing = "; EXPERTLANE_TRANSPORT=shared_memory lets ranks share GPUs" if num_gpus else ""
    if asked_backend() == "cuda":
        raise UserError(
            f"EXPERTLANE_BACKEND=cuda needs a GPU for every rank; valid here: cpu, torch{sharing}"
        )
    if dtype_name == "float16":
        raise UserError(
            f"dtype float16 needs a GPU for every rank; valid here: float32, bfloat16{sharing}"
        )


def _kernels_of_cuda(device: torch.device) -> str:
    backend, why_not = backend_of_cuda(device)
    if not why_not:
        return f"torch and expertlane ({backend.instructions})"
    if asked_backend() == "cuda":
        raise UserError(f"EXPERTLANE_BACKEND=cuda, but our kernels are not available: {why_not}")
    return f"torch ({why_not})"


def _kernels_of_cpu(dtype: torch.dtype) -> str:
    backend, why_not = backend_of_cpu()
    if isinstance(backend, CpuBackend) and dtype is not torch.bfloat16:
        return f"torch and expertlane ({backend.instructions})"  # torch where rows are many
    if isinstance(backend, VectorBackend):
        return f"expertlane ({backend.instructions})"
    if asked_backend() == "cpu":
        raise UserError(f"EXPERTLANE_BACKEND=cpu, but our kernels are not available: {why_not}")
    return f"torch ({why_not})"


def _keep_freed_memory() -> None:
    """Have glibc reuse the buffers of one step for the next, in place of fresh pages each time.

    Other C libraries have no `mallopt`, or ignore it.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
