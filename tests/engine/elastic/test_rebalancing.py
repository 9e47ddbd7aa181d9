"""Experts that move while steps run: the tokens stay the same, and the gate is obeyed."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from distributed.running import Inline, deployment, runner_on
from expertlane.balance.placement import WHOLE
from expertlane.comparison.records import rebalance_records
from expertlane.cost.memory import workload_limits
from expertlane.engine.elastic.rebalancing import MovePace, Rebalancer
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler, drive
from expertlane.spec.model import PRESETS, Routing
from expertlane.spec.workload import Workload

TINY = PRESETS["paper-tiny"]
SKEWED = replace(TINY, routing=Routing(router_bias=True, router_skew=1.5))
INLINE = Inline()
WORKLOAD = Workload(num_sequences=8, prompt_len=6, output_len=24, seed=3)


def run(pools, chosen, worth=None, num_steps=4, model=TINY, executor=INLINE):
    """Tokens by sequence, and the rebalancer; without `worth` nothing is rebalanced."""
    pool = pools.pool(chosen.layout.world_size)
    limits = workload_limits(WORKLOAD, model, chosen.layout)
    runner = runner_on(pool, model, chosen, limits, ranks_per_node=2)
    lines = []
    if worth is not None:
        runner.rebalancer = Rebalancer(
            pool,
            runner.arranged,
            num_steps=num_steps,
            log=lines.append,
            worth=worth,
            executor=executor,
        )
    scheduler = ContinuousScheduler(chosen.layout, chosen.options, limits)
    requests = [
        Request(str(seq), prompt, max_tokens=WORKLOAD.output_len)
        for seq, prompt in enumerate(WORKLOAD.prompt_token_ids(model.vocab_size))
    ]
    for request in requests:
        scheduler.add(request)
    for _ in drive(scheduler, runner):
        pass
    return np.array([request.output_token_ids for request in requests]), runner.rebalancer, lines


@pytest.fixture(scope="module")
def undisturbed(pools):
    """Tokens by sequence where no expert moves, of each deployment once."""
    return functools.cache(lambda layout, **options: run(pools, deployment(layout, **options))[0])


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=2,ep=2", {"num_redundant_experts": 2}),
        ("dp=4,ep=4", {"dispatch": "hierarchical", "overlap": True}),
        ("dp=2,tp=2,ep=2", {"num_redundant_experts": 3, "dispatch": "all_gather"}),
        ("pp=2,dp=2,ep=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}),
        ("replicas=2,dp=2,ep=2", {"num_redundant_experts": 2}),
        ("dp=2,tp=2,ep=2", {"weights": "int8"}),
    ],
)
@pytest.mark.parametrize("most", [9 * WHOLE, WHOLE * 5 // 4], ids=["whole", "in parts"])
def test_tokens_stay_the_same_while_experts_move(
    pools, undisturbed, monkeypatch, layout, options, most
):
    monkeypatch.setattr(MovePace, "most", most)
    chosen = deployment(layout, **options)
    tokens = undisturbed(layout, **options)
    moved, rebalancer, lines = run(pools, chosen, worth=lambda decision: decision.num_bytes)
    assert moved.tolist() == tokens.tolist()
    switched = [each for each in rebalancer.decisions if each.switched is not None]
    assert switched
    assert sum(": go" in line or ": stay" in line for line in lines) == len(rebalancer.decisions)
    paid = [each.paid_s for each in switched if each.paid_s is not None]
    assert len(paid) == sum("in place" in line for line in lines) > 0
    assert rebalancer.paid_s >= sum(paid) > 0
    assert {each.replica for each in switched} == set(range(chosen.layout.replicas))
    # A deployment that follows on the same ranks begins with experts where it says.
    again, _, _ = run(pools, chosen)
    assert again.tolist() == tokens.tolist()


def test_a_gate_that_refuses_moves_nothing(pools):
    chosen = deployment("dp=2,ep=2", num_redundant_experts=2)
    _, rebalancer, lines = run(pools, chosen, worth=lambda decision: -1.0)
    assert rebalancer.decisions
    assert rebalancer.saved_s == 0
    assert all(each.switched is None for each in rebalancer.decisions)
    assert all("saves" in line and "costs" in line for line in lines)
    assert all(result.load_after is None for result in rebalance_records(rebalancer))


def test_the_load_after_a_switch_is_more_even_as_predicted(pools, monkeypatch):
    monkeypatch.setattr(MovePace, "most", 9 * WHOLE)  # a busy machine would take smaller parts
    chosen = deployment("dp=4,ep=4", num_redundant_experts=8)
    _, rebalancer, _ = run(
        pools, chosen, worth=lambda decision: decision.gain_s, num_steps=6, model=SKEWED
    )
    first = rebalance_records(rebalancer)[0]
    assert first.switched is not None
    assert first.predicted_after < first.predicted_before
    assert first.load_after < first.load_before
    assert first.experts_s_after > 0


class Slow(ThreadPoolExecutor):
    """Is done with what is submitted only when it is told to."""

    def __init__(self):
        super().__init__(1)
        self.may_go = Event()

    def submit(self, function, /, *args, **kwargs):
        def wait_and_plan():
            assert self.may_go.wait(60)
            return function(*args, **kwargs)

        return super().submit(wait_and_plan)


def test_no_step_waits_for_a_plan(pools, undisturbed):
    chosen = deployment("dp=2,ep=2", num_redundant_experts=2)
    tokens = undisturbed("dp=2,ep=2", num_redundant_experts=2)
    with Slow() as executor:
        moved, rebalancer, lines = run(
            pools, chosen, worth=lambda decision: decision.num_bytes, executor=executor
        )
        assert moved.tolist() == tokens.tolist()
        assert rebalancer.loads
        assert not rebalancer.decisions
        assert not lines
        executor.may_go.set()


def test_the_time_of_a_move_is_what_it_takes_beside_a_stall():
    # By trial and rank: bytes, seconds of a whole expert, seconds of almost nothing.
    timed = [[(8, 0.5, 0.2), (8, 0.6, 0.1)], [(8, 0.9, 0.1), (8, 0.1, 0.1)]]
    pace = MovePace.of_trials(timed)
    assert (pace.move_s, pace.stall_s) == (pytest.approx(0.5), pytest.approx(0.1))
    pace = MovePace.of_trials([[(8, 0.16, 0.2)]])
    assert (pace.move_s, pace.stall_s) == (pytest.approx(0.01), pytest.approx(0.2))
