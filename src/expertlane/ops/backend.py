"""What computes on a CPU: our own kernels where they are available, or torch. Chosen once, here.

`EXPERTLANE_BACKEND` is `cpu` for our kernels or `torch`; unset, ours if available.
`EXPERTLANE_INSTRUCTIONS` lists the instruction sets that may be used; unset, all of them.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from expertlane.errors import UserError
from expertlane.ops.build import AVX512_BF16, BASELINE, BuildError, build
from expertlane.ops.cpu import CpuKernels
from expertlane.ops.dispatch import DispatchKernels

_SETS = (BASELINE.name, AVX512_BF16.name)


@dataclass(frozen=True)
class Backend:
    """Our kernels; None where they are not wanted or not available.

    Attributes:
        bookkeeping: kernels for the bookkeeping of dispatch; for any CPU.
        arithmetic: kernels for arithmetic in bfloat16.
        why_not: why one of them is None, in a line; empty where neither is.
        is_demanded: whether the user demands our kernels, so that torch must not replace them.
    """

    bookkeeping: DispatchKernels | None
    arithmetic: CpuKernels | None
    why_not: str = ""
    is_demanded: bool = False

    def refuse_substitute(self) -> None:
        """Refuse to let torch replace kernels that are missing.

        Raises:
            UserError: the user demands them.
        """
        if self.is_demanded:
            raise UserError(
                f"EXPERTLANE_BACKEND=cpu, but our kernels are not available: {self.why_not}"
            )


def bookkeeping_for(ids: Tensor) -> DispatchKernels | None:
    """The kernels for ids like these; None where tensor operations are to be used.

    Raises:
        UserError: as `backend`; or the kernels are missing, but the user demands them.
    """
    if ids.device.type != "cpu":
        return None
    chosen = backend()
    if chosen.bookkeeping is None:
        chosen.refuse_substitute()
    return chosen.bookkeeping


def arithmetic_for(tensor: Tensor) -> CpuKernels | None:
    """The kernels for tensors like this one; None where torch's own operations are to be used.

    Raises:
        UserError: as `backend`; or the kernels are missing, but the user demands them.
    """
    is_ours = tensor.device.type == "cpu" and tensor.dtype is torch.bfloat16 and tensor.numel() > 0
    if not is_ours:
        return None
    chosen = backend()
    if chosen.arithmetic is None:
        chosen.refuse_substitute()
    return chosen.arithmetic


@cache
def backend() -> Backend:
    """The kernels of this process; compiled if need be.

    Raises:
        UserError: one of the two variables has a value that is not valid.
    """
    wanted = demanded_backend()
    allowed = _allowed_sets()
    if wanted == "torch":
        return Backend(None, None, "EXPERTLANE_BACKEND=torch")
    is_demanded = wanted == "cpu"
    try:
        library = build(BASELINE)
    except BuildError as error:
        return Backend(None, None, str(error), is_demanded)
    bookkeeping = DispatchKernels(library)
    try:
        if AVX512_BF16.name not in allowed:
            raise BuildError(f"EXPERTLANE_INSTRUCTIONS leaves {AVX512_BF16.name} out")
        if not library.has_avx512_bf16():
            raise BuildError(f"this CPU lacks {AVX512_BF16.name}, which bfloat16 needs")
        return Backend(bookkeeping, CpuKernels(build(AVX512_BF16)), is_demanded=is_demanded)
    except BuildError as error:
        return Backend(bookkeeping, None, str(error), is_demanded)


def demanded_backend() -> str | None:
    """The value of EXPERTLANE_BACKEND, `cpu` or `torch`; None where it is unset.

    Raises:
        UserError: it has another value.
    """
    value = os.environ.get("EXPERTLANE_BACKEND") or None
    if value not in (None, "cpu", "torch"):
        raise UserError(f"EXPERTLANE_BACKEND is {value!r}; valid: cpu, torch")
    return value


def _allowed_sets() -> frozenset[str]:
    value = os.environ.get("EXPERTLANE_INSTRUCTIONS") or ",".join(_SETS)
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in _SETS:
            raise UserError(f"EXPERTLANE_INSTRUCTIONS names {name!r}; valid: {', '.join(_SETS)}")
    return frozenset(names)
