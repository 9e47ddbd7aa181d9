"""What ranks count while they serve is what records of the same steps say."""

import numpy as np
import pytest

from distributed.running import deployment, runner_on
from expertlane.cost.memory import workload_limits
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler, drive
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Link, Stage
from expertlane.spec.workload import Workload

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=5, prompt_len=6, output_len=8, seed=3)
RANKS_PER_NODE = 2


def steps(runner, chosen, limits, *, record):
    scheduler = ContinuousScheduler(chosen.layout, chosen.options, limits, record=record)
    for seq, prompt in enumerate(WORKLOAD.prompt_token_ids(TINY.vocab_size)):
        scheduler.add(Request(str(seq), prompt, max_tokens=WORKLOAD.output_len))
    return list(drive(scheduler, runner))


def read(watch, pool):
    """Another reading, now."""
    watch._asked_s = 0.0
    watch.poll()
    pool.collect(watch._ticket)
    watch.poll()
    return watch.readings[-1]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp=1", {}),
        ("dp=2,ep=2", {"num_redundant_experts": 2, "overlap": True}),
        ("pp=2,tp=2,ep=1", {}),
        ("dp=2,tp=2,ep=4", {"dispatch": "hierarchical"}),
        ("dp=2,tp=2,ep=2", {"dispatch": "all_gather"}),
    ],
)
def test_totals_are_what_records_say(pools, layout, options):
    chosen = deployment(layout, **options)
    pool = pools.pool(chosen.layout.world_size)
    limits = workload_limits(WORKLOAD, TINY, chosen.layout)
    runner = runner_on(pool, TINY, chosen, limits, ranks_per_node=RANKS_PER_NODE)
    watch = runner.watch()
    first = watch.readings[-1]
    assert not first.num_tokens.any()

    recorded = steps(runner, chosen, limits, record=True)
    then = read(watch, pool)
    records = [record for step in recorded for record in step.outcome.records]
    tokens = sum(record.num_tokens_per_expert for record in records)
    np.testing.assert_array_equal(then.num_tokens, tokens)
    nodes = np.arange(chosen.layout.world_size) // RANKS_PER_NODE
    sent = np.zeros(len(Link), dtype=np.int64)
    for record in records:
        own = nodes == nodes[record.rank]
        by_rank = record.sent_bytes.sum(axis=(0, 1))
        sent += [by_rank[own].sum(), by_rank[~own].sum()]
    np.testing.assert_array_equal(then.link_bytes, sent)
    assert (then.waited_s <= then.spent_s + 1e-9).all()
    assert (then.num_steps == len(recorded)).all()
    by_rank = dict.fromkeys(range(chosen.layout.world_size), 0)
    for record in records:
        by_rank[record.rank] += record.num_tokens_per_expert.sum()
    assert then.rank_tokens.sum(axis=0).tolist() == list(by_rank.values())
    assert set(watch.imbalance(60.0)) == set(watch.layers)

    # Where nothing is recorded, all layers may run in one call.
    again = steps(runner, chosen, limits, record=False)
    assert not any(step.outcome.records for step in again)
    last = read(watch, pool)
    np.testing.assert_array_equal(last.num_tokens - then.num_tokens, then.num_tokens)
    np.testing.assert_array_equal(last.link_bytes, 2 * then.link_bytes)
    spent = last.spent_s - then.spent_s
    assert (spent[:, [Stage.ATTENTION, Stage.EXPERTS]] > 0).all()
    total = spent.sum(axis=1)
    np.testing.assert_allclose(total, last.time_s - then.time_s, atol=0.25)


def test_a_rank_that_is_not_asked_keeps_no_count(pools):
    chosen = deployment("dp=2,ep=2")
    pool = pools.pool(2)
    limits = workload_limits(WORKLOAD, TINY, chosen.layout)
    runner = runner_on(pool, TINY, chosen, limits, seed=1, ranks_per_node=RANKS_PER_NODE)
    steps(runner, chosen, limits, record=False)
    assert not runner.watch().readings[-1].num_tokens.any()
