"""Compile the Triton kernels of engine/ops/cuda ahead of time, without a GPU: registers and spills.

Operations run at models' sizes on tensors that have shapes and no data (`cuda_cases.py`). Each
kernel that they would launch is compiled instead, with the very arguments of the launch, for the
cards asked for. Printed for each: registers a thread, bytes a thread that are spilled to memory,
bytes of shared memory, and the instruction of its matrix products. Exit code 1 where one spills
over its bound, takes more shared memory than the card has, or multiplies tiles of 64 rows and more
otherwise than by the card's instruction for groups of warps.

    PYTHONPATH=src python benchmarks/compile_cuda.py [--target 90 100] [--only TEXT …] [--json]
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from cuda_cases import CASES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

MOST_SPILLED_BYTES = 32  # a thread
# CUDA C++ programming guide, table of technical specifications: of a block, at most.
SHARED_BYTES = {90: 227 << 10, 100: 227 << 10}
# What names products of float8 with float8 in PTX, of Hopper and of Blackwell.
FLOAT8 = re.compile(r"e4m3\.e4m3|kind::f8f6f4")
# PTX's instructions of products: for groups of warps, by card, and for one warp.
OF_GROUPS = {90: "wgmma", 100: "tcgen05"}
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for a card."""

    case: str
    kernel: str
    target: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    rows: int  # of a tile of products of 16 bits and less; 0 for other kernels
    product: str  # of INSTRUCTIONS; empty where there is none
    is_float8: bool = False  # whether a product's two operands are

    @property
    def expected(self) -> str:
        """The instruction that its products need."""
        return OF_GROUPS[self.target] if self.rows >= 64 else "mma" if self.rows else ""

    @property
    def is_within(self) -> bool:
        """Whether it keeps the bounds."""
        fits = self.shared_bytes <= SHARED_BYTES[self.target]
        return (
            fits
            and self.spilled_bytes <= MOST_SPILLED_BYTES
            and self.product in (self.expected, OF_GROUPS[self.target] if self.rows else "")
        )


class CompilingDriver:
    """Stands for a card that is not there."""

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        """The card's architecture."""
        return self._target

    def get_current_device(self) -> int:
        """Kernels are kept by device."""
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


@contextmanager
def compiling(target: int, found: Callable[[Any, int], None]) -> Iterator[None]:
    """Launches compile for `target`; what was compiled goes to `found`, with `Compiled.rows`."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = [
            MockTensor(each.dtype, each.shape) if isinstance(each, Tensor) else each
            for each in args
        ]
        kernel = launch(self, *given, grid=grid, warmup=True, **kwargs)
        found(kernel, kwargs.get("ROWS", 0) if args[0].itemsize <= 2 else 0)
        return kernel

    driver.set_active(CompilingDriver(target))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread of stack, where spilled values are kept."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def check_shapes() -> None:
    """Run all cases, and compile nothing."""
    launch = JITFunction.run
    JITFunction.run = lambda *_, **__: None
    try:
        with FakeTensorMode():
            for case in CASES.values():
                case()
    finally:
        JITFunction.run = launch


def compile_case(name: str, target: int) -> list[Compiled]:
    """The kernels that a case launches, each once."""
    kernels: dict[str, tuple[Any, int]] = {}

    def keep(kernel: Any, rows: int) -> None:
        kernels[kernel.hash] = kernel, rows

    with compiling(target, keep), FakeTensorMode():
        CASES[name]()
    found = []
    for kernel, rows in kernels.values():
        meta, usage = kernel.metadata, resources(kernel.asm["cubin"])
        used = [name for name, text in INSTRUCTIONS.items() if text in kernel.asm["ptx"]]
        is_float8 = FLOAT8.search(kernel.asm["ptx"]) is not None
        of_kernel = meta.num_warps, *usage, meta.shared, rows, "+".join(used), is_float8
        found.append(Compiled(name, meta.name, target, *of_kernel))
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--target", type=int, nargs="+", default=[90, 100], choices=SHARED_BYTES)
    options.add_argument("--only", nargs="+", default=[""], help="cases whose names contain one")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    names = [name for name in CASES if any(text in name for text in given.only)]
    if not names:
        options.error(f"no case's name contains one of {given.only}; cases: {'; '.join(CASES)}")
    check_shapes()
    found = []
    if not given.json:
        print(f"triton {triton.__version__}, torch {torch.__version__}")
        print(f"bound: {MOST_SPILLED_BYTES} spilled bytes a thread")
        print(f"{'case':28} {'kernel':20} {'sm':>4} warps  regs  spilled  shared  products")
    for target in given.target:
        for name in names:
            for each in compile_case(name, target):
                found.append(each)
                if not given.json:
                    print(
                        f"{each.case:28} {each.kernel.strip('_'):20} {target:4} "
                        f"{each.num_warps:5} {each.registers:5} {each.spilled_bytes:8} "
                        f"{each.shared_bytes:7}  {each.product:8}"
                        f"{'' if each.is_within else 'not as it should be'}".rstrip(),
                        flush=True,
                    )
    if given.json:
        print(json.dumps([asdict(each) for each in found]))
    return int(not all(each.is_within for each in found))


if __name__ == "__main__":
    sys.exit(main())
