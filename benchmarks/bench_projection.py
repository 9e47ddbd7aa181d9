"""Steps as the cluster model projects them beside steps as measured, on this machine.

Rounds in turn: one of `expertlane calibrate`, then all deployments on real ranks, since a machine's
speed moves; the profile and a deployment's times are medians over the rounds. Ranks have one thread
and a core of their own. A projection is `CostRunner` driven by the same scheduler over the same
requests, with the experts of a routing trace, recorded on one rank: it knows the profile and the
trace, and no time of any deployment. What other processes disturbed is measured once more. Layouts
are of 1 and 2 ranks, with all that makes a difference there: dispatch forms, overlap,
micro-batches; with --ranks 1 that rank alone, on a GPU where there is one. Sizes are between those
that are calibrated. Run it with nothing else on the machine:

    python benchmarks/bench_projection.py [--ranks 1] [--hidden 768] [--layers 4] [--rounds 5]
        [--profile FILE] [--json FILE]
"""

import argparse
import json
import os
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertlane import __version__
from expertlane.balance.holding import placements_of
from expertlane.balance.trace import RoutingTrace
from expertlane.calibrate.run import Calibration, QuietMeasuring
from expertlane.calibrate.steps import (
    BLOCK_SIZE,
    PhaseTimes,
    limits_for,
    phase_times,
    run_batch,
)
from expertlane.cost.laws.profile import (
    BOUNDS,
    LIKELY,
    Execution,
    Profile,
    Terms,
    kernels_of,
    read_profile,
)
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import TraceRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.engine.launch import start_pool
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import FinishedStep
from expertlane.spec.deployment import Deployment, DispatchTable, Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, Stage

NUM_RANKS, DTYPE = 2, "bfloat16"
OUTPUT_LEN = 8
EP = Layout(dp=2, ep=2)
DEPLOYMENTS = (
    Deployment("one rank", Layout()),
    Deployment("tp=2", Layout(tp=2)),
    Deployment("dp=2", Layout(dp=2)),
    Deployment("dp=2,ep=2", EP),
    Deployment("dp=2,ep=2 all-gather", EP, Options(dispatch="all_gather")),
    Deployment("dp=2,ep=2 overlap", EP, Options(overlap=True)),
    Deployment("dp=2,ep=2 all-gather overlap", EP, Options(dispatch="all_gather", overlap=True)),
    Deployment("pp=2", Layout(pp=2)),
    Deployment("pp=2, 2 micro-batches", Layout(pp=2), Options(num_micro_batches=2)),
)
LOADS = ((4, 256), (16, 64), (32, 32), (128, 16))  # sequences in all, tokens of each prompt
GPU_LOADS = ((1, 900), (6, 300), (24, 700), (100, 200))
DIFFERENT = 1.05  # pairs closer than this have no order


class Case(NamedTuple):
    """What is projected and measured."""

    deployment: Deployment
    num_requests: int
    prompt_len: int

    @property
    def num_positions(self) -> int:
        """Of a sequence at its end."""
        return self.prompt_len + OUTPUT_LEN


def model_of(hidden_size: int, num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        name=f"hidden-{hidden_size}",
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        head_dim=64,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=hidden_size,
        vocab_size=4096,
        max_position_embeddings=1024,
        hidden_act="silu",
        gated_mlp=True,
    )


def prompts_of(case: Case, model: ModelConfig) -> np.ndarray:
    shape = case.num_requests, case.prompt_len
    return np.random.default_rng(case.num_requests).integers(0, model.vocab_size, shape)


def limits_of(case: Case, model: ModelConfig) -> Any:
    return limits_for(case.deployment, case.num_requests, case.num_positions, model.vocab_size)


def measure_round(
    pool: RankPool, model: ModelConfig, cases: list[Case], times: dict[Case, list[PhaseTimes]]
) -> float:
    """Each case once; the most that other processes took of the cores meanwhile."""
    shares = []
    largest: dict[Deployment, Case] = {}
    for case in cases:
        known = largest.get(case.deployment, case)
        most = max(known, case, key=lambda each: limits_of(each, model).num_blocks)
        largest[case.deployment] = most
    for deployment, most in largest.items():
        limits = limits_of(most, model)
        runner = runner_of(pool, model, deployment, limits)
        own = [case for case in cases if case.deployment is deployment]
        quiet = QuietMeasuring()
        found = quiet.measure(partial(measure, runner, own, model))
        for case, seconds in zip(own, found, strict=True):
            times[case].append(seconds)
        shares.append(quiet.foreign_cpu_share)
    return max(shares)


def runner_of(
    pool: RankPool, model: ModelConfig, deployment: Deployment, limits: Limits
) -> ModelRunner:
    config = EngineConfig(
        layout=deployment.layout, options=deployment.options, ranks_per_node=NUM_RANKS
    )
    return ModelRunner(pool, model, config, limits)


def measure(runner: ModelRunner, cases: list[Case], model: ModelConfig) -> list[PhaseTimes]:
    """The first of them twice, since that warms up."""
    steps_of(runner, cases[0], model)
    return [phase_times(steps_of(runner, case, model)) for case in cases]


def steps_of(runner: Any, case: Case, model: ModelConfig, **flags: bool) -> list[Any]:
    prompts = prompts_of(case, model)
    return run_batch(runner, case.deployment, limits_of(case, model), prompts, OUTPUT_LEN, **flags)


def trace_of(pool: RankPool, case: Case, model: ModelConfig) -> RoutingTrace:
    """The experts that the requests' tokens choose, whatever the deployment."""
    alone = case._replace(deployment=DEPLOYMENTS[0])
    limits = limits_of(alone, model)
    runner = runner_of(pool, model, alone.deployment, limits)
    steps = steps_of(runner, alone, model, record_routing=True)
    records = [step.outcome.records[0] for step in steps]
    layers = tuple(range(model.num_hidden_layers))
    ids = [np.concatenate([record.topk_ids[layer] for record in records]) for layer in layers]
    num_tokens = [len(record.topk_ids[0]) for record in records]
    step = np.repeat(np.arange(len(steps)), num_tokens)
    return RoutingTrace(model.name, model.num_experts, layers, np.stack(ids), step)


def cost_runner(
    case: Case,
    model: ModelConfig,
    profile: Profile,
    trace: RoutingTrace,
    execution: Execution = Execution.EAGER,
) -> CostRunner:
    deployment, types = case.deployment, NumberTypes.all_of(DTYPE)
    options, layout = deployment.options, deployment.layout
    builder = ProgramBuilder(
        model,
        layout,
        placements_of(model, layout, options),
        types=types,
        dispatch=DispatchTable.fixed(options.dispatch, options.overlap),
        ranks_per_node=NUM_RANKS,
        block_size=BLOCK_SIZE,
        kernels=kernels_of(profile),
    )
    routing = TraceRouting(trace)
    terms = Terms.of(profile, execution)
    return CostRunner(builder, routing, Pricing(profile, types), terms)


def at_bound(runner: CostRunner, steps: list[FinishedStep], bound: int) -> list[FinishedStep]:
    """The same steps by one bound of the clock."""
    found = []
    for plan, outcome in steps:
        submitted_s, finished_s = (float(each[bound]) for each in runner.bounds[plan.step])
        outcome = replace(outcome, submitted_s=submitted_s, finished_s=finished_s)
        found.append(FinishedStep(plan, outcome))
    return found


def project(
    case: Case, model: ModelConfig, profile: Profile, trace: RoutingTrace
) -> list[PhaseTimes]:
    """By bound: low, likely, high. On a GPU decode steps are graphs, prompts are not."""
    of_decode = Execution.GRAPH if torch.cuda.is_available() else Execution.EAGER
    found = {}
    for execution in {Execution.EAGER, of_decode}:
        runner = cost_runner(case, model, profile, trace, execution)
        steps = steps_of(runner, case, model)
        found[execution] = [
            phase_times(at_bound(runner, steps, bound)) for bound in range(len(BOUNDS))
        ]
    return [
        PhaseTimes(prompts.prefill_s, decodes.decode_s)
        for prompts, decodes in zip(found[Execution.EAGER], found[of_decode], strict=True)
    ]


def kendall_tau(projected: list[float], measured: list[float]) -> tuple[float, int]:
    """Over pairs measured more than `DIFFERENT` apart; and how many those are."""
    kept = different = 0
    for a, b in combinations(range(len(measured)), 2):
        low, high = sorted((measured[a], measured[b]))
        if high > DIFFERENT * low:
            different += 1
            is_kept = (projected[a] < projected[b]) == (measured[a] < measured[b])
            kept += 1 if is_kept else -1
    return kept / max(different, 1), different


def stages_of(
    pool: RankPool, model: ModelConfig, case: Case, profile: Profile, trace: RoutingTrace
) -> dict[str, dict[str, list[float]]]:
    """By phase and stage, milliseconds of the first rank's steps: measured, then projected."""
    runner = runner_of(pool, model, case.deployment, limits_of(case, model))
    steps_of(runner, case, model)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source in (runner, cost_runner(case, model, profile, trace)):
        steps = steps_of(source, case, model, record=True)
        for phase in Phase:
            wall_s = [
                each.outcome.records[0].wall_s.sum(axis=(0, 1))
                for each in steps
                if each.plan.phase is phase
            ]
            for stage in Stage:
                found[phase][stage.label].append(1e3 * float(np.median(wall_s, axis=0)[stage]))
    return {phase: dict(of) for phase, of in found.items()}


def rows_of(
    cases: list[Case],
    times: dict[Case, list[PhaseTimes]],
    model: ModelConfig,
    profile: Profile,
    traces: dict[tuple[int, int], RoutingTrace],
) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        projected = project(case, model, profile, traces[case[1:]])
        row: dict[str, Any] = {
            "deployment": case.deployment.name,
            "num_requests": case.num_requests,
            "prompt_len": case.prompt_len,
        }
        for field in PhaseTimes._fields:
            measured_s = median(getattr(each, field) for each in times[case])
            low, likely, high = (getattr(each, field) for each in projected)
            row[field] = {
                "measured": measured_s,
                "rounds": [getattr(each, field) for each in times[case]],
                "projected": likely,
                "low": low,
                "high": high,
                "error": likely / measured_s - 1,
            }
        rows.append(row)
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for field in (*PhaseTimes._fields, "both"):
        fields = PhaseTimes._fields if field == "both" else (field,)
        values = [row[each] for each in fields for row in rows]
        tau, num_pairs = kendall_tau(
            [each["projected"] for each in values], [each["measured"] for each in values]
        )
        errors = [abs(each["error"]) for each in values]
        inside = [each["low"] <= each["measured"] <= each["high"] for each in values]
        found[field] = {
            "median_error": median(errors),
            "p90_error": float(np.percentile(errors, 90)),
            "largest_error": max(errors),
            "kendall_tau": tau,
            "num_pairs": num_pairs,
            "share_within_bounds": float(np.mean(inside)),
        }
    return found


def show(console: Console, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table(
        "deployment", "seqs", "prompt", "decode ms", "projected", "error", "prefill ms",
        "projected", "error",
    )  # fmt: skip
    for row in rows:
        cells = []
        for field in ("decode_s", "prefill_s"):
            of = row[field]
            low, likely, high = (1e3 * of[name] for name in ("low", "projected", "high"))
            cells += [
                f"{1e3 * of['measured']:.1f}",
                f"{likely:.1f} ({low:.1f}-{high:.1f})",
                f"{of['error']:+.0%}",
            ]
        name, num = row["deployment"], str(row["num_requests"])
        table.add_row(name, num, str(row["prompt_len"]), *cells)
    console.print(table)
    for field, of in summary.items():
        console.print(
            f"{field}: median error {of['median_error']:.1%}, 90th percentile "
            f"{of['p90_error']:.1%}, Kendall tau {of['kendall_tau']:.3f} over {of['num_pairs']} "
            f"pairs, measured within the bounds {of['share_within_bounds']:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=NUM_RANKS)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="take this one, calibrate nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--stages", action="store_true", help="also stage by stage")
    asked = parser.parse_args()
    model = model_of(asked.hidden, asked.layers, asked.experts)
    loads = GPU_LOADS if torch.cuda.is_available() else LOADS
    chosen = [each for each in DEPLOYMENTS if each.layout.world_size <= asked.ranks]
    cases = [Case(each, *load) for each in chosen for load in loads]
    times: dict[Case, list[PhaseTimes]] = defaultdict(list)
    with start_pool(EngineConfig(dtype=DTYPE), asked.ranks) as pool:
        calibration, share = Calibration(pool, asked.ranks), 0.0
        with Progress(transient=True) as progress:
            task = progress.add_task("rounds", total=2 * asked.rounds)
            for _ in range(asked.rounds):
                if asked.profile is None:
                    calibration.measure_round()
                progress.advance(task)
                share = max(share, measure_round(pool, model, cases, times))
                progress.advance(task)
        if asked.profile is None:
            profile = calibration.profile("this-machine")
        else:
            profile = read_profile(asked.profile)
        traces = {load: trace_of(pool, Case(DEPLOYMENTS[0], *load), model) for load in loads}
        stages = {}
        if asked.stages:
            for case in cases:
                name = f"{case.deployment.name}, {case.num_requests} × {case.prompt_len}"
                stages[name] = stages_of(pool, model, case, profile, traces[case[1:]])
    rows = rows_of(cases, times, model, profile, traces)
    summary = summary_of(rows)
    console = Console(width=120)
    show(console, rows, summary)
    line = {
        "benchmark": "projection",
        "version": __version__,
        "cores": calibration.cores,
        "cpus": os.cpu_count(),
        "model": {"hidden": asked.hidden, "layers": asked.layers, "experts": asked.experts},
        "foreign_cpu_share": {"calibration": calibration.quiet.foreign_cpu_share, "steps": share},
        "bound": BOUNDS[LIKELY],
        "summary": summary,
        "rows": rows,
        "terms": {name: term.value for name, term in profile.terms.items()},
    }
    text = json.dumps(line | ({"stages": stages} if stages else {}))
    console.out(text, highlight=False)
    if asked.json is not None:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
