"""`auto`: timed once, the same table on all ranks and the same choice, the same tokens."""

import pytest

from distributed.running import deployment, run_deployment, runner_on
from expertlane.cost.memory import workload_limits
from expertlane.engine import warm_up
from expertlane.engine.ranks.commands import SetDispatch
from expertlane.engine.warm_up import middle_mean, still_hopeful
from expertlane.schedule.plan import StepPlan
from expertlane.spec.deployment import DispatchMode, DispatchRow, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase, Stage
from expertlane.spec.workload import Workload
from schedule.handmade import BLOCK_SIZE, paged_batch

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=8, prompt_len=20, output_len=4, seed=3)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Also on a busy machine: every size that fits, but no more rounds than need be."""
    monkeypatch.setattr(warm_up, "_LONG_STEP_S", float("inf"))
    monkeypatch.setattr(warm_up, "_SIZE_S", 0.0)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=4,ep=4", {"dispatch": "auto", "overlap": "auto"}),
        ("dp=4,ep=4", {"dispatch": "auto"}),
        ("dp=2,tp=2,ep=2", {"dispatch": "auto", "overlap": True}),
        ("pp=2,dp=2,ep=2", {"dispatch": "all_gather", "overlap": "auto", "num_micro_batches": 2}),
        ("tp=2", {"dispatch": "auto", "overlap": "auto"}),
        ("tp=1", {"dispatch": "auto", "overlap": "auto"}),
    ],
)
def test_auto_gives_the_same_tokens(pools, layout, options):
    pool = pools.pool(Layout.parse(layout).world_size)
    fixed = run_deployment(pool, TINY, deployment(layout), WORKLOAD, ranks_per_node=2)
    auto = run_deployment(pool, TINY, deployment(layout, **options), WORKLOAD, ranks_per_node=2)
    assert auto.tokens.tolist() == fixed.tokens.tolist()


def runner_of(pools, layout, **options):
    chosen = deployment(layout, **options)
    pool, limits = (
        pools.pool(chosen.layout.world_size),
        workload_limits(WORKLOAD, TINY, chosen.layout),
    )
    return runner_on(pool, TINY, chosen, limits, ranks_per_node=2)


def test_the_table_has_what_fits(pools):
    table = runner_of(pools, "dp=4,ep=4", dispatch="auto", overlap="auto").dispatch_table
    assert table is not None
    assert [row.num_tokens for row in table.rows] == [1, 4, 16]  # of 40 a step
    assert [mode.form for mode in table.modes] == ["all_to_all", "all_gather", "hierarchical"] * 2
    assert [mode.overlap for mode in table.modes] == [False] * 3 + [True] * 3
    one, four, _ = (row.step_s for row in table.rows)
    assert one[:3] == one[3:]  # one token is not split
    assert four[:3] != four[3:]


def test_a_stall_does_not_count():
    assert middle_mean([9.0, 1.0, 2.0, 3.0]) == 2.5
    assert middle_mean([4.0]) == 4.0


def test_what_may_yet_be_the_fastest():
    scattered = [1.0, 1.2, 0.8, 1.1, 0.9, 1.3, 0.7, 1.0]
    later, much_later = ([value + by for value in scattered] for by in (0.3, 0.6))
    timed = {"a": scattered, "b": later, "c": much_later}
    assert still_hopeful(timed) == ["a", "b"]
    assert still_hopeful({name: of * 9 for name, of in timed.items()}) == ["a"]


def test_all_ranks_and_stages_take_the_same_mode(pools):
    """The larger batch of a stage decides, before it is halved; a batch of one sequence is not."""
    flat, halves = DispatchMode("all_to_all"), DispatchMode("all_gather", overlap=True)
    table = DispatchTable((flat, halves), (DispatchRow(1, (1.0, 2.0)), DispatchRow(3, (2.0, 1.0))))
    runner = runner_of(pools, "pp=2,dp=2,ep=2", dispatch="all_to_all")
    pools.pool(4).call(SetDispatch(table), ranks=range(4))
    cases = [([1], [1, 1], flat), ([1], [1, 1, 1], halves), ([], [2, 1], halves), ([1], [3], flat)]
    for first, second, mode in cases:
        batches = (batch_of(0, first), batch_of(len(first), second))
        plan = StepPlan(0, 0, Phase.PREFILL, (batches,))
        outcome = runner.collect(runner.submit(plan))
        assert sorted(outcome.token_ids) == list(range(len(first) + len(second)))
        # Flat: counts, rows and results; all-gather: rows and results, twice for halves.
        expected = (3 if mode == flat else 4) * TINY.num_hidden_layers // 2
        for record in outcome.records:
            assert record.num_collectives[[Stage.DISPATCH, Stage.COMBINE]].sum() == expected


def batch_of(first_seq, lengths):
    parts = [(first_seq + i, i, 0, length) for i, length in enumerate(lengths)]
    return paged_batch(parts, max_len=BLOCK_SIZE)  # one block each
