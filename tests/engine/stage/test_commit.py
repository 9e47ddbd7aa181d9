"""Steps that were not committed are discarded and run again: the outcome is the same."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.running import Inline, deployment, runner_on
from engine.elastic.drawn_runs import OPTIONS, draw_prompt, small_limits
from engine.stage.token_stage import PARAMS, TokenStage
from expertlane.balance.placement import WHOLE
from expertlane.engine.elastic.rebalancing import MovePace, Rebalancer
from expertlane.engine.model_runner import outcome_of
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, DriveLoop
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from schedule.paged import check_empty

VOCAB_SIZE = 26


class Interrupted(Exception):
    """As if a rank had died."""


class StageRunner:
    """Runs every step at once, on a stage of each data-parallel rank; may fail wherever ranks may.

    Every few steps bring new placements.
    """

    def __init__(self, layout, limits, interrupt, *, can_fail):
        self.stages = [
            [
                TokenStage(
                    layout,
                    limits,
                    can_fail=can_fail,
                    rank=layout.ranks_of_dp_rank(replica, dp_rank)[-1],  # of the last stage
                )
                for dp_rank in range(layout.dp)
            ]
            for replica in range(layout.replicas)
        ]
        self.placement_of_step = {}
        self._interrupt = interrupt

    def submit(self, plan):
        self._interrupt()
        outcomes, placements = [], plan.step if plan.step % 4 == 3 else None
        for stage, step in zip(self.stages[plan.replica], plan.of_dp_ranks(), strict=True):
            outcomes.append(stage.run(step, placements))
            self.placement_of_step[plan.step] = stage.migration.now
            self._interrupt()  # the other ranks have not got it
        return plan, outcomes

    def first_done(self, handles):
        self._interrupt()
        return handles[0]

    def collect(self, handle):
        outcome = outcome_of(handle[1], 0.0, 0.0)
        self._interrupt()
        return outcome

    def discard(self, plans):
        for replica, stages in enumerate(self.stages):
            steps = [plan.step for plan in plans if plan.replica == replica]
            if steps:
                for stage in stages:
                    stage.discard(steps)


@dataclass(frozen=True)
class Scenario:
    layout: Layout
    options: Options
    limits: Limits
    num_requests: int
    can_fail: bool
    seed: int

    def play(self, interrupt_rate):
        """All that a run leaves: requests, block tables, and ranks; with how often it failed."""
        rng = np.random.default_rng(self.seed)
        failing = np.random.default_rng(self.seed + 1)
        num_interrupts = 0

        def interrupt():
            nonlocal num_interrupts
            if failing.random() < interrupt_rate:
                num_interrupts += 1
                raise Interrupted

        scheduler = ContinuousScheduler(
            self.layout, self.options, self.limits, lookahead=self.layout.pp == 1
        )
        runner = StageRunner(self.layout, self.limits, interrupt, can_fail=self.can_fail)
        loop = DriveLoop(scheduler, runner)
        to_come, requests, logprobs = [self._draw(rng, i) for i in range(self.num_requests)], [], {}
        while to_come or scheduler.has_unfinished:
            while to_come and rng.random() < 0.6:
                requests.append(to_come.pop(0))
                scheduler.add(requests[-1])
            if requests and rng.random() < 0.05:
                scheduler.cancel(requests[rng.integers(len(requests))].request_id)
            finished = self._next(loop, runner, interrupt)
            if finished is not None:
                for seq, found in finished.outcome.logprobs.items():
                    logprobs.setdefault(seq, []).append(found)
        check_empty(scheduler)
        for stage in chain.from_iterable(runner.stages):
            stage.discard([])  # commits all
        left = {
            "requests": [(r.output_token_ids, r.finish_reason, r.error) for r in requests],
            "preemptions": [r.num_preemptions for r in requests],
            "logprobs": logprobs,
            "blocks": [
                vars(t.blocks) | {"_ref_counts": t.blocks._ref_counts.tolist()}
                for t in chain.from_iterable(scheduler.tables)
            ],
            "ranks": [stage.state() for stage in chain.from_iterable(runner.stages)],
            "placements": runner.placement_of_step,
        }
        return left, num_interrupts

    def _next(self, loop, runner, interrupt):
        """The next committed step, however often it takes."""
        while True:
            try:
                loop.submit()
                finished = loop.commit_next()
                break
            except Interrupted:
                self._again(loop, runner)
        try:
            interrupt()  # before ranks know of the commit
        except Interrupted:
            self._again(loop, runner)
        return finished

    def _again(self, loop, runner):
        while True:
            runner.discard(loop.uncommitted)
            try:
                return loop.submit_again()
            except Interrupted:
                continue

    def _draw(self, rng, number):
        prompt = draw_prompt(rng, VOCAB_SIZE - 1, 11)
        return Request(
            str(number),
            prompt,
            max_tokens=int(rng.integers(1, 10)),
            stop_token_ids=[int(rng.integers(0, VOCAB_SIZE))],
            sampling=PARAMS[rng.integers(len(PARAMS))],
            sampling_seed=number,
        )


scenarios = st.builds(
    Scenario,
    layout=st.sampled_from(
        [Layout(), Layout(dp=2), Layout(replicas=2), Layout(pp=2), Layout(pp=3, dp=2)]
    ),
    options=OPTIONS,
    limits=small_limits(VOCAB_SIZE),
    num_requests=st.integers(1, 12),
    can_fail=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=80)
@given(scenarios, st.sampled_from([0.05, 0.2]))
def test_interrupted_runs_leave_what_undisturbed_ones_leave(scenario, interrupt_rate):
    expected, _ = scenario.play(0.0)
    found, _ = scenario.play(interrupt_rate)
    assert found == expected


def test_the_scenarios_have_all_that_can_go_wrong():
    """Many interrupts, preemptions, requests that fail, and new placements."""
    limits = Limits(VOCAB_SIZE, 40, 12, 2, max_num_batched_tokens=12, max_num_seqs=6)
    scenario = Scenario(Layout(dp=2), Options(), limits, 40, can_fail=True, seed=3)
    left, num_interrupts = scenario.play(0.1)
    assert num_interrupts > 10
    assert sum(left["preemptions"]) > 0
    assert any(error for _, _, error in left["requests"])
    assert len(set(left["placements"].values())) > 3
    assert len(left["logprobs"]) > 3
    assert left == scenario.play(0.0)[0]


MODEL = PRESETS["paper-tiny"]
LIMITS = Limits(MODEL.vocab_size, 64, num_blocks=24, block_size=4, max_num_seqs=4)


def run_on_ranks(pools, chosen, discard_at, *, rebalance):
    """Output tokens, and what ran them; after some commits all that is in flight runs again."""
    pool, layout = pools.pool(chosen.layout.world_size), chosen.layout
    runner = runner_on(pool, MODEL, chosen, LIMITS, ranks_per_node=2)
    if rebalance:
        runner.rebalancer = Rebalancer(
            pool,
            runner.arranged,
            num_steps=2,
            log=lambda line: None,
            worth=lambda decision: decision.num_bytes,
            executor=Inline(),
        )
    scheduler = ContinuousScheduler(layout, chosen.options, LIMITS, lookahead=layout.pp == 1)
    loop = DriveLoop(scheduler, runner)
    rng, requests, num_commits = np.random.default_rng(5), [], 0
    for number in range(10):
        params = PARAMS[number % len(PARAMS)]
        prompt = rng.integers(0, MODEL.vocab_size, rng.integers(2, 9))
        requests.append(
            Request(
                str(number),
                prompt,
                max_tokens=int(rng.integers(4, 14)),
                sampling=params,
                sampling_seed=number,
            )
        )
    while requests[-1].seq_id < 0 or scheduler.has_unfinished:
        if num_commits % 2 == 0 and requests[-1].seq_id < 0:
            scheduler.add(next(each for each in requests if each.seq_id < 0))
        loop.submit()
        if num_commits in discard_at:
            runner.discard(loop.uncommitted)
            loop.submit_again()
        loop.commit_next()
        num_commits += 1
    return [request.output_token_ids for request in requests], runner


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    ("layout", "options", "rebalance"),
    [
        ("tp=2", {}, False),
        ("dp=2,ep=2", {"num_redundant_experts": 2}, True),
        ("pp=2,dp=2,ep=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}, True),
        ("replicas=2,dp=2,ep=2", {"overlap": True}, False),
    ],
)
def test_ranks_run_discarded_steps_again(pools, layout, options, rebalance, monkeypatch):
    monkeypatch.setattr(MovePace, "most", 9 * WHOLE)  # moves end soon, however busy the machine
    chosen = deployment(layout, **options)
    tokens, _ = run_on_ranks(pools, chosen, (), rebalance=rebalance)
    again, runner = run_on_ranks(pools, chosen, range(1, 60, 2), rebalance=rebalance)
    assert again == tokens
    if rebalance:
        assert any(each.switched is not None for each in runner.rebalancer.decisions)
        steps = [(load.replica, load.step) for load in runner.rebalancer.loads]
        assert len(set(steps)) == len(steps)  # none was counted twice
