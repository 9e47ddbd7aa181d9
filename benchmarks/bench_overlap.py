"""Every dispatch form with and without two-batch overlap, beside what `auto` chooses.

Two local ranks of one thread, each with all its threads pinned to a core of its own; the launcher
may run on either. The layout is dp=2,ep=2 with each rank a node, the model has random weights. Up
to 256 tokens of a rank are a decode step of so many sequences, more are prompts. All choices and
`auto`, with both its table and its way of choosing as they ship, take turns in one run; a time is
the launcher's, from submitting the plan to having all outcomes, the median of the rounds; choices
that have become hopeless are run no further. Steps of few tokens scatter much, since ranks wait
for each other: `±` is half of the 95 % interval of auto / best by resampling rounds. `hides` is the
repository's definition, `report.compared.hidden_share`, of the form that is fastest without
overlap; what is exposed comes from steps of their own, since recording takes time. Run it with
nothing else on the machine:

    python benchmarks/bench_overlap.py [--hidden 256 1024] [--tokens 1 4 16 …] [--point-s 60]
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertlane import __version__
from expertlane.engine.launch import describe_ranks, start_pool
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import SetDispatch
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.warm_up import still_hopeful
from expertlane.report.compared import hidden_share
from expertlane.results.metrics import stage_time
from expertlane.results.step_record import StepRecord
from expertlane.schedule.plan import Batch, StepOutcome, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.dispatch import DispatchMode, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase

LAYOUT = Layout(dp=2, ep=2)
CONTEXT_LEN, PROMPT_LEN, MAX_NUM_SEQS = 64, 128, 256
BLOCK_SIZE, BLOCKS_A_SEQ, VOCAB_SIZE = 16, 8, 1024
LEAST_ROUNDS, HOPELESS_ROUNDS, NUM_RECORDED = 7, 20, 15
AUTO = "auto"


def model_of(hidden_size: int) -> ModelConfig:
    return ModelConfig(
        name=f"hidden-{hidden_size}",
        num_hidden_layers=4,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=hidden_size,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=PROMPT_LEN,
    )


def plan_of(num_tokens: int, position: int, *, record: bool = False) -> StepPlan:
    """A decode step at a position, or prompts from their beginning; so many tokens on each rank."""
    is_decode = num_tokens <= MAX_NUM_SEQS
    length = 1 if is_decode else PROMPT_LEN
    num_seqs = num_tokens // length
    random = np.random.default_rng(position)
    batches = tuple(
        Batch(
            seq_ids=np.arange(num_seqs),
            num_scheduled_tokens=np.full(num_seqs, length),
            num_computed_tokens=np.full(num_seqs, position if is_decode else 0),
            token_ids=random.integers(0, VOCAB_SIZE, num_seqs * length),
            block_tables=np.arange(num_seqs * BLOCKS_A_SEQ, dtype=np.int32).reshape(num_seqs, -1),
            yields_token=np.ones(num_seqs, dtype=np.bool_),
        )
        for _ in range(LAYOUT.dp)
    )
    phase = Phase.DECODE if is_decode else Phase.PREFILL
    return StepPlan(0, 0, phase, (batches,), record=record)


def runner_for(pool: RankPool, hidden_size: int, most_tokens: int, **options: Any) -> ModelRunner:
    limits = Limits(
        VOCAB_SIZE,
        max_model_len=PROMPT_LEN,
        num_blocks=BLOCKS_A_SEQ * max(MAX_NUM_SEQS, most_tokens // PROMPT_LEN),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=most_tokens,
        max_num_seqs=MAX_NUM_SEQS,
    )
    deployment = Deployment("bench", LAYOUT, Options(**options))
    return ModelRunner(pool, model_of(hidden_size), deployment, limits, seed=0, ranks_per_node=1)


def run(runner: ModelRunner, plan: StepPlan) -> StepOutcome:
    return runner.collect(runner.submit(plan))


def step_seconds(
    pool: RankPool, runner: ModelRunner, choices: dict[str, DispatchTable], plan: StepPlan, s: float
) -> dict[str, list[float]]:
    """Seconds of the plan's step by choice, in alternating order, for `s` seconds at least."""
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    running = list(choices)
    began, number = time.perf_counter(), 0
    while number <= LEAST_ROUNDS or time.perf_counter() - began < s:
        if number > HOPELESS_ROUNDS:
            fixed = {name: seconds[name] for name in running if name != AUTO}
            running = [*still_hopeful(fixed), AUTO]
        for name in running[:: 1 if number % 2 else -1]:
            pool.call(SetDispatch(choices[name]))
            outcome = run(runner, plan)
            if number:  # the first warms up
                seconds[name].append(outcome.finished_s - outcome.submitted_s)
        number += 1
    return seconds


def half_interval(first: list[float], second: list[float]) -> float:
    """Half of the 95 % interval of the ratio of two medians, the same rounds drawn for both."""
    pairs = np.array([first, second])
    rounds = np.random.default_rng(0).integers(0, len(first), (500, len(first)))
    medians = np.median(pairs[:, rounds], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(high - low) / 2


def exposed_seconds(
    pool: RankPool, runner: ModelRunner, mode: DispatchMode, plan: StepPlan
) -> float:
    """Median of `StageTime.exposed_s` of recorded steps."""
    pool.call(SetDispatch(DispatchTable.fixed(mode.form, mode.overlap)))
    exposed = []
    for _ in range(NUM_RECORDED):
        done = run(runner, plan)
        step = StepRecord(plan.phase, 0, 1, (), 0, done.submitted_s, done.finished_s, done.records)
        exposed.append(stage_time(LAYOUT, [step]).exposed_s)
    return median(exposed)


def measure(pool: RankPool, runner: ModelRunner, num_tokens: int, point_s: float) -> dict[str, Any]:
    """One line of the table."""
    table = runner.dispatch_table
    assert table is not None, "auto was asked for"
    if num_tokens <= MAX_NUM_SEQS:
        for position in range(CONTEXT_LEN):  # fill the cache
            run(runner, plan_of(num_tokens, position))
    fixed = {str(mode): DispatchTable.fixed(mode.form, mode.overlap) for mode in table.modes}
    plan = plan_of(num_tokens, CONTEXT_LEN)
    seconds = step_seconds(pool, runner, fixed | {AUTO: table}, plan, point_s)
    step_s = {name: median(of) for name, of in seconds.items()}
    auto_s = step_s.pop(AUTO)
    plain = min((mode for mode in table.modes if not mode.overlap), key=lambda m: step_s[str(m)])
    recorded = plan_of(num_tokens, CONTEXT_LEN, record=True)
    overlapped = DispatchMode(plain.form, overlap=True)
    exposed_s, exposed_on_s = (
        exposed_seconds(pool, runner, mode, recorded) for mode in (plain, overlapped)
    )
    off, on = seconds[str(plain)], seconds[str(overlapped)]
    both = min(len(off), len(on))  # the same rounds: the machine's speed drifts
    off_s, on_s = median(off[:both]), median(on[:both])
    most_run = [name for name in step_s if len(seconds[name]) == len(seconds[AUTO])]
    best = min(most_run, key=step_s.__getitem__)
    return {
        "num_tokens": num_tokens,
        "phase": plan.phase,
        "num_rounds": len(seconds[AUTO]),
        "step_s": step_s,
        "best": best,
        "chosen": str(table.choose(num_tokens, num_tokens > 1)),
        "auto_s": auto_s,
        "ratio": auto_s / step_s[best],
        "half_interval": half_interval(seconds[AUTO], seconds[best]),
        "plain": str(plain),
        "exposed_s": exposed_s,
        "hidden": hidden_share(exposed_s - exposed_on_s, exposed_s) if num_tokens > 1 else None,
        "overlap_costs_s": on_s - off_s,
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    names = ["size", "tokens", "best fixed", "ms", "auto", "ms", "ratio", "±", "hides", "on - off"]
    table = Table(*names, title="a step on 2 ranks of one core, dp=2,ep=2, bfloat16")
    for row in rows:
        table.add_row(
            str(row["hidden_size"]),
            f"{row['num_tokens']} {row['phase']}",
            short(row["best"]),
            f"{1e3 * row['step_s'][row['best']]:.2f}",
            short(row["chosen"]),
            f"{1e3 * row['auto_s']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['half_interval']:.3f}",
            "" if row["hidden"] is None else f"{row['hidden']:.0%}",
            f"{1e3 * row['overlap_costs_s']:+.2f}",
        )
    console.print(table)
    console.print("+: with overlap; hides, on - off: overlap of the form that is fastest without")


def short(mode: str) -> str:
    return mode.replace(" with overlap", " +")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--point-s", type=float, default=60.0)
    asked = parser.parse_args()
    rows, tables, console = [], {}, Console(width=100)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("points", total=len(asked.hidden) * len(asked.tokens))
        for hidden_size in asked.hidden:
            with start_pool(LAYOUT.world_size, timeout_s=60.0, dtype="bfloat16") as pool:
                cores = [each.cpus for each in describe_ranks(pool)]
                most_tokens = max(asked.tokens)
                runner_for(pool, hidden_size, most_tokens)  # draws weights; kept for the next
                began = time.perf_counter()
                auto = {"dispatch": "auto", "overlap": "auto"}
                runner = runner_for(pool, hidden_size, most_tokens, **auto)
                seconds = time.perf_counter() - began
                table = runner.dispatch_table
                tables[hidden_size] = {"timed_in_s": seconds, "text": str(table)}
                tables[hidden_size]["rows"] = [[r.num_tokens, *r.step_s] for r in table.rows]
                for num_tokens in asked.tokens:
                    row = measure(pool, runner, num_tokens, asked.point_s)
                    rows.append({"hidden_size": hidden_size, **row})
                    progress.advance(task)
    show(console, rows)
    for hidden_size, of in tables.items():
        console.print(f"hidden {hidden_size}, timed in {of['timed_in_s']:.1f} s: {of['text']}")
    line = {"benchmark": "overlap", "version": __version__, "cores": cores}
    console.out(json.dumps(line | {"rows": rows, "tables": tables}), highlight=False)


if __name__ == "__main__":
    main()
