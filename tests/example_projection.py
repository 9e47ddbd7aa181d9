"""A projection of two baselines and two proposals by hand-made values."""

from dataclasses import replace

from expertlane.results.assumption import Assumption
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.projection import (
    Estimate,
    ModelledDevice,
    Planned,
    ProjectedDeployment,
    ProjectedMemory,
    ProjectedScaling,
    Projection,
    ServedDeployment,
    StepProjection,
)
from expertlane.results.schema import Results, Versions
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout

NUM_SEQS = 1024
CONTEXTS = (1, 128, 1024, 10_000)


def step(
    step_ms: float, context: int, num_tokens: int = NUM_SEQS, *, fits: bool = True
) -> StepProjection:
    """Bounds are half and twice; half of it weight reads, a fifth exposed dispatch."""
    seconds = step_ms * 1e-3
    return StepProjection(
        context=context,
        num_tokens=num_tokens,
        step_s=Estimate(seconds, seconds / 2, 2 * seconds),
        tps=Estimate(num_tokens / seconds, num_tokens / seconds / 2, 2 * num_tokens / seconds),
        shares={
            "weight reads": 0.5,
            "exposed dispatch and combine": 0.2,
            "key/value reads": 0.3,
            "hand-over": 0.0,
        },
        floor_s=seconds / 4,
        flops_utilisation=0.1,
        read_utilisation=0.6,
        basis_shares={"fitted": 0.25, "bound": 0.75},
        extrapolated_share=0.9,
        weight_bytes=6_000_000_000,
        fits=fits,
    )


def row(
    name: str,
    layout: Layout,
    step_ms: float,
    options: Options | None = None,
    *,
    is_baseline: bool = False,
    top_k: int = 2,
) -> ProjectedDeployment:
    """Steps of `step_ms` at the first context, twice as much at each further one."""
    decode = [
        step(step_ms * 2**place, context, fits=context < CONTEXTS[-1])
        for place, context in enumerate(CONTEXTS)
    ]
    return ProjectedDeployment(
        name=name,
        layout=LayoutSizes.of(layout),
        options=options or Options(),
        is_baseline=is_baseline,
        top_k=top_k,
        execution="graph",
        routing="balanced",
        memory=ProjectedMemory(7_000_000_000, 300_000_000, 1_300_000_000, 72_000_000_000, 768),
        prefill=step(10 * step_ms, 4744, 16_384),
        decode=(*decode, step(step_ms * 6, CONTEXTS[-1], 768)),
    )


TENSOR = row("TP 8 × PP 2", Layout(tp=8, pp=2), 8.0, is_baseline=True)
LITERAL = row("DP 2 × TP 8, EP 2", Layout(dp=2, tp=8, ep=2), 4.0, is_baseline=True)
EXPERT = row("EP 16", Layout(dp=16, ep=16), 2.0)
OVERLAP = row("EP 16 + overlap", Layout(dp=16, ep=16), 1.9, Options(overlap=True))


def scaled(ep: int, slots: int, step_ms: float, *, fits: bool = True) -> ProjectedScaling:
    """One size of the proposal's family."""
    return ProjectedScaling(
        name=f"EP {ep}",
        layout=LayoutSizes.of(Layout(dp=ep, ep=ep)),
        num_ranks=ep,
        num_slots_per_rank=slots,
        weight_bytes=72_000_000_000 // ep,
        device_bytes=70_000_000_000,
        same_work=step(step_ms, 1024, fits=fits),
        same_share=step(step_ms, 1024, 64 * ep),
    )


def usual() -> Projection:
    """Top-2 and top-1, in graphs and eager, balanced and skewed: eager and skewed take longer."""
    rows = []
    for top_k in (2, 1):
        for execution, slower in (("graph", 1.0), ("eager", 1.5)):
            for routing in ("balanced", "skewed"):
                for each in (TENSOR, LITERAL, EXPERT, OVERLAP):
                    factor = slower * (2 if routing == "skewed" and each.layout.ep_size > 1 else 1)
                    step_ms = each.decode[0].step_s.value * 1e3 * factor
                    made = row(
                        each.name,
                        each.layout.layout,
                        step_ms,
                        each.options,
                        is_baseline=each.is_baseline,
                        top_k=top_k,
                    )
                    rows.append(replace(made, execution=execution, routing=routing))
    best = row("dp=4,tp=4,ep=16; plain", Layout(dp=4, tp=4, ep=16), 1.6)
    served = ServedDeployment(
        best.name, best.layout, best.options, 700, Estimate(5e3, 4e3, 6e3), Estimate(0.1, 0.08, 0.2)
    )
    slower = replace(served, name=TENSOR.name, tps=Estimate(2e3, 1e3, 3e3))
    return Projection(
        cluster="h100x16",
        device=ModelledDevice("a device", 80e9, 3.35e12, 989e12),
        types="float16",
        num_sequences=NUM_SEQS,
        context=1024,
        skew=1.0,
        deployments=tuple(rows),
        scaling=(scaled(1, 16, 64.0, fits=False), scaled(16, 1, 8.0), scaled(32, 1, 8.0)),
        planned=(
            Planned(2, 1679, 1, best, (served, slower)),
            Planned(1, 1679, 1, None, ()),
        ),
        assumptions=(Assumption("cluster", "h100x16", "--cluster"),),
        not_measured="it needs 16 GB but 1 GB is free",
    )


def results(model: dict[str, object], projection: Projection | None = None) -> Results:
    """A projection alone, of a model's sizes."""
    return Results(
        command="expertlane compare paper --project",
        created="2026-11-25T00:00:00+00:00",
        versions=Versions("0.1.0", "3.11", "not used"),
        machine=None,
        experiment={"name": "paper", "model": model},
        assumptions=(),
        deployments=(),
        hidden_communication=(),
        scaling=(),
        projection=projection or usual(),
    )
