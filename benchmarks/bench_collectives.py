"""Collectives of local ranks through shared memory, beside gloo and beside their bound.

Run it with nothing else on the machine: .venv/bin/python benchmarks/bench_collectives.py
Every rank sends so many bytes to every other one. A time is the median of calls one after the
other, of the slowest rank. The bound: all bytes written and read once at the memory bandwidth of a
copy that all cores make, plus two context switches a rank, shared out over the cores. gloo, shared
memory, and shared memory without compiled code take turns. Prints a table, then one JSON line.
"""

import json
import os
import statistics
import threading
import time

import torch
from bench_ranks import MeasureCollectives, start_ranks

from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import HostClock, Recorder
from expertlane.ops.host import num_cores
from expertlane.spec.layout import Layout

NUM_BYTES = (256, 4096, 65536, 1 << 20)  # to each other rank
NUM_RANKS = (2, 4, 8, 16)
MOST_BYTES = 1 << 30  # of all ranks together
SECONDS, MOST_CALLS = 1.0, 200
TRANSPORTS = {
    "gloo": {"EXPERTLANE_TRANSPORT": "gloo"},
    "shared": {"EXPERTLANE_TRANSPORT": "shared_memory"},
    "uncompiled": {"EXPERTLANE_TRANSPORT": "shared_memory", "EXPERTLANE_BACKEND": "torch"},
}


@torch.inference_mode()
def measure(context, command: MeasureCollectives) -> dict[str, float]:
    """Runs on every rank."""
    size, layout = command.num_ranks, Layout(dp=command.num_ranks)
    context.meshes.make(layout)
    recorder = Recorder(context.rank, 1, 1, context.progress, HostClock(), size)
    group = ParallelMesh(layout, context.meshes, context.rank, size, recorder).stage
    width = command.num_bytes // 4
    one, each = torch.zeros(1, width), [1] * size
    all_rows = torch.zeros(size, width)
    calls = {
        "all_to_all": lambda: group.all_to_all(all_rows, each, each).wait(),
        "all_gather": lambda: group.all_gather(one, each).wait(),
        "reduce_scatter": lambda: group.reduce_scatter(all_rows, each).wait(),
    }
    medians = {}
    for name, call in calls.items():
        call()
        began, seconds = time.perf_counter(), []
        for _ in range(command.num_calls):
            call()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        context.progress.touch()
        medians[name] = statistics.median(seconds)
    return medians


def switch_s() -> float:
    """A context switch between two threads on one core."""
    here, there = os.pipe(), os.pipe()
    num = 2000

    def answer() -> None:
        for _ in range(num):
            os.write(there[1], os.read(here[0], 1))

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    other = threading.Thread(target=answer)
    other.start()
    began = time.perf_counter()
    for _ in range(num):
        os.write(here[1], b"x")
        os.read(there[0], 1)
    took = time.perf_counter() - began
    other.join()
    return took / num / 2


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a copy on all cores."""
    source, target = torch.zeros(2, 1 << 28, dtype=torch.uint8)
    target.copy_(source)
    began = time.perf_counter()
    for _ in range(5):
        target.copy_(source)
    return 5 * 2 * source.nbytes / (time.perf_counter() - began)


def main() -> None:
    bytes_per_s, cores, affinity = copy_bytes_per_s(), num_cores(), os.sched_getaffinity(0)
    switch = switch_s()
    os.sched_setaffinity(0, affinity)
    rows = []
    for num_ranks in NUM_RANKS:
        found = {}
        for transport, variables in TRANSPORTS.items():
            os.environ |= variables
            with start_ranks(num_ranks, None) as pool:
                for num_bytes in NUM_BYTES:
                    if num_bytes * num_ranks**2 > MOST_BYTES:
                        continue
                    guess = 0.03 if transport == "gloo" else 0.001 + num_bytes * num_ranks**2 / 1e9
                    num_calls = int(min(MOST_CALLS, max(5, SECONDS / guess)))
                    by_rank = pool.call(MeasureCollectives(num_ranks, num_bytes, num_calls))
                    for name in by_rank[0]:
                        found[name, num_bytes, transport] = max(rank[name] for rank in by_rank)
            for name in variables:
                del os.environ[name]
        for name, num_bytes in dict.fromkeys(key[:2] for key in found):
            seconds = {each: found[name, num_bytes, each] for each in TRANSPORTS}
            written = num_bytes * num_ranks * (num_ranks - 1)
            written = written / (num_ranks - 1) if name == "all_gather" else written
            read = num_bytes * num_ranks * (num_ranks - 1)
            bound = (written + read) / bytes_per_s + 2 * num_ranks * switch / cores
            rows.append(
                {"ranks": num_ranks, "collective": name, "bytes": num_bytes}
                | seconds
                | {"bound": bound}
            )
    print(
        f"{bytes_per_s / 1e9:.1f} GB/s read and written by a copy, {switch * 1e6:.1f} us a switch"
    )
    print(
        f"{'ranks':>5} {'bytes':>8} {'collective':15} {'gloo ms':>9} {'shared ms':>10} "
        f"{'uncompiled':>10} {'bound ms':>9} {'x gloo':>7} {'x bound':>8}"
    )
    for row in sorted(rows, key=lambda row: (row["collective"], row["ranks"], row["bytes"])):
        times = [row[name] * 1e3 for name in (*TRANSPORTS, "bound")]
        print(
            f"{row['ranks']:>5} {row['bytes']:>8} {row['collective']:15} {times[0]:>9.3f} "
            f"{times[1]:>10.3f} {times[2]:>10.3f} {times[3]:>9.3f} "
            f"{times[0] / times[1]:>7.1f} {times[1] / times[3]:>8.1f}"
        )
    print(json.dumps({"benchmark": "collectives", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
