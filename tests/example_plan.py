"""A plan of made-up numbers."""

from dataclasses import replace

import example_timelines
from example_projection import CONDITIONS, step
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Cluster
from expertlane.results.record import BEST, FAMILY, PARETO, DeploymentRecord, PoolRecord
from expertlane.results.results import (
    Assumption,
    EngineBest,
    PlanSummary,
    Results,
    ServeCommand,
    Versions,
)
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


def planned(
    layout: Layout, tps: float, role: str, name: str | None = None, *, in_full: bool = True
) -> DeploymentRecord:
    """With 100 sequences at once."""
    ms = 100 / tps * 1e3
    prefill = replace(step(10 * ms, 0, 16_384), phase=Phase.PREFILL)
    steps = (prefill, step(ms, 1024)) if in_full else ()
    return DeploymentRecord(
        name=name or f"{layout}; plain",
        layout=layout,
        options=Options(),
        source="projected",
        roles=(role,),
        conditions=CONDITIONS,
        pools=(
            PoolRecord(
                weight_bytes=10**9,
                activation_bytes=10**8,
                sequence_bytes=10**7,
                allowed_bytes=72 * 10**9,
            ),
        ),
        steps=tuple(
            replace(each, timeline=example_timelines.timeline(16, ms / 1e3)) for each in steps
        ),
        serving=(
            ServingRecord(
                num_running=100,
                output_tps=Estimate(tps, tps / 2, 2 * tps),
                tpot_s=Summary(mean=Estimate(ms / 1e3, ms / 2e3, ms / 500)),
                ttft_s=Summary(mean=Estimate(1.0, 0.5, 2.0)),
                prefill_tps=Estimate(1e6, 5e5, 2e6),
            ),
        ),
    )


NEAR, TENSOR, EXPERT = Layout(dp=8, tp=2, ep=16), Layout(tp=8, pp=2), Layout(dp=16, ep=16)

PLAN = Results(
    kind="plan",
    command="expertlane plan paper",
    created="2026-11-25T00:00:00+00:00",
    versions=Versions("0.1.0", "3.11", "2.4"),
    question={
        "model": {"name": "paper"},
        "workload": {"num_sequences": 1024, "prompt_len": 1000, "output_len": 1000},
        "max_tpot_s": 0.02,
        "max_ttft_s": None,
    },
    deployments=(
        planned(NEAR, 20_000, BEST),
        planned(EXPERT, 16_000, BEST),
        planned(NEAR, 20_000, FAMILY, "expert parallel", in_full=False),
        planned(TENSOR, 8_000, FAMILY, "no expert parallelism, pipeline", in_full=False),
        planned(Layout(tp=16), 500, PARETO, in_full=False),
        planned(NEAR, 20_000, PARETO, in_full=False),
    ),
    cluster=Cluster("h100x16", "a device", 16, 8, 80e9, 3.35e12, 989e12),
    assumptions=(Assumption("types", "float16", change="--dtype"),),
    plans=(
        PlanSummary(
            top_k=2,
            num_candidates=100,
            num_too_large=1,
            num_over_limits=2,
            num_pool_candidates=50,
            no_two_pools="over limits",
            engines=(
                EngineBest(
                    "vllm",
                    "vLLM",
                    "1",
                    planned(NEAR, 20_000, BEST, in_full=False),
                    commands=(ServeCommand("vLLM", ("vllm serve x",), ""),),
                ),
                EngineBest(
                    "expertlane",
                    "expertlane",
                    "1",
                    planned(NEAR, 20_000, BEST, in_full=False),
                    commands=(ServeCommand("expertlane", ("expertlane serve x",), ""),),
                ),
            ),
            experiment="results/plan/experiment.toml",
        ),
    ),
)
