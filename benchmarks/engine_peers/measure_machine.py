"""What this machine can do at most: read bandwidth and GEMM peak, all cores.

Run: python measure_machine.py NUM_THREADS
Prints one JSON line. Each figure is the best of several ways and repetitions: a roof is a bound.
The peak is that of bfloat16 or of float32, whichever is higher: without instructions for bfloat16
a product of bfloat16 can be as fast as one of float32, since its values are widened exactly.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

READ_BYTES = 2**29  # far beyond the caches
NUM_REPEATS = 8
GEMM_SIZES = ((1024, 1024, 1024), (4096, 1024, 1024), (4096, 4096, 1024), (2048, 2048, 2048))


def best_seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(NUM_REPEATS):
        began_s = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began_s)
    return best


def read_bytes_per_s() -> float:
    values = torch.ones(READ_BYTES // 4)
    matrix = torch.ones(READ_BYTES // 2 // 1024, 1024, dtype=torch.bfloat16)
    vector = torch.ones(1024, dtype=torch.bfloat16)
    ways = [
        partial(torch.sum, values),
        partial(torch.max, values),
        partial(torch.mv, matrix, vector),
    ]
    return READ_BYTES / min(best_seconds(way) for way in ways)


def gemm_rate(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    left = torch.randn(rows, inner).to(dtype)
    weight = torch.randn(columns, inner).to(dtype)
    seconds = best_seconds(partial(torch.nn.functional.linear, left, weight))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except RuntimeError:  # no instructions for this type
        return 2 * rows * columns * inner / seconds
    linear = torch.ops.mkldnn._linear_pointwise
    packed_s = best_seconds(partial(linear, left, packed, None, "none", [], ""))
    return 2 * rows * columns * inner / min(seconds, packed_s)


def gemm_flops_per_s() -> dict[str, float]:
    """By type; a type far slower than float32 in the first size has no chance in others."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = [gemm_rate(*GEMM_SIZES[0], dtype)]
        if rates[0] > max(best.values(), default=0) / 2:
            rates += [gemm_rate(*size, dtype) for size in GEMM_SIZES[1:]]
        best[str(dtype).removeprefix("torch.")] = max(rates)
    return best


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    with torch.inference_mode():
        by_type = gemm_flops_per_s()
        rates = {
            "read_bytes_per_s": read_bytes_per_s(),
            "gemm_flops_per_s": max(by_type.values()),
        }
    print(json.dumps(rates | {f"{name}_flops_per_s": rate for name, rate in by_type.items()}))


if __name__ == "__main__":
    main()
