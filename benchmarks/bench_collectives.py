"""Collectives of local ranks through shared memory, beside gloo and beside their bound.

Run it with nothing else on the machine: .venv/bin/python benchmarks/bench_collectives.py
Every rank writes so many bytes for every other one, where the group would have them, and sends
them; `copied` sends what lies elsewhere and was written before. A time is the median of calls one
after the other, of the slowest rank; `cpu` is the processor time of all ranks' calls, shared out
over the cores, which other programs on the machine disturb less. The bound: all bytes written and
read once at the memory bandwidth of a copy that all cores make, plus two context switches a rank,
shared out over the cores. gloo and shared memory take turns.
Prints a table, then one JSON line.

    python benchmarks/bench_collectives.py [--ranks 2 16] [--bytes 256 65536] [--transports shared]
"""

import argparse
import json
import os
import statistics
import threading
import time
from typing import Any

import torch
from bench_ranks import MeasureCollectives, start_ranks

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.ops.host import num_cores
from expertlane.spec.layout import Layout

NUM_BYTES = (256, 4096, 65536, 1 << 20)  # to each other rank
NUM_RANKS = (2, 4, 8, 16)
MOST_BYTES = 1 << 30  # of all ranks together
SECONDS, MOST_CALLS = 1.0, 200
TRANSPORTS = {
    "gloo": {"EXPERTLANE_TRANSPORT": "gloo"},
    "shared": {"EXPERTLANE_TRANSPORT": "shared_memory"},
}


@torch.inference_mode()
def measure(context, command: MeasureCollectives) -> dict[str, list[float]]:
    """Runs on every rank: wall and processor seconds of a call."""
    size, layout = command.num_ranks, Layout(dp=command.num_ranks)
    context.meshes.make(layout)
    recorder = Recorder(context.rank, 1, 1, context.progress, HostClock(), size)
    group = ParallelMesh(layout, context.meshes, context.rank, size, recorder).stage
    width = command.num_bytes // 4
    one, each = torch.zeros(1, width), [1] * size
    all_rows = torch.zeros(size, width)

    def made(num_rows: int) -> torch.Tensor:
        return group.empty(num_rows, width, one).fill_(1.0)

    calls = {
        "all_to_all": lambda: group.all_to_all(made(size), each, each).wait(),
        "all_gather": lambda: group.all_gather(made(1), each).wait(),
        "reduce_scatter": lambda: group.reduce_scatter(made(size), each).wait(),
        "all_to_all copied": lambda: group.all_to_all(all_rows, each, each).wait(),
        "all_gather copied": lambda: group.all_gather(one, each).wait(),
        "reduce_scatter copied": lambda: group.reduce_scatter(all_rows, each).wait(),
    }
    found = {}
    for name, call in calls.items():
        call()
        began, cpu, seconds = time.perf_counter(), time.process_time(), []
        for _ in range(command.num_calls):
            call()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        cpu = time.process_time() - cpu
        context.progress.touch()
        found[name] = [statistics.median(seconds), cpu / command.num_calls]
    return found


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=NUM_RANKS)
    parser.add_argument("--bytes", type=int, nargs="+", default=NUM_BYTES)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    return parser.parse_args()


def measure_all(asked: argparse.Namespace, cores: int) -> dict[tuple[str, int, int, str], Any]:
    """Wall and processor seconds by collective, ranks, bytes and transport."""
    found: dict[tuple[str, int, int, str], Any] = {}
    for num_ranks in asked.ranks:
        for transport in asked.transports:
            os.environ |= TRANSPORTS[transport]
            with start_ranks(num_ranks, None) as pool:
                for num_bytes in asked.bytes:
                    if num_bytes * num_ranks**2 > MOST_BYTES:
                        continue
                    guess = 0.03 if transport == "gloo" else 0.001 + num_bytes * num_ranks**2 / 1e9
                    num_calls = int(min(MOST_CALLS, max(5, SECONDS / guess)))
                    by_rank = pool.call(MeasureCollectives(num_ranks, num_bytes, num_calls))
                    for name in by_rank[0]:
                        wall = max(rank[name][0] for rank in by_rank)
                        cpu = sum(rank[name][1] for rank in by_rank) / min(cores, num_ranks)
                        found[name, num_ranks, num_bytes, transport] = {"wall": wall, "cpu": cpu}
            for name in TRANSPORTS[transport]:
                del os.environ[name]
    return found


def main() -> None:
    asked = arguments()
    bytes_per_s, cores, affinity = copy_bytes_per_s(), num_cores(), os.sched_getaffinity(0)
    switch = switch_s()
    os.sched_setaffinity(0, affinity)
    found, rows = measure_all(asked, cores), []
    for name, num_ranks, num_bytes in dict.fromkeys(key[:3] for key in sorted(found)):
        written = read = num_bytes * num_ranks * (num_ranks - 1)
        written = written / (num_ranks - 1) if name.startswith("all_gather") else written
        bound = (written + read) / bytes_per_s + 2 * num_ranks * switch / cores
        seconds = {
            f"{transport} {kind}": value
            for transport in asked.transports
            for kind, value in found[name, num_ranks, num_bytes, transport].items()
        }
        row = {"ranks": num_ranks, "collective": name, "bytes": num_bytes}
        rows.append(row | seconds | {"bound": bound})
    print(
        f"{bytes_per_s / 1e9:.1f} GB/s read and written by a copy, {switch * 1e6:.1f} us a switch"
    )
    shown = [*(f"{each} {kind}" for each in asked.transports for kind in ("wall", "cpu")), "bound"]
    heads = "".join(f"{each:>16}" for each in shown)
    print(f"{'ms':22}{'ranks':>6}{'bytes':>9}{heads}{'x bound':>9}{'x gloo':>8}")
    for row in rows:
        line = f"{row['collective']:22}{row['ranks']:>6}{row['bytes']:>9}"
        line += "".join(f"{1e3 * row[each]:>16.3f}" for each in shown)
        if "shared wall" in row:
            line += f"{row['shared wall'] / row['bound']:>9.1f}"
            if "gloo wall" in row:
                line += f"{row['gloo wall'] / row['shared wall']:>8.1f}"
        print(line)
    print(json.dumps({"benchmark": "collectives", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
