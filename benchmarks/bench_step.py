"""What the engine adds to a decode step: the same steps through it and in a bare loop on the rank.

One rank, one checkpoint. The engine generates a batch greedily, past any end token; its step is the
median time between tokens. Then the rank executes like plans by itself, without launcher, scheduler
or messages. Both alternate. Run it with nothing else on the machine:

    python benchmarks/bench_step.py CHECKPOINT [BATCH …]

`bench_engine.py` leaves its checkpoints in the folder that it names.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from bench_ranks import RunBareSteps, start_ranks
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.checkpoint_folder import resolve_model
from expertlane.engine.commands import RunStep
from expertlane.engine.engine import Engine
from expertlane.engine.model_runner import ModelRunner
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.from_hf import read_model
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams

PROMPT_LEN, NUM_STEPS, NUM_ROUNDS = 32, 64, 5
BLOCK_SIZE, BLOCKS_A_SEQ = 16, 8


def bare_steps(context: Any, command: RunBareSteps) -> list[float]:
    """Runs on the rank."""
    from expertlane.engine.stage import run_step

    batch_size = command.batch_size
    random, seconds = np.random.default_rng(0), []
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
        plan = StepPlan(step, 0, Phase.DECODE, ((batch,),), record=False)
        began = time.perf_counter()
        run_step(context, RunStep(plan.of_dp_ranks()[0]))
        seconds.append(time.perf_counter() - began)
    return seconds


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
            medians = statistics.median(through_engine), statistics.median(bare)
            rows.append({"batch": batch_size, "engine_s": medians[0], "bare_s": medians[1]})
    table = Table("batch", "engine ms", "bare ms", "engine / bare", title="a decode step")
    for row in rows:
        ms = 1e3 * row["engine_s"], 1e3 * row["bare_s"]
        table.add_row(str(row["batch"]), f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{ms[0] / ms[1]:.2f}")
    console = Console()
    console.print(table)
    line = {"benchmark": "step", "version": __version__, "model": model.name, "rows": rows}
    console.out(json.dumps(line), highlight=False)


if __name__ == "__main__":
    main()
