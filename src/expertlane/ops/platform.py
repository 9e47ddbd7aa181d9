"""Device, backend, dtype and kernels of a rank, chosen once and here only.

The CUDA branch is exercised by tests/gpu/test_cuda.py where there is a GPU.
"""

import contextlib
import ctypes
from dataclasses import dataclass

import torch

from expertlane.errors import UserError
from expertlane.ops.backend import arithmetic_for, backend, bookkeeping_for, demanded_backend
from expertlane.ops.host import num_cores

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 128 << 20  # at most, on top of a rank's heap
_LARGEST_KEPT_BYTES = 32 << 20  # glibc's own limit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Platform:
    """Where a rank computes and how it communicates.

    Attributes:
        kernels: what computes: `expertlane` for our own CPU kernels, else `torch`, with the reason
            where ours would have been better.
    """

    device: torch.device
    backend: str
    dtype: torch.dtype
    device_name: str
    kernels: str

    @property
    def dtype_name(self) -> str:
        """The dtype as a user writes it."""
        return str(self.dtype).removeprefix("torch.")


def choose_platform(local_rank: int, num_local_ranks: int, dtype_name: str | None) -> Platform:
    """One GPU a rank with NCCL and float16 where there are enough; else CPU, gloo and float32.

    Raises:
        UserError: float16 was asked for on a CPU, which has no fast float16 arithmetic; or the
            kernels that the user demands are not available.
    """
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= num_local_ranks
    if has_gpus and demanded_backend() != "cpu":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        return Platform(device, "nccl", DTYPES[dtype_name or "float16"], name, "torch")
    if dtype_name == "float16":
        raise UserError("dtype float16 needs a GPU for every rank; valid here: float32, bfloat16")
    _keep_freed_memory()
    # No more than OMP_NUM_THREADS either, which torch took at its import.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() // num_local_ranks)))
    device, dtype = torch.device("cpu"), DTYPES[dtype_name or "float32"]
    # Compile kernels if need be: a rank is only said to be up afterwards, so no step waits for it.
    return Platform(device, "gloo", dtype, "CPU", _kernels_of_cpu(dtype))


def _kernels_of_cpu(dtype: torch.dtype) -> str:
    has_bookkeeping = bookkeeping_for(torch.empty(0)) is not None
    if arithmetic_for(torch.empty(1, dtype=dtype)) is not None:
        return "expertlane"
    is_best = has_bookkeeping and dtype is not torch.bfloat16
    return "torch" if is_best else f"torch ({backend().why_not})"


def _keep_freed_memory() -> None:
    """Have glibc reuse the buffers of one step for the next, in place of fresh pages each time.

    Other C libraries have no `mallopt`, or ignore it.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
