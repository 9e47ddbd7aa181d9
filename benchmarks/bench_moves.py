"""What moving experts costs decode steps: none, whole experts in slices of 32 MB, and paced parts.

Steps of each kind take turns, so that all see the same machine. Two ranks decode; meanwhile experts
go from each to the other, a slice beside every step, and what arrived is dropped. A step's time is
the launcher's, with the commands before and after it. `paced` sizes slices as the engine does, by
what its own steps and slices take.

    python benchmarks/bench_moves.py [ROUNDS] [MOE_INTERMEDIATE_SIZE]
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import bench_counters
import numpy as np
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.balance.moves import WHOLE, Move, Part, most_of_a_rank, next_slice
from expertlane.cost.memory import workload_limits
from expertlane.engine.elastic.move_pace import MovePace
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import FinishMoves, StartMoves, TimeOneMove
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

LAYOUT = Layout.parse("dp=2,ep=2")
SLICE_BYTES = 32_000_000  # over all ranks, as it was before
WAYS = ("none", "32 MB", "paced")
NUM_MOVED = 8  # experts of each way and round
CONTEXT_LEN = 40


def crossing(layer: int) -> Iterator[Move]:
    """Experts of a layer, to the other rank and back."""
    for number in range(NUM_MOVED):
        source = number % 2
        yield Move(layer, source * 8 + number // 2, source, 1 - source, number // 2)


class Steps:
    """Decode steps of a runner, one after the other, numbered."""

    def __init__(self, pool: RankPool, inner: int) -> None:
        self.model = replace(PRESETS["paper-small"], moe_intermediate_size=inner)
        workload = Workload(64, CONTEXT_LEN, 4, seed=0)
        limits = workload_limits(workload, self.model, LAYOUT)
        deployment = Deployment("moves", LAYOUT)
        self.pool, self.step = pool, 0
        self.runner = ModelRunner(pool, self.model, deployment, limits, seed=0, ranks_per_node=2)
        timed = [pool.call(TimeOneMove()) for _ in range(3)]
        self.expert_bytes = timed[0][0][0]
        self.pace = MovePace.of_trials(timed)

    def one(self) -> float:
        """Seconds of a step; the pace sees its records."""
        plan = bench_counters.decode_plan(self.step, LAYOUT, record=True, context_len=CONTEXT_LEN)
        self.step += 1
        began_s = time.perf_counter()
        outcome = self.runner.collect(self.runner.submit(plan))
        seconds = time.perf_counter() - began_s
        self.pace.saw_step(outcome.records)
        return seconds

    def moving(self, way: str) -> list[float]:
        """Seconds of each step while NUM_MOVED experts move; the same number without."""
        layers = [i for i in range(self.model.num_hidden_layers) if not self.model.is_dense(i)]
        waiting, found = deque(map(Part, crossing(layers[0]))), []
        whole = max(1, SLICE_BYTES // self.expert_bytes) * WHOLE // 2  # half by each rank
        while waiting:
            most = whole if way == "32 MB" else self.pace.most
            parts = next_slice(waiting, max(most, WHOLE) if way == "32 MB" else most)
            began_s = time.perf_counter()
            start = self.pool.submit(StartMoves(tuple(parts)))
            seconds = self.one()
            finish = self.pool.submit(FinishMoves())
            self.pool.collect(finish)
            if way == "paced":
                self.pace.began(most_of_a_rank(parts) / WHOLE, start, finish)
                self.pace.poll()
            found.append(max(seconds, time.perf_counter() - began_s))
        return found


def main() -> None:
    bench_counters.NUM_SEQUENCES = 4  # a step that is short beside a slice of 32 MB
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    inner = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    with RankPool(LocalRanks(2, 60.0, "float32"), 60.0) as pool:
        steps = Steps(pool, inner)
        for _ in range(20):
            steps.one()
        steps.moving("paced")
        for _ in range(rounds):
            taken["none"] += [steps.one() for _ in range(10)]
            for way in WAYS[1:]:
                taken[way] += steps.moving(way)
        pace, expert_bytes = steps.pace, steps.expert_bytes
    table = Table(title=f"decode steps while experts of {expert_bytes / 1e6:.3g} MB move, ms")
    for heading in ("moves", "steps", "median", "p90", "most", "over none"):
        table.add_column(heading, justify="right")
    none = float(np.median(taken["none"]))
    line = {"benchmark": "moves", "version": __version__, "expert_bytes": expert_bytes}
    for way, seconds in taken.items():
        middle, high = np.median(seconds), np.percentile(seconds, 90)
        shown = (f"{1e3 * each:.2f}" for each in (middle, high, max(seconds)))
        table.add_row(way, f"{len(seconds)}", *shown, f"{middle / none:.2f} ×")
        line[way] = [len(seconds), middle, high, max(seconds)]
    console = Console(width=100)
    console.print(table)
    console.print(
        f"a move {1e3 * pace.move_s:.2f} ms, a stall {1e3 * pace.stall_s:.2f} ms, exposed "
        f"{pace.exposed:.2f}, a slice {pace.most / WHOLE:.3f} of an expert"
    )
    console.out(json.dumps(line), highlight=False)


if __name__ == "__main__":
    main()
