"""Transfers that are waited for at once, in steps that nothing records, change no bit."""

import numpy as np
import pytest

from distributed.running import deployment, run_deployment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

TINY = PRESETS["paper-tiny"]
SHARED = TINY.with_overrides(
    name="shared",
    shared_expert_intermediate_size=32,
    shared_expert_gate=True,
    dense_layers=(0,),
    intermediate_size=96,
)
WORKLOAD = Workload(num_sequences=5, prompt_len=4, output_len=3, seed=3)


@pytest.mark.smoke(6)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2", "dp=2", "tp=2,dp=2,ep=2", "tp=2,pp=2"])
@pytest.mark.parametrize("model", [TINY, SHARED], ids=lambda each: each.name)
def test_recorded_or_not(pools, model, layout, overlap):
    made = deployment(layout, overlap=overlap)
    pool = pools.pool(made.layout.world_size)
    recorded, plain = (
        run_deployment(pool, model, made, WORKLOAD, return_logits=True, record=record)
        for record in (True, False)
    )
    np.testing.assert_array_equal(plain.logits, recorded.logits)
    assert all(step.outcome.records for step in recorded.steps)
    assert not any(step.outcome.records for step in plain.steps)


@pytest.mark.parametrize("form", ["hierarchical", "all_gather"])
def test_other_forms(pools, form):
    made = deployment("dp=4,ep=4", dispatch=form)
    recorded, plain = (
        run_deployment(
            *(pools.pool(4), TINY, made, WORKLOAD),
            return_logits=True,
            ranks_per_node=2,
            record=record,
        )
        for record in (True, False)
    )
    np.testing.assert_array_equal(plain.logits, recorded.logits)
