"""`auto`: timed once, the same table on all ranks, the same tokens."""

import pytest

from distributed.running import deployment, run_deployment
from expertlane.engine import dispatch_timing
from expertlane.engine.dispatch_timing import forms_of
from expertlane.engine.model_runner import ModelRunner
from expertlane.plan.memory import workload_limits
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=8, prompt_len=20, output_len=4, seed=3)


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "forms"),
    [
        ("tp=2", 1, ("all_gather",)),
        ("dp=4,ep=4", 4, ("all_to_all", "all_gather")),
        ("dp=4,ep=4", 2, ("all_to_all", "all_gather", "hierarchical")),
        ("dp=4,ep=4", 3, ("all_to_all", "all_gather")),
    ],
)
def test_forms_that_make_a_difference(layout, ranks_per_node, forms):
    assert forms_of(Layout.parse(layout), ranks_per_node) == forms


@pytest.mark.parametrize(
    "layout", ["dp=4,ep=4", "dp=2,tp=2,ep=2", "pp=2,dp=2,ep=2", "tp=2", "tp=1"]
)
def test_auto_gives_the_same_tokens(pools, layout):
    pool = pools.pool(Layout.parse(layout).world_size)
    fixed = run_deployment(pool, TINY, deployment(layout), WORKLOAD, ranks_per_node=2)
    auto = run_deployment(
        pool, TINY, deployment(layout, dispatch="auto"), WORKLOAD, ranks_per_node=2
    )
    assert auto.tokens.tolist() == fixed.tokens.tolist()


def test_the_table_has_what_fits(pools, monkeypatch):
    monkeypatch.setattr(dispatch_timing, "_LONG_STEP_S", float("inf"))  # on a busy machine too
    chosen = deployment("dp=4,ep=4", dispatch="auto")
    limits = workload_limits(WORKLOAD, TINY, chosen.layout)
    runner = ModelRunner(pools.pool(4), TINY, chosen, limits, seed=0, ranks_per_node=2)
    assert runner.dispatch_table is not None
    assert [row.num_tokens for row in runner.dispatch_table.rows] == [1, 4, 16]  # of 40 a step
    for row in runner.dispatch_table.rows:
        assert set(row.step_s) == {"all_to_all", "all_gather", "hierarchical"}
        assert row.fastest == min(row.step_s, key=row.step_s.get)
