"""Our CPU kernels, with each instruction set that this CPU has, beside torch and their roof.

Products x · Wᵀ of few to many rows and experts (16, top-2, one layer), in bfloat16 and float32,
weights not in a cache. Variants take turns over copies of the weights; a time is the tenth
percentile of the calls, from Python. The roof of each is the time of reading the weights once (a
loop over as many bytes, in turn with the others) or of its operations at the set's peak
(multiply-adds in registers), whichever is longer. Needs a C++ compiler. Run it with nothing else on
the machine; ROWS narrows it down, for example to decoding:

    python benchmarks/bench_kernels.py [ROWS …]
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.ops import build as build_module
from expertlane.engine.ops.build import BASELINE, ONLY_IF_ASKED_FOR, SETS, InstructionSet, build
from expertlane.engine.ops.cpu import VectorBackend
from expertlane.engine.ops.host import num_cores
from expertlane.engine.ops.products import Activation, Expert, Experts, OnednnLinear, PairGroups
from expertlane.engine.ops.torch_backend import TorchBackend

COPIES_BYTES = 120_000_000
MEASURE_S = 0.3
SHAPES = [(3072, 1024), (1024, 1024), (512, 512)]
EXPERT_SIZES = [1024, 512]
NUM_EXPERTS = 16
NUM_ROWS = [1, 4, 8, 32, 128, 1024]
READ_BYTES = 2**28

Row = dict[str, float | int | str]


class Roof:
    """What an instruction set can do at most on this machine."""

    def __init__(self, instructions: InstructionSet) -> None:
        self._library = build(
            replace(
                instructions,
                name=f"roofs-{instructions.name}",
                sources=(str(Path(__file__).with_name("kernel_roofs.cpp").resolve()),),
                flags=(*instructions.flags, f"-I{Path(build_module.__file__).parent}"),
            )
        )
        self._library.multiply.restype = ctypes.c_double
        self._library.multiply.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self._library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._room = torch.full((3,), 1e-3)
        self._values = torch.ones(READ_BYTES // 4)

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """The peak of multiply-adds, of pairs where the set has them."""
        best = 0.0
        for _ in range(3_000):  # short ones: some are not interrupted
            began = time.perf_counter()
            flops = (
                self._library.multiply(10_000, dtype is torch.bfloat16, self._room.data_ptr())
                * torch.get_num_threads()
            )
            best = max(best, flops / (time.perf_counter() - began))
        return best

    def read(self, num_bytes: int, copy: int) -> None:
        """As many bytes, from another place for each copy."""
        count = num_bytes // 4
        places = max(1, self._values.numel() // count)
        at = self._values.data_ptr() + copy % places * num_bytes
        self._library.read_all(at, min(count, self._values.numel()), self._room.data_ptr())


@dataclass
class Machine:
    """What computes: each set's kernels and roof, and torch."""

    kernels: dict[str, VectorBackend]
    peaks: dict[tuple[str, torch.dtype], float]
    read: Callable[[int, int], None]

    def backends(self, dtype: torch.dtype) -> dict[str, TorchBackend]:
        """By the name of each variant."""
        torch_name = (
            "oneDNN packed" if OnednnLinear.suits(torch.ones(2, 2, dtype=dtype)) else "torch"
        )
        return {**self.kernels, torch_name: TorchBackend()}

    def rows(
        self,
        what: str,
        dtype: torch.dtype,
        num_bytes: int,
        flops: int,
        variants: dict[str, Callable[[int], object]],
        num_copies: int,
    ) -> Iterator[Row]:
        """A row a variant of one case, and one of reading as many bytes."""
        found = seconds({**variants, "read": partial(self.read, num_bytes)}, num_copies)
        for name, taken_s in found.items():
            peak = self.peaks.get((name, dtype))
            roof_s = max(found["read"], flops / peak) if peak else None
            yield {
                "what": what,
                "dtype": str(dtype).removeprefix("torch."),
                "variant": name,
                "s": taken_s,
                "bytes_per_s": num_bytes / taken_s,
                "flops_per_s": 0 if name == "read" else flops / taken_s,
                **({"share_of_roof": roof_s / taken_s} if roof_s else {}),
            }


def seconds(variants: dict[str, Callable[[int], object]], num_copies: int) -> dict[str, float]:
    """The tenth percentile of each variant's calls; `variant(copy)` is called copy by copy."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    until = time.perf_counter() + MEASURE_S * len(variants)
    while time.perf_counter() < until:
        for name, variant in variants.items():
            for copy in range(num_copies):
                began = time.perf_counter()
                variant(copy)
                times[name].append(time.perf_counter() - began)
    return {name: sorted(of)[len(of) // 10] for name, of in times.items()}


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)


def on_copy(copies: list[Any], x: torch.Tensor, *other: Any) -> Callable[[int], object]:
    return lambda copy: copies[copy](x, *other)


def products(machine: Machine, dtype: torch.dtype, num_rows: list[int]) -> Iterator[Row]:
    for n, k in SHAPES:
        num_bytes = dtype.itemsize * n * k
        plain = [random(dtype, n, k) for _ in range(max(2, COPIES_BYTES // num_bytes))]
        kept = {
            name: [ops.linear(weight) for weight in plain]
            for name, ops in machine.backends(dtype).items()
        }
        for m in num_rows:
            x = random(dtype, m, k)
            variants = {name: on_copy(copies, x) for name, copies in kept.items()}
            variants["F.linear"] = on_copy([partial(F.linear, weight=w) for w in plain], x)
            yield from machine.rows(
                f"{n} × {k}, {m} rows", dtype, num_bytes, 2 * m * n * k, variants, len(plain)
            )


def experts(machine: Machine, dtype: torch.dtype, num_rows: list[int]) -> Iterator[Row]:
    for size in EXPERT_SIZES:
        num_weights = 3 * size * size
        layers = range(max(2, COPIES_BYTES // (dtype.itemsize * NUM_EXPERTS * num_weights)))
        plain = [
            [[random(dtype, size, size) for _ in range(3)] for _ in range(NUM_EXPERTS)]
            for _ in layers
        ]

        def made(ops: TorchBackend, layer: list[list[torch.Tensor]]) -> Experts:
            held = [Expert(*(ops.linear(weight) for weight in weights)) for weights in layer]
            return ops.experts(held, Activation("silu"))

        kept = {
            name: [made(ops, layer) for layer in plain]
            for name, ops in machine.backends(dtype).items()
        }
        for num_tokens in num_rows:
            ids = torch.randint(0, NUM_EXPERTS, (2 * num_tokens,))
            counts, at = torch.bincount(ids, minlength=NUM_EXPERTS), torch.arange(2 * num_tokens)
            pairs = PairGroups(counts, at, at, at[:, None])
            x = random(dtype, 2 * num_tokens, size)
            variants = {name: on_copy(copies, x, pairs) for name, copies in kept.items()}
            num_bytes = dtype.itemsize * num_weights * int((counts > 0).sum())
            yield from machine.rows(
                f"experts {size} × {size}, {num_tokens} tokens",
                *(dtype, num_bytes, 4 * num_tokens * num_weights, variants, len(layers)),
            )


def this_machine() -> Machine:
    baseline = build(BASELINE)
    here = [
        each
        for each in SETS
        if each not in ONLY_IF_ASKED_FOR and baseline.has_instructions(each.name.encode())
    ]
    if not here:
        sys.exit("this CPU has no instruction set that our kernels use")
    roofs = {each.name: Roof(each) for each in here}
    return Machine(
        {each.name: VectorBackend(baseline, build(each), each.name) for each in here},
        {
            (name, dtype): roof.flops_per_s(dtype)
            for name, roof in roofs.items()
            for dtype in (torch.float32, torch.bfloat16)
        },
        roofs[here[-1].name].read,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", type=int, default=NUM_ROWS, metavar="ROWS")
    num_rows = parser.parse_args().rows
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    machine = this_machine()
    with torch.inference_mode():
        found = [
            row
            for dtype in (torch.bfloat16, torch.float32)
            for part in (products, experts)
            for row in part(machine, dtype, num_rows)
        ]
    table = Table("what", "dtype", "variant", "ms", "GB/s", "GFLOP/s", "of the roof")
    for row in found:
        table.add_row(
            *(str(row["what"]), str(row["dtype"]), str(row["variant"])),
            f"{1e3 * float(row['s']):.3f}",
            f"{float(row['bytes_per_s']) / 1e9:.1f}",
            f"{float(row['flops_per_s']) / 1e9:.0f}" if row["flops_per_s"] else "",
            f"{float(row['share_of_roof']):.0%}" if "share_of_roof" in row else "",
            end_section=row["variant"] == "read",
        )
    console = Console()
    for (name, dtype), peak in machine.peaks.items():
        console.print(f"{name}: peak {peak / 1e9:.0f} GFLOP/s in {dtype}")
    console.print(table)
    peaks = {
        f"{name} {str(dtype).removeprefix('torch.')}": peak
        for (name, dtype), peak in machine.peaks.items()
    }
    line = {
        "benchmark": "kernels",
        "version": __version__,
        "num_cores": num_cores(),
        "peak_flops_per_s": peaks,
        "rows": found,
    }
    console.out(json.dumps(line), highlight=False)


if __name__ == "__main__":
    main()
