"""One seed, one answer: tokens, expert counts, bytes and FLOPs do not change from run to run."""

import numpy as np
import pytest

from distributed.running import deployment, run_deployment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=13, prompt_len=5, output_len=4, seed=3)
COUNTERS = ["flops", "weight_bytes", "sent_bytes", "num_collectives", "num_tokens_per_expert"]


def counters(run):
    """What every rank counted over the whole run: name to array, by rank."""
    totals = {}
    for step in run.steps:
        for record in step.outcome.records:
            kv_bytes = totals.get((record.rank, "kv_bytes"), 0)
            totals[record.rank, "kv_bytes"] = kv_bytes + record.kv_bytes
            for name in COUNTERS:
                key = record.rank, name
                totals[key] = totals.get(key, 0) + getattr(record, name)
    return totals


def assert_same_counters(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=str(key))


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=4,ep=4", {"overlap": True}),
        ("dp=2,tp=2,ep=2", {}),
        ("pp=2,tp=2", {"num_micro_batches": 2}),
        ("pp=2,dp=2,ep=2", {"num_micro_batches": 4, "micro_batch_schedule": "rotating"}),
        ("replicas=2,dp=2,ep=2", {}),
    ],
)
def test_two_runs_agree_in_everything_counted(pools, layout, options):
    chosen = deployment(layout, **options)
    pool = pools.pool(chosen.layout.world_size)
    one = run_deployment(pool, TINY, chosen, WORKLOAD, ranks_per_node=2)
    # Something else in between: nothing of it may be left.
    run_deployment(pool, TINY, chosen, Workload(3, 2, 2, seed=99), seed=1)
    other = run_deployment(pool, TINY, chosen, WORKLOAD, ranks_per_node=2)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert_same_counters(counters(one), counters(other))
    sent = sum(value for (_, name), value in counters(one).items() if name == "sent_bytes")
    assert sent.sum() > 0


def test_layouts_agree_in_tokens_and_expert_counts(pools):
    layouts = ["tp=1", "dp=4,ep=4", "dp=3,ep=3", "tp=4", "pp=2,tp=2", "replicas=2,dp=2,ep=2"]
    runs = [run_deployment(pools.pool(4), TINY, deployment(each), WORKLOAD) for each in layouts]
    num_pairs = 13 * (5 + 3) * TINY.num_experts_per_tok  # the last tokens are not fed back
    loads = []
    for run in runs:
        found = counters(run)
        loads.append(sum(v for (_, name), v in found.items() if name == "num_tokens_per_expert"))
    for run, load in zip(runs, loads, strict=True):
        np.testing.assert_array_equal(run.tokens, runs[0].tokens)
        np.testing.assert_array_equal(load, loads[0])
        np.testing.assert_array_equal(load.sum(axis=1), [num_pairs] * 4)


def test_other_prompts_give_other_tokens(pools):
    chosen = deployment("dp=2,ep=2")
    one = run_deployment(pools.pool(2), TINY, chosen, WORKLOAD)
    other = run_deployment(pools.pool(2), TINY, chosen, Workload(13, 5, 4, seed=4))
    assert (one.tokens != other.tokens).any()
