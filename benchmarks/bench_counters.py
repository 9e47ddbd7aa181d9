"""What the clock and the counters cost: decode steps with and without them, in turn.

Steps of `paper-small` alternate between recording and not recording at one context length, so that
both see the same machine. A step's time is the launcher's, from submitting the plan to having all
outcomes; it includes sending the records back. Run it with nothing else on the machine:

    python benchmarks/bench_counters.py [STEPS_EACH_WAY]
"""

import json
import sys
import time
from statistics import quantiles

import numpy as np
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.cost.memory import workload_limits
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ops.host import num_cores
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

MODEL = PRESETS["paper-small"]
NUM_SEQUENCES, CONTEXT_LEN = 64, 40
BLOCK_SIZE = 16
LAYOUTS = ["tp=1", "dp=2,ep=2", "tp=2"]
NUM_WARM_UP = 20
TIMEOUT_S = 60.0


def decode_plan(step: int, layout: Layout, *, record: bool, context_len: int) -> StepPlan:
    """One more token of every sequence, at the same position in every step."""
    random = np.random.default_rng(step)
    batches = []
    num_blocks = -(-(CONTEXT_LEN + 1) // BLOCK_SIZE)
    for seqs in partition(NUM_SEQUENCES, layout.dp):
        num = len(seqs)
        batches.append(
            Batch(
                seq_ids=np.array(seqs, dtype=np.int64),
                num_scheduled_tokens=np.ones(num, dtype=np.int64),
                num_computed_tokens=np.full(num, context_len),
                token_ids=random.integers(0, MODEL.vocab_size, num),
                block_tables=np.arange(num * num_blocks, dtype=np.int32).reshape(num, num_blocks),
                yields_token=np.ones(num, dtype=np.bool_),
            )
        )
    return StepPlan(step, 0, Phase.DECODE, (tuple(batches),), record=record)


def step_seconds(pool: RankPool, layout: Layout, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with a record."""
    workload = Workload(NUM_SEQUENCES, prompt_len=CONTEXT_LEN, output_len=2)
    limits = workload_limits(workload, MODEL, layout)
    assert limits.block_size == BLOCK_SIZE, "the block tables of the plans are made for it"
    runner = ModelRunner(
        pool, MODEL, Deployment("bench", layout), limits, seed=0, ranks_per_node=pool.num_ranks
    )
    for position in range(CONTEXT_LEN):  # fill the cache
        plan = decode_plan(position, layout, record=False, context_len=position)
        runner.collect(runner.submit(plan))
    seconds: tuple[list[float], list[float]] = [], []
    for step in range(2 * (NUM_WARM_UP + num_steps)):
        # Off and on in turn; which comes first changes from pair to pair.
        record = step % 4 in (1, 2)
        plan = decode_plan(step, layout, record=record, context_len=CONTEXT_LEN)
        began_s = time.perf_counter()
        runner.collect(runner.submit(plan))
        took_s = time.perf_counter() - began_s
        if step >= 2 * NUM_WARM_UP:
            seconds[record].append(took_s)
    return seconds


def summary(layout: str, off: list[float], on: list[float]) -> dict[str, float | int | str]:
    """Medians and quartiles, and the share that recording adds to a step.

    `share` compares the medians. `paired_share` is the median difference of neighbouring steps,
    on less off, over the median off: what slows both for a while cancels out of it.
    """
    differences = [with_s - without_s for without_s, with_s in zip(off, on, strict=True)]
    off_q1, off_s, off_q3 = quantiles(off, n=4)
    on_q1, on_s, on_q3 = quantiles(on, n=4)
    # Standard error of a median of a bell-shaped sample, from its quartiles: 1.25 × 0.74 × IQR/√n.
    low, middle, high = quantiles(differences, n=4)
    error = 0.93 * (high - low) / len(differences) ** 0.5
    return {
        "layout": layout,
        "num_ranks": Layout.parse(layout).world_size,
        "steps_each_way": len(on),
        "off_s": off_s,
        "off_iqr_s": off_q3 - off_q1,
        "on_s": on_s,
        "on_iqr_s": on_q3 - on_q1,
        "share": on_s / off_s - 1,
        "paired_share": middle / off_s,
        "paired_share_error": error / off_s,
    }


def main() -> None:
    """Measure every layout that has a core for each rank; a table, then one JSON line."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    rows = []
    for name in LAYOUTS:
        layout = Layout.parse(name)
        if layout.world_size > num_cores():
            print(f"{name} left out: {num_cores()} cores", file=sys.stderr)
            continue
        with RankPool(LocalRanks(layout.world_size, TIMEOUT_S, "float32"), TIMEOUT_S) as pool:
            rows.append(summary(name, *step_seconds(pool, layout, num_steps)))
    table = Table(title=f"decode step of {MODEL.name}, {NUM_SEQUENCES} sequences, ms")
    for heading in ("layout", "steps each way", "off", "IQR", "on", "IQR", "of medians", "paired"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [row[key] for key in ("off_s", "off_iqr_s", "on_s", "on_iqr_s")]
        table.add_row(
            str(row["layout"]),
            str(row["steps_each_way"]),
            *(f"{seconds * 1e3:.2f}" for seconds in times),
            f"{row['share']:.2%}",
            f"{row['paired_share']:.2%} ± {row['paired_share_error']:.2%}",
        )
    Console(width=100).print(table)
    result = {"benchmark": "counters", "version": __version__, "num_cores": num_cores()}
    print(json.dumps(result | {"rows": rows}))


if __name__ == "__main__":
    main()
