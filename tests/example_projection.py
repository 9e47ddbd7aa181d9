"""A projection of two baselines and two proposals by hand-made values."""

from dataclasses import asdict, replace

from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Cluster
from expertlane.results.record import (
    BEST,
    EXPERIMENT,
    FASTEST,
    PARETO,
    SCALING,
    Conditions,
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
)
from expertlane.results.results import Assumption, PlanSummary, Results
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase

NUM_SEQS = 1024
CONTEXTS = (1, 128, 1024, 10_000)
CONTEXT = 1024
CONDITIONS = Conditions(2, "graph", "balanced", "float16", "float16")
CLUSTER = Cluster("h100x16", "a device", 16, 8, 80e9, 3.35e12, 989e12)


def step(
    step_ms: float, context: int, num_tokens: int = NUM_SEQS, *, fits: bool = True
) -> StepsRecord:
    """Bounds are half and twice; half of it weight reads, a fifth exposed dispatch."""
    seconds = step_ms * 1e-3
    wall_s = Estimate(seconds, seconds / 2, 2 * seconds)
    return StepsRecord(
        phase=Phase.DECODE,
        context=context,
        num_steps=1,
        num_rounds=1,
        num_tokens=num_tokens,
        num_seqs=num_tokens,
        wall_s=wall_s,
        tps=num_tokens / wall_s,
        breakdown_s={
            "weight reads": 0.5 * seconds,
            "exposed dispatch and combine": 0.2 * seconds,
            "KV reads": 0.3 * seconds,
            "PP send/recv": 0.0,
        },
        floor_s=seconds / 4,
        flops_utilisation=0.1,
        read_utilisation=0.6,
        basis_shares={"fitted": 0.25, "bound": 0.75},
        extrapolated_share=0.9,
        most_weight_bytes=6_000_000_000,
        fits=fits,
    )


def row(
    name: str,
    layout: Layout,
    step_ms: float,
    options: Options | None = None,
    *,
    is_baseline: bool = False,
    conditions: Conditions = CONDITIONS,
) -> DeploymentRecord:
    """Steps of `step_ms` at the first context, twice as much at each further one."""
    decode = [
        step(step_ms * 2**place, context, fits=context < CONTEXTS[-1])
        for place, context in enumerate(CONTEXTS)
    ]
    prefill = replace(step(10 * step_ms, 4744, 16_384), phase=Phase.PREFILL, num_seqs=32)
    return DeploymentRecord(
        name=name,
        layout=layout,
        options=options or Options(),
        source="projected",
        is_baseline=is_baseline,
        roles=(EXPERIMENT,),
        conditions=conditions,
        pools=(
            PoolRecord(
                weight_bytes=7_000_000_000,
                activation_bytes=300_000_000,
                sequence_bytes=1_300_000_000,
                allowed_bytes=72_000_000_000,
                num_resident=768,
            ),
        ),
        steps=(prefill, *decode, step(step_ms * 6, CONTEXTS[-1], 768)),
    )


TENSOR = row("TP 8 × PP 2", Layout(tp=8, pp=2), 8.0, is_baseline=True)
LITERAL = row("DP 2 × TP 8, EP 2", Layout(dp=2, tp=8, ep=2), 4.0, is_baseline=True)
EXPERT = row("EP 16", Layout(dp=16, ep=16), 2.0)
OVERLAP = row("EP 16 + overlap", Layout(dp=16, ep=16), 1.9, Options(overlap=True))


def scaled(ep: int, slots: int, step_ms: float, *, fits: bool = True) -> DeploymentRecord:
    """One size of the proposal's family."""
    same_work = step(step_ms, CONTEXT, fits=fits)
    same_share = (step(step_ms, CONTEXT, 64 * ep),) if 64 * ep != NUM_SEQS else ()
    return DeploymentRecord(
        name=f"EP {ep}",
        layout=Layout(dp=ep, ep=ep),
        options=Options(),
        source="projected",
        roles=(SCALING,),
        conditions=CONDITIONS,
        pools=(
            PoolRecord(
                weight_bytes=72_000_000_000 // ep,
                allowed_bytes=70_000_000_000,
                num_slots_per_rank=slots,
            ),
        ),
        steps=(same_work, *same_share),
    )


def serving(num_running: int, tps: Estimate, tpot_s: Estimate) -> tuple[ServingRecord, ...]:
    """Of a planner."""
    return (ServingRecord(output_tps=tps, num_running=num_running, tpot_s=Summary(mean=tpot_s)),)


def planned(role: str, conditions: Conditions = CONDITIONS) -> DeploymentRecord:
    """A layout that a planner finds."""
    layout = Layout(dp=4, tp=4, ep=16)
    found = row(f"{layout}; plain", layout, 1.6, conditions=conditions)
    return replace(found, roles=(role,))


def front(conditions: Conditions) -> list[DeploymentRecord]:
    """Two points of a planner's, without steps."""
    return [
        replace(
            planned(PARETO, conditions),
            steps=(),
            serving=serving(
                batch,
                Estimate(1e3 * batch, 5e2 * batch, 2e3 * batch),
                Estimate(0.001 * batch, 0.0005 * batch, 0.002 * batch),
            ),
        )
        for batch in (1, 8)
    ]


def usual() -> Results:
    """Top-2 and top-1, in graphs and eager, balanced and skewed: eager and skewed take longer."""
    rows = []
    for top_k in (2, 1):
        for execution, slower in (("graph", 1.0), ("eager", 1.5)):
            for routing in ("balanced", "skewed"):
                at = Conditions(top_k, execution, routing, "float16", "float16")
                for each in (TENSOR, LITERAL, EXPERT, OVERLAP):
                    factor = slower * (2 if routing == "skewed" and each.layout.ep > 1 else 1)
                    first = each.decode
                    assert first is not None
                    made = row(
                        each.name,
                        each.layout,
                        first.round_s.value * 1e3 * factor,
                        each.options,
                        is_baseline=each.is_baseline,
                        conditions=at,
                    )
                    if at == CONDITIONS and each is TENSOR:
                        slow = serving(300, Estimate(2e3, 1e3, 3e3), Estimate(0.1, 0.08, 0.2))
                        made = replace(made, serving=slow)
                    rows.append(made)
    best = replace(
        planned(BEST),
        steps=(),
        serving=serving(700, Estimate(5e3, 4e3, 6e3), Estimate(0.1, 0.08, 0.2)),
    )
    return results((*rows, planned(FASTEST), best, *SIZES))


SIZES = (scaled(1, 16, 64.0, fits=False), scaled(16, 1, 8.0), scaled(32, 1, 8.0))


def results(
    deployments: tuple[DeploymentRecord, ...], model: dict[str, object] | None = None
) -> Results:
    """A projection alone, of a model's sizes; the paper's if none are given."""
    paper = asdict(PRESETS["paper"])
    return Results.now(
        "comparison",
        "expertlane compare paper --project",
        {
            "experiment": {
                "name": "paper",
                "model": model or paper,
                "workload": {"num_sequences": NUM_SEQS, "prompt_len": 10_000, "output_len": 10},
            },
            "skew": 1.0,
        },
        deployments,
        cluster=CLUSTER,
        assumptions=(Assumption("cluster", "h100x16", change="--cluster"),),
        plans=(PlanSummary(2, 1679, 1), PlanSummary(1, 1679, 1)),
        context=CONTEXT,
        not_measured="it needs 16 GB but 1 GB is free",
    )
