"""What this machine can do at most: read bandwidth and bfloat16 GEMM peak, all cores.

Run: python measure_machine.py NUM_THREADS
Prints one JSON line. Each figure is the best of several ways and repetitions: a roof is a bound.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

READ_BYTES = 2**29  # far beyond the caches
NUM_REPEATS = 8
GEMM_SIZES = ((4096, 1024, 1024), (4096, 4096, 1024), (2048, 2048, 2048), (4096, 4096, 4096))


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


def gemm_flops_per_s() -> float:
    rates = []
    for rows, columns, inner in GEMM_SIZES:
        left = torch.randn(rows, inner).bfloat16()
        weight = torch.randn(columns, inner).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        plain_s = best_seconds(partial(torch.nn.functional.linear, left, weight))
        linear = torch.ops.mkldnn._linear_pointwise
        packed_s = best_seconds(partial(linear, left, packed, None, "none", [], ""))
        rates.append(2 * rows * columns * inner / min(plain_s, packed_s))
    return max(rates)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    with torch.inference_mode():
        rates = {
            "read_bytes_per_s": read_bytes_per_s(),
            "gemm_flops_per_s": gemm_flops_per_s(),
        }
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
