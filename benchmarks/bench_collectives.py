"""The bare collectives of gloo on this machine: why comm/collectives.py is built as it is.

Run: .venv/bin/python benchmarks/bench_collectives.py
Every collective moves the same rows of 512 float32 values to or from each rank. Prints a table,
then one JSON line.
"""

import json
import statistics
import time

import torch
import torch.distributed as dist
from bench_ranks import MeasureCollectives, start_ranks

WIDTH = 512
NUM_CALLS = 30
NUM_ROWS = (1, 16)
NUM_RANKS = (2, 8, 16)


def measure(context, command: MeasureCollectives) -> dict[str, float]:
    """Runs on every rank."""
    num_rows = command.num_rows
    num_ranks = dist.get_world_size()
    each = torch.randn(num_rows, WIDTH)
    all_rows = torch.randn(num_rows * num_ranks, WIDTH)
    received = torch.empty_like(all_rows)
    calls = {
        "all_to_all": lambda: dist.all_to_all_single(received, all_rows, async_op=True).wait(),
        "all_gather": lambda: dist.all_gather_into_tensor(received, each),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(each, all_rows),
        "all_reduce": lambda: dist.all_reduce(all_rows),
    }
    medians = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(NUM_CALLS):
            dist.barrier()
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
            context.progress.touch()
        medians[name] = statistics.median(seconds)
    return medians


def main() -> None:
    rows = []
    for num_ranks in NUM_RANKS:
        with start_ranks(num_ranks, None) as pool:
            for num_rows in NUM_ROWS:
                by_rank = pool.call(MeasureCollectives(num_rows))
                slowest = {name: max(rank[name] for rank in by_rank) for name in by_rank[0]}
                rows.append({"ranks": num_ranks, "rows": num_rows} | slowest)
    names = list(rows[0])[2:]
    print(f"{'ranks':>5} {'rows':>5} " + " ".join(f"{name + ' ms':>18}" for name in names))
    for row in rows:
        cells = [f"{row[n] * 1e3:.2f} ({row[n] / row['all_to_all']:.1f}×)" for n in names]
        print(f"{row['ranks']:>5} {row['rows']:>5} " + " ".join(f"{cell:>18}" for cell in cells))
    print(json.dumps({"benchmark": "collectives", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
