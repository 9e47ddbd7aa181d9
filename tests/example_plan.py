"""A plan of made-up numbers."""

import example_timelines
from example_projection import step
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.plan import (
    PlanAssumption,
    PlannedDeployment,
    PlanResults,
    ServeCommandResult,
)
from expertlane.results.projection import Estimate
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


def planned(layout: Layout, tps: float, *, in_full: bool = True) -> PlannedDeployment:
    """With 100 sequences at once."""
    ms = 100 / tps * 1e3
    phases = (Phase.PREFILL, Phase.DECODE) if in_full else ()
    return PlannedDeployment(
        layout=LayoutSizes.of(layout),
        options=Options(),
        num_sequences=100,
        tps=Estimate(tps, tps / 2, 2 * tps),
        tpot_s=Estimate(ms / 1e3, ms / 2e3, ms / 500),
        ttft_s=Estimate(1.0, 0.5, 2.0),
        prefill_tps=Estimate(1e6, 5e5, 2e6),
        why="",
        decode=step(ms, 1024) if in_full else None,
        prefill=step(10 * ms, 0, 16_384) if in_full else None,
        weight_bytes=10**9,
        activation_bytes=10**8,
        sequence_bytes=10**7,
        timelines={phase: example_timelines.timeline(16, ms / 1e3) for phase in phases},
    )


BEST = planned(Layout(dp=8, tp=2, ep=16), 20_000)
TENSOR = planned(Layout(tp=8, pp=2), 8_000)
EXPERT = planned(Layout(dp=16, ep=16), 16_000)

PLAN = PlanResults(
    command="expertlane plan paper",
    created="2026-11-25T00:00:00+00:00",
    version="0.1.0",
    model={"name": "paper"},
    cluster="h100x16",
    device="a device",
    num_sequences=1024,
    prompt_len=1000,
    output_len=1000,
    max_tpot_s=0.02,
    max_ttft_s=None,
    best=(BEST, EXPERT),
    families={"expert parallel": BEST, "no expert parallelism, pipeline": TENSOR},
    pareto=(planned(Layout(tp=16), 500, in_full=False), BEST),
    papers={"the paper's baseline": TENSOR, "the paper's proposal": EXPERT},
    two_pools=None,
    num_candidates=100,
    num_too_large=1,
    num_over_limits=2,
    num_pool_candidates=50,
    commands=(ServeCommandResult("vLLM", "vllm serve x", ""),),
    experiment="results/plan/experiment.toml",
    assumptions=(PlanAssumption("types", "float16", "--dtype"),),
)
