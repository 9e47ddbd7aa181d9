"""Contract 1: every layout, overlap mode and micro-batching computes the reference's function."""

import pytest

from distributed.running import deployment, run_deployment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=35, prompt_len=5, output_len=3, seed=7)

SMALL_LAYOUTS = [
    "tp=1",
    "dp=4,ep=4",
    "dp=3,ep=3",  # 16 experts: 6, 5 and 5
    "dp=2",  # every expert cut in two
    "tp=4,ep=4",
    "pp=2,dp=2,tp=2,ep=4",
    "pp=4",
    "replicas=2,dp=2,ep=2",
]
LARGE_LAYOUTS = ["tp=8,pp=2", "dp=2,tp=8,ep=2", "dp=16,ep=16", "pp=2,dp=4,tp=2,ep=4"]
# Rotating with one micro-batch is the same as drained.
SCHEDULES = [(1, "drained"), (2, "drained"), (2, "rotating"), (4, "drained"), (4, "rotating")]
EVERY_RUN = {(1, "drained"), (2, "rotating")}


def cases():
    """All combinations; the largest layouts only with their own ways, the rest in full runs."""
    for layout in SMALL_LAYOUTS + LARGE_LAYOUTS:
        for overlap in (False, True):
            for schedule in SCHEDULES:
                long = layout in LARGE_LAYOUTS and schedule not in EVERY_RUN
                yield pytest.param(
                    layout,
                    overlap,
                    *schedule,
                    id=f"{layout}-{'overlap' if overlap else 'plain'}-{schedule[0]} {schedule[1]}",
                    marks=[pytest.mark.full] if long else [],
                )


def check(pools, references, model, layout, workload, seed=0, **options):
    """Hold a run that was fed the reference's tokens against the reference."""
    chosen = deployment(layout, **options)
    reference = references.run(model, workload, seed)
    run = run_deployment(
        pools.pool(chosen.layout.world_size),
        model,
        chosen,
        workload,
        seed=seed,
        forced=reference.tokens,
        return_logits=True,
    )
    return check_contract(reference, run.logits, run.tokens)


@pytest.mark.parametrize(("layout", "overlap", "num_micro_batches", "schedule"), list(cases()))
def test_every_way_to_run(pools, references, layout, overlap, num_micro_batches, schedule):
    check(
        pools,
        references,
        TINY,
        layout,
        WORKLOAD,
        overlap=overlap,
        num_micro_batches=num_micro_batches,
        micro_batch_schedule=schedule,
    )
