"""What the engine adds to a decode step: the same steps through it and in a bare loop on the rank.

One rank, one checkpoint. The engine generates a batch greedily, past any end token; its step is the
median time between tokens. Then the rank executes like plans by itself, without launcher, scheduler
or messages. Both alternate. A second table has the bare steps again, recorded: what each stage took
and the bytes that it read, for a profile. Run it with nothing else on the machine:

    python benchmarks/bench_step.py CHECKPOINT [BATCH …]

`bench_engine.py` leaves its checkpoints in the folder that it names.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from bench_ranks import ProfileBareSteps, RunBareSteps, start_ranks
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.engine import Engine
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import RunStep
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.from_hf import read_model
from expertlane.spec.hf_config import resolve_model
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase, Stage
from expertlane.spec.sampling import SamplingParams

PROMPT_LEN, NUM_STEPS, NUM_ROUNDS = 32, 64, 5
BLOCK_SIZE, BLOCKS_A_SEQ = 16, 8


def decode_steps(batch_size: int, *, record: bool) -> Iterator[StepPlan]:
    random = np.random.default_rng(0)
    tables = np.arange(batch_size * BLOCKS_A_SEQ, dtype=np.int32).reshape(batch_size, -1)
    for step in range(NUM_STEPS):
        batch = Batch(
            seq_ids=np.arange(batch_size),
            num_scheduled_tokens=np.ones(batch_size, dtype=np.int64),
            num_computed_tokens=np.full(batch_size, PROMPT_LEN + step),
            token_ids=random.integers(0, 100, batch_size),
            block_tables=tables,
            yields_token=np.ones(batch_size, dtype=np.bool_),
        )
        yield StepPlan(step, 0, Phase.DECODE, ((batch,),), record=record).of_dp_ranks()[0]


def bare_steps(context: Any, command: RunBareSteps) -> list[float]:
    """Runs on the rank."""
    from expertlane.engine.stage.stage import run_step

    seconds = []
    for plan in decode_steps(command.batch_size, record=False):
        began = time.perf_counter()
        run_step(context, RunStep(plan))
        seconds.append(time.perf_counter() - began)
    return seconds


def profiled_steps(context: Any, command: ProfileBareSteps) -> dict[str, list[float]]:
    """Runs on the rank: by stage, the median of its seconds, and the mean of the bytes it reads."""
    from expertlane.engine.stage.stage import run_step

    wall_s, num_bytes = [], []
    for plan in decode_steps(command.batch_size, record=True):
        record = run_step(context, RunStep(plan)).record
        assert record is not None, "it was asked for"
        wall_s.append(record.wall_s.sum(axis=(0, 1)))
        num_bytes.append(record.weight_bytes.copy())
        num_bytes[-1][list(Stage).index(Stage.ATTENTION)] += record.kv_bytes
    columns = np.median(wall_s, axis=0), np.mean(num_bytes, axis=0)
    return {
        stage.label: [float(took), float(read)]
        for stage, took, read in zip(Stage, *columns, strict=True)
        if took > 0
    }


def engine_steps(engine: Engine, vocab_size: int, batch_size: int, number: int) -> list[float]:
    """Seconds between the tokens of a batch that decodes together."""
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 1, ignore_eos=True)
    prompts = np.random.default_rng(number).integers(0, vocab_size, (batch_size, PROMPT_LEN))
    outputs = [engine.add(f"{number}-{i}", prompt, params) for i, prompt in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
    return np.diff(outputs[-1].token_times_s).tolist()


def main() -> None:
    folder = resolve_model(sys.argv[1])
    batch_sizes = [int(size) for size in sys.argv[2:]] or [1, 8, 32, 128]
    model, layout, options = read_model(folder, sys.argv[1]), Layout(), Options()
    most = max(batch_sizes)
    limits = Limits(
        vocab_size=model.vocab_size,
        max_model_len=BLOCK_SIZE * BLOCKS_A_SEQ,
        num_blocks=most * (BLOCKS_A_SEQ + 1),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=most * PROMPT_LEN,
        max_num_seqs=most,
        prefix_caching=False,
    )
    rows = []
    with start_ranks(1) as pool:
        runner = ModelRunner(
            pool,
            model,
            Deployment("bench", layout, options),
            limits,
            seed=0,
            ranks_per_node=1,
            checkpoint=folder,
        )
        scheduler = ContinuousScheduler(layout, options, limits, lookahead=True, record=False)
        engine = Engine(scheduler, runner)
        for batch_size in batch_sizes:
            through_engine, bare = [], []
            for number in range(NUM_ROUNDS):
                name = f"{batch_size}{number}"
                through_engine += engine_steps(engine, model.vocab_size, batch_size, int(name))
                bare += pool.call(RunBareSteps(batch_size))[0]
            rows.append(
                {
                    "batch": batch_size,
                    "engine_s": statistics.median(through_engine),
                    "bare_s": statistics.median(bare),
                    "stages": pool.call(ProfileBareSteps(batch_size))[0],
                }
            )
    show(rows)
    line = {"benchmark": "step", "version": __version__, "model": model.name, "rows": rows}
    Console().out(json.dumps(line), highlight=False)


def show(rows: list[dict[str, Any]]) -> None:
    steps = Table("batch", "engine ms", "bare ms", "engine / bare", title="a decode step")
    stages = Table("batch", "stage", "ms", "read MB", "GB/s", title="bare, recorded by stage")
    for row in rows:
        ms, batch = (1e3 * row["engine_s"], 1e3 * row["bare_s"]), str(row["batch"])
        steps.add_row(batch, f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{ms[0] / ms[1]:.2f}")
        for stage, (took, read) in row["stages"].items():
            speed = f"{read / took / 1e9:.1f}" if read else ""
            stages.add_row(batch, stage, f"{1e3 * took:.2f}", f"{read / 1e6:.1f}", speed)
    console = Console()
    console.print(steps)
    console.print(stages)


if __name__ == "__main__":
    main()
